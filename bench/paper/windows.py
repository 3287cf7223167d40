"""Which windows of a token stream each step trains on: fixed by the seed alone, so that a run goes on where it was."""

from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
    """Of a whole run."""

    starts: np.ndarray  # (steps, batch): where each window begins; its ids are the `length + 1` from there on
    source_bytes: np.ndarray  # (steps,) that the targets of each step stand for


def plan(ids: np.ndarray, lengths: np.ndarray, length: int, batch: int, train_bytes: float, seed: int) -> Plan:
    """Windows until their targets stand for `train_bytes` source bytes; `lengths` (V,) are those of each id.

    Raises:
        ValueError: the stream is too short for one step.
    """
    windows = (len(ids) - 1) // length - 1
    if windows < 1:
        raise ValueError(f"a stream of {len(ids):,} ids has no window of {length}")
    before = np.concatenate([[0], np.cumsum(lengths[ids], dtype=np.int64)])  # source bytes before each id
    steps = 2 + int(1.1 * train_bytes * len(ids) / (before[-1] * length * batch))
    starts = shuffled(windows, length, steps * batch, seed).reshape(steps, batch)
    source_bytes = (before[starts + 1 + length] - before[starts + 1]).sum(1)
    enough = 1 + int(np.searchsorted(np.cumsum(source_bytes), train_bytes))
    return Plan(starts[:enough], source_bytes[:enough])


def shuffled(windows: int, length: int, count: int, seed: int) -> np.ndarray:
    """(count,) starts: pass after pass over all windows, each in an order and from an offset of its own."""
    starts: list[np.ndarray] = []
    for number in range(-(-count // windows)):
        random = np.random.default_rng([seed, number])
        starts.append(random.integers(length) + length * random.permutation(windows))
    return np.concatenate(starts)[:count]
