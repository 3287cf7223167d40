"""Learning rates: each model at its config's rate, half of it and twice, on a quarter of the bytes; Table 2 takes the best of each."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.paper.bundle import Bundle
from bench.paper.config import ModelConfig, Settings, model_names, resolve
from bench.paper.prepare import path_of
from bench.paper.runs import Outcome, Place, longest_first
from bench.paper.sharing import work_off
from bench.report import table

FACTORS = (0.5, 1.0, 2.0)
_SHARE = 1 / 4


def work(folder: Path, corpus: str, settings: Settings, place: Place) -> list[Outcome]:
    """The runs, worked off as far as the time goes."""
    bundle = Bundle.load(path_of(folder, corpus))
    short = settings._replace(train_mib=settings.train_mib * _SHARE, curve_points=1)
    models = filter(lambda model: model.trained, map(ModelConfig.load, model_names()))
    varied = [model._replace(name=f"{model.name}-rate-x{factor:g}", rate=model.rate * factor) for model in models for factor in FACTORS]
    found = [Outcome(resolve(model, bundle, short, settings.seeds[corpus][0]), bundle, place, {}) for model in varied]
    work_off((each, each.train) for each in longest_first(found))
    return found


def collected(found: list[Outcome]) -> tuple[dict[str, Any], str | None]:
    """By label: [rate, bits per byte of the validation part at the end], of each rate; and what is left to do."""
    figures: dict[str, Any] = {}
    for each in found:
        each.read()
        if training := each.figures.get("training"):
            figures.setdefault(each.run.model.label, []).append([each.run.model.rate, training["curve"][-1]["validation"]])
    left = [each.run.name for each in found if "training" not in each.figures]
    return figures, f"{len(left)} runs are left to do, {left[0]} the first of them" if left else None


def best(figures: dict[str, Any]) -> dict[str, float]:
    """By label: the best rate, of the models that were trained at every one."""
    return {label: min(found, key=_bits)[0] for label, found in figures.items() if len(found) == len(FACTORS)}


def _bits(pair: Sequence[float]) -> float:
    """Of a run that diverged, none is worse."""
    return math.inf if math.isnan(pair[1]) else pair[1]


def text(figures: dict[str, Any]) -> str:
    """The table in markdown, the best of each model in bold."""
    lines = []
    for label, found in figures.items():
        least, _ = min(found, key=_bits)
        by_rate = {rate: f"**{bits:.4f}**" if rate == least else f"{bits:.4f}" for rate, bits in found}
        lines.append((label, ", ".join(f"{rate:g}: {bits}" for rate, bits in sorted(by_rate.items()))))
    title = (
        "## Learning rates\n\nBits per byte of the validation part after a quarter of the training bytes, one seed of the first corpus, at"
        " half, once and twice the rate of the config file. Table 2 trains each model, on every corpus, at its best rate here; a model"
        " that was not tried at all three, at its config's.\n\n"
    )
    return title + table(("", "rate: bits per byte"), lines)
