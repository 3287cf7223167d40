"""Run one problem on random tensors: what the tuner compiles, checks and times."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fuzzytok_kernels import launch
from fuzzytok_kernels.support import conv_switch
from fuzzytok_kernels.tuning.problem import Problem

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


def arguments(problem: Problem, device: str, B: int, T: int) -> tuple[Tensor, ...]:
    """Fresh random tensors for `problem`: x, weight and bias; or grad_y and weight; or grad_y and x."""
    dtype, (K, c_in, c_out) = _DTYPES[problem.dtype], (problem.kernel_size, problem.c_in, problem.c_out)

    def sequence(channels: int) -> Tensor:
        if problem.layout == "last":
            return torch.randn(B, T, channels, device=device, dtype=dtype).transpose(1, 2)
        return torch.randn(B, channels, T, device=device, dtype=dtype)

    if problem.op == "causal_conv1d_weight_grad":
        return sequence(c_out), sequence(c_in)
    weight = (torch.randn(K, c_out, c_in, device=device, dtype=dtype) / (K * c_in) ** 0.5).permute(1, 2, 0)  # tap-major, as the module's
    if problem.op == "causal_conv1d_input_grad":
        return sequence(c_out), weight
    return sequence(c_in), weight, torch.randn(c_out, device=device, dtype=dtype)


def run(problem: Problem, *args: Any, backend: Any = launch) -> tuple[Tensor, ...]:
    """What `backend` (`launch` or `reference`) computes of `arguments(...)` and a dilation."""
    op = getattr(backend, problem.op)
    if problem.op == "causal_conv1d_weight_grad":
        grad_y, x, dilation = args
        return op(grad_y, x, problem.kernel_size, dilation)
    return (op(*args),)


@contextlib.contextmanager
def strict_switch(problem: Problem) -> Iterator[None]:
    """Set PyTorch's fp32 switch as the problem has it."""
    before = conv_switch.fp32_precision
    conv_switch.fp32_precision = "ieee" if problem.dtype == "fp32" else "tf32"
    try:
        yield
    finally:
        conv_switch.fp32_precision = before
