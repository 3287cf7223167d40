"""Which config a problem runs with."""

import contextlib
from collections.abc import Iterator
from typing import Any

from fuzzytok_kernels.tuning.problem import Problem, rounded_steps
from fuzzytok_kernels.tuning.space import Config, default_config

__all__ = ["Config", "Problem", "force", "get_config", "rounded_steps"]

_configs: dict[tuple[int, Problem], Config] = {}  # by device index
_forced: dict[str, Any] = {}  # a module variable, not a context variable: the backward runs in a thread of its own


def get_config(device: int, problem: Problem) -> Config:
    """The config that `problem` runs with on GPU number `device`."""
    if _forced:
        return _forced_config(problem)
    config = _configs.get((device, problem))
    if config is None:
        config = _configs[device, problem] = default_config(problem)
    return config


@contextlib.contextmanager
def force(config: Config | None = None, **fields: Any) -> Iterator[None]:
    """Run every op inside with `config`, or with `fields` in place of the default's, in all threads.

    A path that a problem is not aligned for is ignored; then it runs with its default.
    """
    global _forced
    before, _forced = _forced, {**(config._asdict() if config else {}), **fields}
    try:
        yield
    finally:
        _forced = before


def _forced_config(problem: Problem) -> Config:
    path = _forced.get("path")
    if path == "tma" and not problem.aligned:
        return default_config(problem)
    return default_config(problem, path)._replace(**_forced)
