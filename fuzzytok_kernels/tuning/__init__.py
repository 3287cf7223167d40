"""Which config a problem runs with."""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

from fuzzytok_kernels.tuning import lookup
from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.hashes import check_fields
from fuzzytok_kernels.tuning.problem import Problem, rounded_steps
from fuzzytok_kernels.tuning.space import Config, default_config, packed_config

__all__ = ["Config", "Problem", "force", "forget", "generation", "get_config", "is_forced", "record_problems", "rounded_steps"]

_configs: dict[tuple[int, Problem], Config] = {}  # by device index
_warm = _configs  # what a warm call reads: _configs, or nothing while configs are forced or problems recorded
_forces: list[dict[str, Any]] = []  # a module variable, not a context variable: the backward runs in a thread of its own
_recordings: list[set[Problem]] = []
_generation = 0
_lock = threading.RLock()  # one thread at a time looks up, and tunes


def get_config(device: int, problem: Problem, packed: tuple[int, int] | None = None) -> Config:
    """The config that `problem` runs with on GPU number `device`; -1 is the CPU, where the interpreter runs the kernels.

    `packed`: how many sequences without a state, and their steps in all; another config may then be chosen, see `space.packed_config`.
    Its first call for a problem may read files, later calls only a table.
    """
    config = _warm.get((device, problem)) or _look_up(device, problem)
    if packed and not _forces and (gpu := Gpu.current(device)):
        return packed_config(problem, config, *packed, gpu)
    return config


@contextlib.contextmanager
def force(config: Config | None = None, **fields: Any) -> Iterator[None]:
    """Run every op inside with `config`, or with `fields` in place of the default's, in all threads.

    A path that a problem is not aligned for is ignored; then it runs with its default. Of several, the last begun counts.

    Raises ValueError for a field that a config does not have, or a value that the kernels cannot be told.
    """
    forced = {**(config._asdict() if config else {}), **fields}
    check_fields(forced)
    _forces.append(forced)
    _watch()
    try:
        yield
    finally:
        _forces[:] = [other for other in _forces if other is not forced]
        _watch()


@contextlib.contextmanager
def record_problems() -> Iterator[set[Problem]]:
    """Collect every problem that runs inside, in all threads."""
    problems: set[Problem] = set()
    _recordings.append(problems)
    _watch()
    try:
        yield problems
    finally:
        _recordings[:] = [recording for recording in _recordings if recording is not problems]
        _watch()


def forget() -> None:
    """Look every problem up again at its next call, in files read again."""
    with _lock:
        _configs.clear()
        lookup.forget()
        _watch()


def is_forced() -> bool:
    """Whether `force` is in effect."""
    return bool(_forces)


def generation() -> int:
    """Which of the answers of `get_config` holds: what was made of an earlier one is stale."""
    return _generation


def _watch() -> None:
    global _warm, _generation
    with _lock:
        _warm = {} if _forces or _recordings else _configs
        _generation += 1


def _look_up(device: int, problem: Problem) -> Config:
    for problems in _recordings:
        problems.add(problem)
    if _forces:
        return _forced_config(problem, _forces[-1])
    with _lock:
        config = _configs.get((device, problem))
        if config is None:
            config = _configs[device, problem] = lookup.find(device, problem)
        return config


def _forced_config(problem: Problem, forced: dict[str, Any]) -> Config:
    path = forced.get("path")
    if path == "tma" and not problem.aligned:
        return default_config(problem)
    return default_config(problem, path)._replace(**forced)


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()  # a thread that the fork left behind may hold the old one


os.register_at_fork(after_in_child=_renew_lock)
