"""The two ceilings of the GPU at hand."""

import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

from fuzzytok_kernels.tuning import timer


class Ceilings(NamedTuple):
    """What nothing exceeds by much."""

    flops: float  # a second, of a bf16 product of 8192 x 8192 matrices
    bandwidth: float  # bytes a second read and written by a copy of 2 GiB


@functools.cache
def ceilings() -> Ceilings | None:
    """Measured at the first call, each the median of three; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = _seconds(lambda: a @ b)
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source))
    return Ceilings(2 * 8192**3 / product, 2 * source.numel() * source.element_size() / copy)


def _seconds(call: Callable[[], object]) -> float:
    calls = [call] * 4
    graph = timer.capture(calls)
    timer.replay(graph)
    return statistics.median(timer.replay(graph) for _ in range(3)) / 1e3 / len(calls)
