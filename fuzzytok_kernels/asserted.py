"""The assertion on what a packed batch's `cu_seqlens` holds, for a GPU, where no check may wait for it."""

from collections.abc import Callable
from typing import Any

from fuzzytok_kernels.descriptors import Traits
from fuzzytok_kernels.kernels.sequences import assert_sequences_kernel
from fuzzytok_kernels.program import Kernel, cdiv, overlapping

_CHUNK = 1024  # boundaries a program


def assertion(cu_seqlens: Traits | None, T: int, early: bool = False) -> Callable[[Any], None]:
    """Launches it, if there are any, behind the kernel that reads them; `early` if that lets the next launch start before it has ended."""
    if cu_seqlens is None:
        return lambda cu_seqlens: None
    # No arithmetic is checked for overflow, as `debug` alone would have it.
    options = {"debug": True, "sanitize_overflow": False, **overlapping(early)}
    kernel = Kernel(assert_sequences_kernel, cdiv(cu_seqlens.shape[0], _CHUNK), (early, _CHUNK), **options)
    numbers = cu_seqlens.shape[0] - 1, T
    return lambda cu_seqlens: kernel(cu_seqlens.contiguous(), *numbers)
