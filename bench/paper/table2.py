"""Table 2 of the paper: every run trained and evaluated as far as the time goes, and the figures of all of them in one file."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.paper.bundle import Bundle
from bench.paper.config import Settings
from bench.paper.prepare import path_of
from bench.paper.runs import Outcome, Place, outcomes
from bench.paper.train import OutOfTimeError


def measure(
    work: Path, corpora: Sequence[str], settings: Settings, place: Place, stored: dict[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """The figures by corpus, those of `stored` that still hold among them; and what is left to do, None if nothing is."""
    found: dict[str, list[Outcome]] = {}
    left = None
    try:
        for name in corpora:
            bundle = Bundle.load(path_of(work, name))
            found[name] = outcomes(bundle, settings, place, stored.get(name, {}).get("runs", {}))
            for outcome in found[name]:
                if outcome.run.model.trained:
                    outcome.evaluate()
        for outcome in _costed(found):
            outcome.costs()
    except OutOfTimeError as error:
        left = str(error)
    figures = dict(stored)
    for name, some in found.items():
        facts = {key: value for key, value in some[0].bundle.facts.items() if key != "families"}
        runs = {each.run.name: each.stored() for each in some if each.figures}
        figures[name] = {"facts": facts, "runs": _alike(stored.get(name, {}).get("runs", {}), some[0].stored()["run"]) | runs}
    return figures, left


def _alike(runs: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """Those of an earlier table that were run as `run` is: more seeds than are asked for now, perhaps."""
    return {name: each for name, each in runs.items() if all(each["run"][key] == run[key] for key in ("settings", "sha256"))}


def _costed(found: dict[str, list[Outcome]]) -> Iterator[Outcome]:
    """One of each model, on the first corpus, where there is a GPU."""
    for outcome in itertools.chain.from_iterable(found.values()):
        first = next(iter(found.values()))[0]
        if outcome.place.device.type == "cuda" and outcome.run.corpus == first.run.corpus and outcome.run.seed == first.run.seed:
            yield outcome
