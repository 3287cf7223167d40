"""The two pictures of a report, and what every picture has in common."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.grid import ELEMENT_SIZES, GRID, LENGTHS, Shape, flops, least_bytes
from bench.results import Row, Run

_SERIES = {  # label, colour, marker
    "ours": ("ours", "#0b6e4f", "o"),
    "conv1d_pad": ("F.conv1d + F.pad", "#c1440e", "s"),
    "conv2d_trim": ("conv2d channels_last, trimmed", "#3b5b92", "^"),
}


def draw(run: Run, folder: Path) -> list[Path]:
    """Draw what the run has the rows for, into `folder`; the files drawn."""
    return [path for path in (_roofline(run, folder / "roofline.png"), _lengths(run, folder / "tokens.png")) if path]


def _roofline(run: Run, path: Path) -> Path | None:
    if not run.ceilings:
        return None
    figure, axes = blank(f"Forward in bf16 under the roofline of {run.gpu}")
    peak, bandwidth = run.ceilings["flops"] / 1e12, run.ceilings["bandwidth"] / 1e12
    intensities = [40, peak / bandwidth, 4000]
    axes.plot(intensities, [min(peak, bandwidth * each) for each in intensities], color="black", linewidth=1)
    axes.annotate(f"{peak:.0f} TFLOP/s", (4000, peak), ha="right", va="bottom", xytext=(0, 3), textcoords="offset points")
    axes.annotate(f"{bandwidth:.2f} TB/s", (50, bandwidth * 50), ha="left", va="top", xytext=(8, -2), textcoords="offset points")
    for rival, (label, colour, marker) in _SERIES.items():
        rows = [row for row in run.rows.values() if row.case[:3] == ("main", "forward", rival)]
        axes.plot([_intensity(row.case.shape) for row in rows], [row.tflops for row in rows], marker, color=colour, label=label)
    for point, numbers in _clusters([row for row in run.rows.values() if row.case[:3] == ("main", "forward", "ours")]).items():
        axes.annotate(", ".join(numbers), point, fontsize=8, va="center", xytext=(6, 0), textcoords="offset points")
    key = "\n".join(f"{number}: {str(shape).replace('_', ' ')}" for number, shape in enumerate(GRID, 1))
    axes.text(0.4, 0.03, key, fontsize=7, transform=axes.transAxes)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte, at the fewest bytes", ylabel="TFLOP/s")
    return save(figure, axes, path, legend="lower right")


def _clusters(rows: Sequence[Row]) -> dict[tuple[float, float], list[str]]:
    """The numbers of the shapes, those of points too close for a number each together at the highest of them."""
    clusters: dict[tuple[float, float], list[str]] = {}
    for row in sorted(rows, key=lambda row: -row.tflops):
        x, y = _intensity(row.case.shape), row.tflops
        near = (at for at in clusters if abs(math.log(at[0] / x)) < 0.08 and abs(math.log(at[1] / y)) < 0.2)
        clusters.setdefault(next(near, (x, y)), []).append(str(GRID.index(row.case.shape) + 1))
    return clusters


def _intensity(shape: Shape) -> float:
    return flops("forward", shape) / least_bytes("forward", shape, ELEMENT_SIZES["bf16"])


def _lengths(run: Run, path: Path) -> Path | None:
    B, _, channels, _, K, d = LENGTHS[0]
    figure, axes = blank(f"Forward + backward in bf16 on {run.gpu}: B={B}, C={channels}, K={K}, d={d}")
    for rival, (label, colour, marker) in _SERIES.items():
        rows = [row for shape in LENGTHS if (row := run.get("length", "forward_backward", rival, shape))]
        axes.plot([row.case.shape.T for row in rows], [row.tokens_per_s / 1e6 for row in rows], f"{marker}-", color=colour, label=label)
    axes.set(xlabel="T, time steps", ylabel="million tokens a second", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.set_xticks([shape.T for shape in LENGTHS], [str(shape.T) for shape in LENGTHS])
    return (
        save(figure, axes, path, legend="upper left")
        if any(run.get("length", "forward_backward", "ours", shape) for shape in LENGTHS)
        else None
    )


def blank(title: str) -> tuple[Any, Any]:
    """A figure and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, axes: Any, path: Path, legend: str) -> Path:
    """Into `path`, with a legend at that place; returns `path`."""
    from matplotlib import pyplot

    axes.legend(frameon=False, loc=legend)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
