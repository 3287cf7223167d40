"""The pictures of the report: learning curves over bytes, and bits per byte over FLOPs."""

from pathlib import Path
from typing import Any

from bench.paper.table2_text import Model, models
from bench.pictures import blank, save

_COLOURS = {
    "fuzzytok-29": "#7bc8a4",
    "fuzzytok-43": "#0b6e4f",
    "byte-lstm": "#c1440e",
    "byte-transformer": "#3b5b92",
    "bpe4096-conv": "#8a6d00",
    "bpe4096-lstm": "#e0a000",
    "bpe4096-transformer": "#7d8ec4",
    "bpe385-conv": "#8c2f7e",
}


def draw(table2: dict[str, Any], folder: Path) -> list[Path]:
    """Two pictures a corpus; the files drawn."""
    drawn = []
    for name, corpus in table2.items():
        found = [model for model in models(corpus).values() if model.curve()]
        if found:
            drawn += [_over_bytes(name, found, folder), _over_flops(name, found, folder)]
    return drawn


def _over_bytes(name: str, found: list[Model], folder: Path) -> Path:
    figure, axes = blank(f"Learning curves, {name} corpus: bits per byte of the validation part")
    for model in found:
        points = [(size / (1 << 20), bits) for size, bits in model.curve()]
        axes.plot(*zip(*points, strict=True), ".-", color=_COLOURS.get(model.name), label=model.label)
    axes.set(xlabel="MiB trained on", ylabel="bits per byte")
    return save(figure, axes, folder / f"curves-{name}.png", legend="upper right")


def _over_flops(name: str, found: list[Model], folder: Path) -> Path:
    figure, axes = blank(f"Bits per byte of the validation part over the FLOPs of training, {name} corpus")
    for model in found:
        points = [(3 * size * model.flops_per_byte, bits) for size, bits in model.curve()]
        axes.plot(*zip(*points, strict=True), ".-", color=_COLOURS.get(model.name), label=model.label)
    axes.set(xscale="log", xlabel="FLOPs, forward and backward", ylabel="bits per byte")
    return save(figure, axes, folder / f"flops-{name}.png", legend="upper right")
