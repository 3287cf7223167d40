"""Blocks timed side by side, each checked first: their graphs are replayed in turns, so that a drifting clock favours none."""

import functools
import statistics
from collections.abc import Sequence

import torch

from bench.grid import ELEMENT_SIZES, Shape, least_bytes
from bench.measure import DEVICE, Call, Round, checked, rotation
from bench.model.attempts import Figures, attempted
from bench.rivals import Inputs, Results, Rival, draw
from fuzzytok_kernels.tuning import timer

ROUNDS = 25
BOUND = 1e-2  # a relative error in the L2 norm that no correct block has


def timed(shape: Shape, op: str, rivals: dict[str, tuple[Rival, Rival]]) -> Figures:
    """Microseconds of each, and how many times the first's they are; or why it failed. Beside a rival stands what it is checked against."""
    torch.manual_seed(0)
    copies = timer.copies(least_bytes("forward", shape, ELEMENT_SIZES["bf16"]))
    data = [draw(shape, torch.bfloat16, "last", DEVICE) for _ in range(copies)]
    tried = {name: attempted(functools.partial(prepared, *pair, op, data)) for name, pair in rivals.items()}
    times = in_turns({name: calls for name, calls in tried.items() if isinstance(calls, list)})
    first = times.get(next(iter(tried)))
    return {name: {"us": times[name], "ratio": first and times[name] / first} if name in times else tried[name] for name in tried}


def prepared(rival: Rival, exact: Rival, op: str, data: Sequence[Inputs]) -> list[Call]:
    """Calls of `rival` that rotate over `data`, compiled by now, and the first's results checked against those of `exact`."""
    wanted = results(exact, op, data[0])
    calls = [Call(rival, op, inputs) for inputs in data]
    calls[0]()
    checked(rival.logical(calls[0].results, calls[0].inputs), wanted, dict.fromkeys(wanted, BOUND))
    return rotation(calls)


def results(rival: Rival, op: str, inputs: Inputs) -> Results:
    """What one call leaves."""
    call = Call(rival, op, inputs)
    call()
    return call.results


def in_turns(calls: dict[str, list[Call]]) -> dict[str, float]:
    """The median microseconds of a call of each."""
    rounds = {name: Round(each) for name, each in calls.items()}
    for _ in range(1 + ROUNDS):
        for one_round in rounds.values():
            one_round()
    return {name: statistics.median(each.milliseconds[1:]) * 1e3 / len(each.calls) for name, each in rounds.items()}
