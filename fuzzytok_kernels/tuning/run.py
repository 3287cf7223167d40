"""Run one problem on random tensors: what the tuner compiles, checks and times."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fuzzytok_kernels import launch
from fuzzytok_kernels.reference import GATES
from fuzzytok_kernels.support import conv_switch
from fuzzytok_kernels.tuning.problem import Problem

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


def arguments(problem: Problem, device: str, B: int, T: int) -> tuple[Tensor, ...]:
    """Fresh random tensors for `problem`, in the order of its op's: what `run` takes before the dilation."""
    dtype, (K, c_in, c_out) = _DTYPES[problem.dtype], (problem.kernel_size, problem.c_in, problem.c_out)

    def sequence(channels: int) -> Tensor:
        if problem.layout == "last":
            return torch.randn(B, T, channels, device=device, dtype=dtype).transpose(1, 2)
        return torch.randn(B, channels, T, device=device, dtype=dtype)

    if problem.op == "causal_conv1d_weight_grad":
        return sequence(c_out), sequence(c_in)
    weight = (torch.randn(K, c_out, c_in, device=device, dtype=dtype) / (K * c_in) ** 0.5).permute(1, 2, 0)  # tap-major, as the module's
    if problem.op == "causal_conv1d_input_grad":
        return sequence(c_out), weight, *([sequence(c_in)] if problem.epilogue == "residual" else [])
    bias, produced = torch.randn(c_out, device=device, dtype=dtype), c_out // 2 if problem.epilogue in GATES else c_out
    if problem.op == "causal_conv1d_activation_grad":
        return sequence(produced), sequence(c_in), weight, bias
    x = sequence(c_in)
    if problem.op == "causal_conv1d_fused":
        return x, weight, bias, x if c_in == produced else sequence(produced)  # a block adds its own input
    return x, weight, bias


def run(problem: Problem, *args: Any, backend: Any = launch) -> tuple[Tensor, ...]:
    """What `backend` (`launch` or `reference`) computes of `arguments(...)` and a dilation."""
    op, (*tensors, dilation) = getattr(backend, problem.op), args
    if problem.op == "causal_conv1d_weight_grad":
        return op(*tensors, problem.kernel_size, dilation)
    if problem.op == "causal_conv1d_input_grad":
        return (op(*tensors[:2], dilation, *tensors[2:]),)
    if problem.op == "causal_conv1d":
        return (op(*tensors, dilation),)
    return (op(*tensors, None, None, dilation, "none" if problem.epilogue == "residual" else problem.epilogue),)


@contextlib.contextmanager
def strict_switch(problem: Problem) -> Iterator[None]:
    """Set PyTorch's fp32 switch as the problem has it."""
    before = conv_switch.fp32_precision
    conv_switch.fp32_precision = "ieee" if problem.dtype == "fp32" else "tf32"
    try:
        yield
    finally:
        conv_switch.fp32_precision = before
