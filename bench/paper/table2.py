"""Table 2 of the paper: every run trained and evaluated as far as the time goes, and the figures of all of them in one file."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.paper.bundle import Bundle
from bench.paper.config import Settings
from bench.paper.prepare import path_of
from bench.paper.runs import Outcome, Place, longest_first, outcomes
from bench.paper.sharing import work_off

Found = dict[str, list[Outcome]]  # by corpus


def found_of(
    folder: Path, corpora: Sequence[str], settings: Settings, place: Place, rates: dict[str, float], stored: dict[str, Any]
) -> Found:
    """The runs on these corpora, with what is known of them; `stored` is an earlier table."""
    found = {}
    for name in corpora:
        found[name] = outcomes(Bundle.load(path_of(folder, name)), settings, place, rates, stored.get(name, {}).get("runs", {}))
    return found


def work(found: Found) -> None:
    """Work them off as far as the time goes."""
    work_off(_jobs(found))


def collected(found: Found, stored: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The figures by corpus, those of `stored` that still hold among them; and what is left to do, None if nothing is."""
    figures, left = dict(stored), []
    for name, some in found.items():
        for outcome in some:
            outcome.read()
        left += [each.run.name for each in some if each.run.model.trained and not each.whole]
        facts = {key: value for key, value in some[0].bundle.facts.items() if key != "families"}
        runs = {each.run.name: each.stored() for each in some if each.figures}
        figures[name] = {"facts": facts, "runs": _alike(stored.get(name, {}).get("runs", {}), some[0].stored()["run"], runs) | runs}
    return figures, f"{len(left)} runs are left to do, {left[0]} the first of them" if left else None


def _alike(runs: dict[str, Any], run: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Those of an earlier table that were run as `run` is: more seeds than are asked for now, perhaps.

    But none at another rate than the same model has in `now`: a mean over both would be of neither.
    """
    models = {each["run"]["model"]["name"]: each["run"]["model"] for each in now.values()}

    def alike(earlier: dict[str, Any]) -> bool:
        model = earlier["model"]
        return all(earlier[key] == run[key] for key in ("settings", "sha256")) and models.get(model["name"], model) == model

    return {name: each for name, each in runs.items() if alike(each["run"])}


def _jobs(found: Found) -> Iterator[tuple[Outcome, Callable[[], object]]]:
    """The most important first: the first seed of every corpus, the costs, a second seed, what PyTorch compiles, the other seeds."""
    ranked = [(rank, each) for some in found.values() for rank, each in _ranked(some)]
    trained = [(rank, each) for rank, each in ranked if each.run.model.trained]
    first = [each for rank, each in trained if rank == 0]
    costed = _costed(found)
    yield from ((each, each.evaluate) for each in first)
    yield from ((each, each.untrained) for each in first)
    yield from ((each, each.costs) for each in costed)
    yield from ((each, each.evaluate) for rank, each in trained if rank == 1)
    yield from ((each, each.compiled) for each in costed)
    yield from ((each, each.evaluate) for rank, each in sorted(trained, key=lambda pair: pair[0]) if rank > 1)


def _ranked(some: Sequence[Outcome]) -> Iterator[tuple[int, Outcome]]:
    """Each with the number of its seed."""
    seeds = list(dict.fromkeys(each.run.seed for each in some))
    for each in longest_first(some):
        yield seeds.index(each.run.seed), each


def _costed(found: Found) -> list[Outcome]:
    """One of each model, on the first corpus, where there is a GPU."""
    some = next(iter(found.values()))
    return [each for each in some if each.place.device.type == "cuda" and each.first]
