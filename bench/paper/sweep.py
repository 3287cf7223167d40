"""Learning rates: each model at its config's rate, half of it and twice, on an eighth of the bytes; the config files hold the winners."""

from pathlib import Path
from typing import Any

from bench.paper.bundle import Bundle
from bench.paper.config import ModelConfig, Settings, model_names, resolve
from bench.paper.prepare import path_of
from bench.paper.runs import Outcome, Place
from bench.report import table

FACTORS = (0.5, 1.0, 2.0)
_SHARE = 1 / 8


def measure(work: Path, corpus: str, settings: Settings, place: Place) -> dict[str, Any]:
    """By model: [rate, bits per byte of the validation part at the end], of each rate.

    Raises:
        OutOfTimeError: not all of it could be done; what was is kept.
    """
    bundle = Bundle.load(path_of(work, corpus))
    short = settings._replace(train_mib=settings.train_mib * _SHARE, curve_points=1)
    figures: dict[str, Any] = {}
    for model in filter(lambda model: model.trained, map(ModelConfig.load, model_names())):
        for factor in FACTORS:
            varied = model._replace(name=f"{model.name}-rate-x{factor:g}", rate=model.rate * factor)
            training = Outcome(resolve(varied, bundle, short, settings.seeds[corpus][0]), bundle, place, {}).train()
            figures.setdefault(model.label, []).append([varied.rate, training["curve"][-1]["validation"]])
    return figures


def text(figures: dict[str, Any]) -> str:
    """The table in markdown, the best of each model in bold."""
    lines = []
    for label, found in figures.items():
        best = min(bits for _, bits in found)
        lines.append((label, *(f"{rate:g}: " + (f"**{bits:.4f}**" if bits == best else f"{bits:.4f}") for rate, bits in found)))
    title = "## Learning rates\n\nBits per byte of the validation part after an eighth of the training bytes, one seed.\n\n"
    return title + table(("", "half of the config's rate", "the config's", "twice"), lines)
