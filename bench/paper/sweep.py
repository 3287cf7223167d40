"""Learning rates: each model at its config's rate, half of it and twice, on a quarter of the bytes; Table 2 takes the best of each."""

import math
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
_ASKED = frozenset({"training"})
Pair = tuple[float, float]  # a rate, and bits per byte of the validation part at the end


def work(folder: Path, corpus: str, settings: Settings, place: Place, stored: dict[str, Any]) -> list[Outcome]:
    """The runs, worked off as far as the time goes; `stored` are those of an earlier sweep."""
    bundle = Bundle.load(path_of(folder, corpus))
    short = settings._replace(train_mib=settings.train_mib * _SHARE, curve_points=1)
    varied = [model._replace(name=f"{model.name}-rate-x{factor:g}", rate=model.rate * factor) for model in _trained() for factor in FACTORS]
    runs = [resolve(model, bundle, short, settings.seeds[corpus][0]) for model in varied]
    found = [Outcome(run, bundle, place, stored.get(run.name, {}), _ASKED) for run in runs]
    work_off((each, each.train) for each in longest_first(found))
    return found


def collected(found: list[Outcome]) -> tuple[dict[str, Any], str | None]:
    """The runs by name, of each curve the end alone and no speed, for several may share a GPU; and what is left to do."""
    for each in found:
        each.read()
    figures = {each.run.name: _ended(each.stored()) for each in found if each.whole}
    left = [each.run.name for each in found if not each.whole]
    return figures, f"{len(left)} runs are left to do, {left[0]} the first of them" if left else None


def _ended(stored: dict[str, Any]) -> dict[str, Any]:
    training = stored["figures"]["training"]
    end = training["curve"][-1]
    row = {name: end[name] for name in ("step", "bytes", "bits_per_byte", "validation")}
    return stored | {"figures": {"training": {name: training[name] for name in ("steps", "bytes", "not_captured")} | {"curve": [row]}}}


def best(figures: dict[str, Any]) -> dict[str, float]:
    """By label: the best rate, of the models that were trained at every one."""
    return {label: min(pairs, key=_bits)[0] for label, pairs in _by_label(figures).items() if len(pairs) == len(FACTORS)}


def _by_label(figures: dict[str, Any]) -> dict[str, list[Pair]]:
    """By label: a pair for each rate, the lowest rate first."""
    pairs: dict[str, list[Pair]] = {}
    for each in figures.values():
        model = each["run"]["model"]
        pairs.setdefault(model["label"], []).append((model["rate"], each["figures"]["training"]["curve"][-1]["validation"]))
    return {label: sorted(some) for label, some in pairs.items()}


def _bits(pair: Pair) -> float:
    """Of a run that diverged, none is worse."""
    return math.inf if math.isnan(pair[1]) else pair[1]


def text(figures: dict[str, Any]) -> str:
    """The table in markdown, the rate that Table 2 takes in bold, and what to hold against it."""
    by_label = _by_label(figures)
    chosen = best(figures)
    lines = []
    for label, pairs in by_label.items():
        cells = (f"{rate:g}: " + (f"**{bits:.4f}**" if rate == chosen.get(label) else f"{bits:.4f}") for rate, bits in pairs)
        lines.append((label, ", ".join(cells)))
    return "\n\n".join(["## Learning rates", _METHOD, table(("", "rate: bits per byte"), lines), *_reservations(by_label, chosen)])


_METHOD = """\
Bits per byte of the validation part after a quarter of the training bytes, one seed of the first corpus, at half, once and twice the
rate of the config file. Table 2 trains each model, on every corpus, at its best rate here; a model that was not tried at all three, at
its config's. A quarter of the steps and a factor of two tell the rates apart coarsely: the best of a whole run may be another."""


def _reservations(by_label: dict[str, list[Pair]], chosen: dict[str, float]) -> list[str]:
    """What is not fair about the rates: models that were not tried at every one, and winners at an edge of what was."""
    untried = [model.label for model in _trained() if model.label not in chosen]
    edges = [f"{label} ({rate:g})" for label, rate in chosen.items() if rate in (by_label[label][0][0], by_label[label][-1][0])]
    said = []
    if untried and chosen:
        said.append(
            f"**Not equal yet:** {'; '.join(untried)} were not tried at all three rates and stand in Table 2 at their configs', while"
            f" {'; '.join(chosen)} have the best of three. The former may be better than Table 2 shows them, FuzzyTok too."
        )
    if edges:
        said.append(f"At an edge of what was tried: {'; '.join(edges)}. A better rate may lie beyond it.")
    return said


def _trained() -> list[ModelConfig]:
    return [model for model in map(ModelConfig.load, model_names()) if model.trained]
