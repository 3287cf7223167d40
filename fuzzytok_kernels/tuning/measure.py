"""One config raced against the default by `triton.autotune`, each checked before it is timed. Called in a worker process."""

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fuzzytok_kernels import reference
from fuzzytok_kernels.private_triton import KernelInterface, OutOfResources
from fuzzytok_kernels.tuning import Config, force, timer
from fuzzytok_kernels.tuning.compile import Resources
from fuzzytok_kernels.tuning.problem import Problem
from fuzzytok_kernels.tuning.run import arguments, run, strict_switch
from fuzzytok_kernels.tuning.space import default_config

# A result may be off by twice what PyTorch's own is, or by this; a miscompiled one is off by far more.
_ALLOWANCE = {"fp16": 1e-3, "bf16": 8e-3, "tf32": 1e-3, "fp32": 2e-6}


class Job(NamedTuple):
    """A problem, and sizes at which to time it."""

    problem: Problem
    B: int
    T: int
    dilation: int


def race(device: int, job: Job, config: Config, used: Resources, shared_memory: int) -> tuple[float, float]:
    """Microseconds of the default and of `config` on GPU number `device`; infinity for one that is wrong, spills or does not fit.

    A lost CUDA context ends the process, for nothing after it could be trusted.
    """
    default, candidate = (_triton_config(each) for each in (default_config(job.problem), config))

    def early_config_prune(configs: list[triton.Config], named_args: dict, **kwargs: Any) -> list[triton.Config]:
        fits = used.shared <= shared_memory and not used.spills
        return [each for each in configs if fits or each is not candidate]

    torch.cuda.set_device(device)
    try:
        launch = _launch(device, job)
        race = triton.autotune(
            [default, candidate], key=[], prune_configs_by={"early_config_prune": early_config_prune}, do_bench=launch.bench
        )
        tuned = race(launch)
        tuned.run()
        times = getattr(tuned, "configs_timings", {})
        return times.get(default, [math.inf])[0], times.get(candidate, [math.inf])[0]
    finally:
        _end_if_lost()


def verify(device: int, jobs: Sequence[Job], config: Config) -> list[float | None]:
    """For each job the largest error of `config` as a share of what it may be; None if it asks for more than GPU number `device` has.

    NaN for a result that was not written in full.
    """
    torch.cuda.set_device(device)
    errors: list[float | None] = []
    try:
        for job in jobs:
            launch = _Launch(device, job, cold=False)
            try:
                with _poisoned():
                    launch.run(**config._asdict())
                errors.append(launch.error())
            except OutOfResources:
                errors.append(None)
    finally:
        _end_if_lost()
    return errors


class _Launch(KernelInterface):
    """A whole launch, preparation and second stage included, as a kernel that `triton.autotune` can tune."""

    fn = staticmethod(run)
    arg_names: tuple = ()

    def __init__(self, device: int, job: Job, cold: bool = True) -> None:
        self.problem, self.dilation = job.problem, job.dilation
        where = f"cuda:{device}"
        first = arguments(job.problem, where, job.B, job.T)
        sets = timer.copies(2 * sum(x.numel() * x.element_size() for x in first)) if cold else 1
        self.inputs = [first] + [arguments(job.problem, where, job.B, job.T) for _ in range(sets - 1)]
        self.turn = itertools.cycle(self.inputs)
        with strict_switch(self.problem):
            self.wanted = self._reference([x.double() for x in first])
            self.bounds = [
                max(2 * _error(ours, wanted), _ALLOWANCE[self.problem.dtype])
                for ours, wanted in zip(self._reference(first), self.wanted, strict=True)
            ]

    def run(self, num_warps: int, num_stages: int, num_ctas: int = 1, **fields: Any) -> tuple[Tensor, ...]:
        with strict_switch(self.problem), force(Config(num_warps=num_warps, num_stages=num_stages, **fields)):
            self.results = run(self.problem, *next(self.turn), self.dilation)
        return self.results

    def bench(self, kernel_call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
        """Verify, then time: what `triton.autotune` calls for each config. Microseconds, the median for every quantile."""
        self.turn = itertools.cycle(self.inputs)
        with _poisoned():
            kernel_call()
        if not self.error() <= 1:
            return [math.inf] * len(quantiles)
        return [timer.microseconds([kernel_call] * max(8, len(self.inputs)), budget_ms=12.0)] * len(quantiles)

    def error(self) -> float:
        """Of the last results: the largest as a share of its bound, NaN before all others."""
        shares = [_error(ours, wanted) / bound for ours, wanted, bound in zip(self.results, self.wanted, self.bounds, strict=True)]
        return max(shares, key=lambda share: (math.isnan(share), share))

    def _reference(self, inputs: Any) -> tuple[Tensor, ...]:
        return run(self.problem, *inputs, self.dilation, backend=reference)


_launch = functools.lru_cache(maxsize=1)(_Launch)  # the candidates of a job follow each other


def _triton_config(config: Config) -> triton.Config:
    fields = config._asdict()
    return triton.Config(fields, num_warps=fields.pop("num_warps"), num_stages=fields.pop("num_stages"))


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Inside, fresh memory is full of NaN: what the default has just left there, an unwritten output would pass for its own."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _error(ours: Tensor, wanted: Tensor) -> float:
    """Relative, in the L2 norm; NaN is never within a bound."""
    return float((ours.double() - wanted).norm() / wanted.norm())


def _end_if_lost() -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(1)
