"""The picture: memory over depth."""

from pathlib import Path

from bench import pictures
from bench.model.attempts import Figures
from bench.model.sizes import BLOCK, DEPTHS


def draw(figures: Figures, gpu: str, path: Path) -> None:
    """Draw the section `depth` into `path`."""
    figure, axes = pictures.blank(f"Peak memory of a training step above its weights: B={BLOCK.B}, T={BLOCK.T}, C={BLOCK.c_in} on {gpu}")
    for name, label, colour, marker in (("ours", "ours", "#0b6e4f", "o"), ("best", figures["best"], "#3b5b92", "^")):
        points = [(int(depth), row[name]["mib"]) for depth, row in figures["peaks"].items() if "mib" in row[name]]
        axes.plot(*zip(*points, strict=True), f"{marker}-", color=colour, label=label)
    axes.set(xlabel="residual blocks", ylabel="MiB", ylim=(0, None), xticks=DEPTHS)
    pictures.save(figure, axes, path, legend="upper left")
