"""How much of the exchange between GPUs lies behind computing, as the kernels of a profile show it."""

from collections.abc import Iterable
from typing import NamedTuple

from torch.profiler import profile

Interval = tuple[float, float]


class Exchanged(NamedTuple):
    """Microseconds of a profile: in which some kernel of NCCL ran, in which one ran beside another kernel, and in which any ran.

    A kernel of NCCL begins when its rank is ready, so that its time is the message's and the wait for the other ranks.
    """

    total: float
    hidden: float
    busy: float


def exchanged(messages: Iterable[Interval], kernels: Iterable[Interval]) -> Exchanged:
    """Of the intervals of NCCL's kernels and of all others, which may overlap among themselves."""
    messages, kernels = union(messages), union(kernels)
    hidden = sum(max(0.0, min(end, other_end) - max(begin, other_begin)) for begin, end in messages for other_begin, other_end in kernels)
    return Exchanged(_length(messages), hidden, _length(union([*messages, *kernels])))


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time in intervals that do not touch, in order."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def after_the_first(profiler: profile, calls: int) -> Exchanged:
    """Of the GPU's kernels in a profile of so many like calls, one after another, without those of the first."""
    events = [event for event in profiler.profiler.kineto_results.events() if str(event.device_type()).endswith("CUDA")]  # type: ignore[union-attr]
    events.sort(key=lambda event: event.start_ns())
    found: dict[bool, list[Interval]] = {True: [], False: []}
    for event in events[len(events) // calls :]:
        begin = event.start_ns() / 1e3
        found["nccl" in event.name().lower()].append((begin, begin + event.duration_ns() / 1e3))
    return exchanged(found[True], found[False])
