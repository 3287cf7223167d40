"""`model.md`, `model.json` and the picture of a run."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.model import picture
from bench.model.attempts import Figures
from bench.model.bars import judge
from bench.model.forms import FORMS
from bench.model.sizes import BLOCK
from bench.model.steps import GRADIENT_BOUND, LOSS_BOUND, STEPS
from bench.model.turns import BOUND
from bench.report import table

_PICTURE = "model_memory.png"
_METHOD = f"""\
bf16, channels-last. Block: {BLOCK}, on inputs that rotate over more data than the L2 holds, as captured graphs replayed in turns; the
forward under no_grad. Every form was first checked: a block against the reference in fp64 (relative L2 error at most {BOUND}), and at
each batch a model's loss and each of its gradients against ours (at most {LOSS_BOUND} and {GRADIENT_BOUND}); one wrong result, and nothing
is printed. The model is an embedding, LayerNorm, six blocks of 256 channels with exact GELU, a linear head and cross-entropy; a step is
forward and backward under autocast, with parameters in fp32 and no optimiser. "Launched": the median of {STEPS} steps, launched one after
another; "graph": the median replay of the step as a CUDA graph; tokens/s by the better.
Peak MiB are what a step allocates above the weights, gradients included.
Under autocast, PyTorch's blocks as people write them hand fp32 to each other; those with their stream in bf16 do as ours does."""


def write(figures: Figures, folder: Path) -> str:
    """Write all three, of the measured sections, into `folder`. Returns the markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    text = render(figures)
    (folder / "model.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "model.md").write_text(text, encoding="utf-8")
    depth = figures["sections"].get("depth", {})
    if "peaks" in depth:
        picture.draw(depth, figures["gpu"], folder / _PICTURE)
    return text


def render(figures: Figures) -> str:
    """The figures as markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items() if version)
    sections = figures["sections"]
    parts = [f"# The fused block and a model of it on {figures['gpu']}", f"{figures['date']}; {versions}.", _METHOD]
    parts.append("## The bars\n\n" + table(("what", "bar", "measured", "verdict"), judge(sections)))
    parts += [f"{name}: {each['failed']}" if "failed" in each else _SECTIONS[name](each) for name, each in sections.items()]
    return "\n\n".join(parts) + "\n"


def _block(figures: Figures) -> str:
    return "## Block forward\n\n" + _times(figures, "/ plain op")


def _backward(figures: Figures) -> str:
    return "## Block forward + backward, exact GELU\n\n" + _times(figures, "/ ours")


def _times(figures: Figures, ratio: str) -> str:
    lines = [(name, *_cells(row, ("us", ".1f"), ("ratio", ".3f"))) for name, row in figures.items()]
    return table(("what", "us", ratio), lines)


def _model(figures: Figures) -> str:
    header = ("form", "largest error", "ms launched", "ms graph", "Mtok/s", "peak MiB", "ms graph / ours", "peak / ours")
    parts = []
    for batch, rows in figures.items():
        B, T = map(int, batch.split("x"))
        lines = [(FORMS[name].label, *_model_cells(row, rows["ours"], B * T)) for name, row in rows.items()]
        parts.append(f"## Training step, B={B} T={T}\n\n" + table(header, lines))
    return "\n\n".join(parts)


def _model_cells(row: Figures, ours: Figures, tokens: int) -> Iterator[str]:
    yield from _cells(row, ("error", ".1e"), ("eager_ms", ".2f"), ("graph_ms", ".2f"))
    fastest = min((row[name] for name in ("eager_ms", "graph_ms") if name in row), default=None)
    yield f"{tokens / fastest / 1e3:.1f}" if fastest else ""
    yield from _cells(row, ("peak_mib", ".0f"))
    for name in ("graph_ms", "peak_mib"):
        yield _ratio(row.get(name), ours.get(name))


def _depth(figures: Figures) -> str:
    lines = []
    for depth, row in figures["peaks"].items():
        cells = [cell for name in ("ours", "best") for cell in _cells(row[name], ("mib", ".0f"))]
        lines.append((depth, *cells, _ratio(row["ours"].get("mib"), row["best"].get("mib"))))
    peaks = table(("blocks", "ours", figures["best"], "ratio"), lines)
    return f"## Peak MiB over depth, B={BLOCK.B} T={BLOCK.T}\n\n{peaks}\n\n![memory over depth]({_PICTURE})"


def _saved(figures: Figures) -> str:
    lines = [(name, str(count)) for name, count in figures.items()]
    return "## Tensors of the input's size that one block saves\n\n" + table(("block", "tensors"), lines)


def _rule(figures: Figures) -> str:
    lines = [(size, *(cell for row in rows.values() for cell in _cells(row, ("us", ".1f")))) for size, rows in figures.items()]
    title = f"## The pre-activation recomputed or stored: forward + backward of a block, {BLOCK.tokens:,} tokens\n\n"
    return title + table(("C_in * K", "us recomputed", "us stored"), lines)


_SECTIONS: dict[str, Callable[[Figures], str]] = {
    "block": _block,
    "backward": _backward,
    "model": _model,
    "depth": _depth,
    "saved": _saved,
    "rule": _rule,
}


def _cells(row: Figures, *formats: tuple[str, str]) -> Iterator[str]:
    """One cell a figure; the first that is missing says why, if that is known."""
    reasons = iter([reason for key in ("failed", "graph_failed") if (reason := row.get(key))])
    for name, form in formats:
        yield next(reasons, "") if row.get(name) is None else format(row[name], form)


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a and b else ""
