"""The error rule: per op, our error may be at most twice that of PyTorch's own convolution, both against the reference in fp64.

Twice, and eight units of the accumulator's precision: where PyTorch happens to be exact (a few terms), another order of addition is
not an error, and it may turn the final rounding of one element. A bf16 accumulator or an unwanted TF32 is hundreds of times that.
"""

from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fuzzytok_kernels import reference

ops = torch.ops.fuzzytok
OPS = {
    "causal_conv1d": ops.causal_conv1d.default,
    "causal_conv1d_input_grad": ops.causal_conv1d_input_grad.default,
    "causal_conv1d_weight_grad": ops.causal_conv1d_weight_grad.default,
}


class Problem(NamedTuple):
    B: int
    c_in: int
    c_out: int
    T: int
    K: int
    d: int


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grad_y: Tensor
    dilation: int

    def args(self, op: str) -> tuple:
        x, weight, bias, grad_y, dilation = self
        return {
            "causal_conv1d": (x, weight, bias, dilation),
            "causal_conv1d_input_grad": (grad_y, weight, dilation),
            "causal_conv1d_weight_grad": (grad_y, x, weight.shape[2], dilation),
        }[op]

    def map(self, function) -> "Inputs":
        return Inputs(*(function(value) if isinstance(value, Tensor) else value for value in self))


# ---- layouts: (strides, offset) of a (B, C, T) tensor

LAYOUTS = {
    "channels-first": lambda B, C, T: ((C * T, T, 1), 0),
    "channels-last": lambda B, C, T: ((C * T, 1, C), 0),
    "channels-first, one element off": lambda B, C, T: ((C * T, T, 1), 1),
    "channels-last, one element off": lambda B, C, T: ((C * T, 1, C), 1),
    "channels-first, slice in time": lambda B, C, T: ((C * (T + 5), T + 5, 1), 3),
    "channels-last, slice in time": lambda B, C, T: ((C * (T + 5), 1, C), 3 * C),
    "channels-last, slice of channels": lambda B, C, T: ((T * (C + 3), 1, C + 3), 2),
    "channels-last, aligned slice of channels": lambda B, C, T: ((T * (C + 16), 1, C + 16), 16),
    "channels-first, every second step": lambda B, C, T: ((2 * C * T, 2 * T, 2), 0),
    "channels-last, every second step": lambda B, C, T: ((2 * C * T, 1, 2 * C), 0),
    "channels-last, every second channel": lambda B, C, T: ((2 * C * T, 2, 2 * C), 0),
    "time first": lambda B, C, T: ((C, 1, B * C), 0),
    "channels first of all": lambda B, C, T: ((T, B * T, 1), 0),
    "batch last": lambda B, C, T: ((1, B, B * C), 0),
    "one row for the batch": lambda B, C, T: ((0, 1, C), 0),
    "one step for all": lambda B, C, T: ((C, 1, 0), 0),
    "one channel for all": lambda B, C, T: ((T, 0, 1), 0),
    "one value for all": lambda B, C, T: ((0, 0, 0), 0),
}
WEIGHT_LAYOUTS = {  # of a (C_out, C_in, K) tensor
    "tap-major": lambda O, C, K: ((C, 1, O * C), 0),  # noqa: E741
    "tap-major, then inputs": lambda O, C, K: ((1, O, O * C), 0),  # noqa: E741
    "inputs first": lambda O, C, K: ((K, O * K, 1), 0),  # noqa: E741
    "slice": lambda O, C, K: (((C + 1) * (K + 2), K + 2, 1), 1),  # noqa: E741
    "every second tap": lambda O, C, K: ((2 * C * K, 2 * K, 2), 0),  # noqa: E741
    "one value for all": lambda O, C, K: ((0, 0, 0), 0),  # noqa: E741
}


def randn(shape: tuple, dtype: torch.dtype, device: torch.device, layout=LAYOUTS["channels-first"], scale: float = 1.0) -> Tensor:
    """Random values in a layout, with NaN in all the storage around them: what a kernel reads out of bounds shows."""
    strides, offset = layout(*shape)
    base = [1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True)]
    last = offset + sum((size - 1) * stride for size, stride in zip(base, strides, strict=True))
    storage = torch.full((max(last, 0) + 8,), float("nan"), dtype=dtype, device=device)
    view = storage.as_strided(base, strides, offset)
    view.copy_(torch.randn(base, device=device) * scale)
    return view.expand(shape)


def make_inputs(
    problem: Problem, dtype: torch.dtype, device: torch.device, x="channels-first", grad_y="channels-first", weight=None, bias=True
) -> Inputs:
    B, c_in, c_out, T, K, d = problem
    return Inputs(
        x=randn((B, c_in, T), dtype, device, LAYOUTS[x]),
        weight=randn((c_out, c_in, K), dtype, device, WEIGHT_LAYOUTS.get(weight, LAYOUTS["channels-first"]), (c_in * K) ** -0.5),
        bias=torch.randn(c_out, device=device).to(dtype) if bias else None,
        grad_y=randn((B, c_out, T), dtype, device, LAYOUTS[grad_y]),
        dilation=d,
    )


# ---- three ways to the same four results


def naive(inputs: Inputs) -> Tensor:
    """Eq. 2 and 3 as they stand, a product per tap; independent of PyTorch's convolution."""
    x, weight, bias, _, d = inputs
    y = x.new_zeros(x.shape[0], weight.shape[0], x.shape[2])
    for k in range(weight.shape[2]):
        if (seen := x.shape[2] - k * d) > 0:
            y[:, :, k * d :] += torch.einsum("oc,bct->bot", weight[:, :, k], x[:, :, :seen])
    return y if bias is None else y + bias[:, None]


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """The causal convolution as people write it today."""
    return F.conv1d(F.pad(x, ((weight.shape[2] - 1) * dilation, 0)), weight.flip(2), bias, dilation=dilation)


def with_gradients(forward, inputs: Inputs) -> dict[str, Tensor]:
    """`forward(x, weight, bias, dilation)` and its gradients by autograd, one result per name."""
    x, weight, bias, grad_y, dilation = inputs
    leaves = [value.detach().requires_grad_() for value in (x, weight, bias) if value is not None]
    y = forward(*leaves[:2], leaves[2] if bias is not None else None, dilation)
    gradients = torch.autograd.grad(y, leaves, grad_y)
    return {"y": y.detach(), **dict(zip(("grad_x", "grad_weight", "grad_bias"), gradients, strict=False))}


def _all_three(module: Any, inputs: Inputs) -> dict[str, Tensor]:
    y = module.causal_conv1d(*inputs.args("causal_conv1d"))
    grad_x = module.causal_conv1d_input_grad(*inputs.args("causal_conv1d_input_grad"))
    grad_weight, grad_bias = module.causal_conv1d_weight_grad(*inputs.args("causal_conv1d_weight_grad"))
    return {"y": y, "grad_x": grad_x, "grad_weight": grad_weight, "grad_bias": grad_bias}


def exact(inputs: Inputs) -> dict[str, Tensor]:
    return _all_three(reference, inputs.map(Tensor.double))


@contextmanager
def poisoned():
    """Inside, fresh memory (outputs and scratch) is full of NaN, so that an element left unwritten cannot pass."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def ours(inputs: Inputs) -> dict[str, Tensor]:
    """The three ops on poisoned memory. The inputs must come out as they went in."""
    before = inputs.map(Tensor.clone)
    with poisoned():
        results = _all_three(ops, inputs)
    for name, value, copy in zip(inputs._fields, inputs, before, strict=True):
        assert not isinstance(value, Tensor) or torch.equal(value, copy), f"{name} was written"
    return results


# ---- the rule


def assert_accurate(inputs: Inputs) -> dict[str, Tensor]:
    """Our results, once they have the right shape and dtype and pass the error rule in the largest and in the mean square error."""
    results, wanted = ours(inputs), exact(inputs)
    torchs = with_gradients(conv1d, inputs)
    precision = 8 * torch.finfo(torch.float64 if inputs.x.dtype == torch.float64 else torch.float32).eps
    failures = []
    for name, got in results.items():
        want, torch_got = wanted[name], torchs.get(name, wanted[name].to(got.dtype))
        assert (got.shape, got.dtype) == (want.shape, inputs.x.dtype), name
        for norm in (float("inf"), 2):
            error, torch_error, size = (_norm(value, norm) for value in (got - want, torch_got - want, want))
            if not error <= 2 * torch_error + precision * size:
                failures.append(f"{name}: {norm}-norm of the error {error:.3g}, PyTorch's {torch_error:.3g}, of the result {size:.3g}")
    assert not failures, "; ".join(failures)
    return results


def _norm(value: Tensor, norm: float) -> float:
    return torch.linalg.vector_norm(value.double(), norm).item() if value.numel() else 0.0


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, value in want.items():
        assert torch.equal(got[name], value), name
