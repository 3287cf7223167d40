"""The fused convolution, `residual + activation(conv(x))`, as people write it, its inputs, and the error rule of its tests."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from modes import interpreter_cannot
from oracle import LAYOUTS, Problem, conv1d, poisoned, randn
from torch import Tensor

from fuzzytok_kernels import causal_conv1d

FUSED_OP = torch.ops.fuzzytok.causal_conv1d_fused.default
ACTIVATION_GRAD_OP = torch.ops.fuzzytok.causal_conv1d_activation_grad.default
INPUT_GRAD = torch.ops.fuzzytok.causal_conv1d_input_grad.default
WEIGHT_GRAD = torch.ops.fuzzytok.causal_conv1d_weight_grad.default


def FUSED(x, weight, bias, residual, dilation, activation) -> Tensor:
    """The op without an initial state and packed sequences, of which test_packed.py is."""
    return FUSED_OP(x, weight, bias, residual, None, None, dilation, activation)


def ACTIVATION_GRAD(grad_y, x, weight, bias, dilation, activation) -> Tensor:
    return ACTIVATION_GRAD_OP(grad_y, x, weight, bias, None, None, dilation, activation)


ACTIVATIONS = {  # as people write them, of p (B, C_out, T)
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda p: F.gelu(p, approximate="tanh"),
    "glu": lambda p: F.glu(p, 1),
    "tanh_sigmoid": lambda p: torch.tanh(p[:, : p.shape[1] // 2]) * torch.sigmoid(p[:, p.shape[1] // 2 :]),
}
GATES = ("glu", "tanh_sigmoid")
BOTH = ["channels-first", "channels-last"]

# c_out counts the channels of y: a gate's convolution makes twice as many.
SQUARE = Problem(B=2, c_in=8, c_out=8, T=11, K=3, d=2)
RECOMPUTED, STORED = (Problem(B=2, c_in=32, c_out=32, T=9, K=K, d=1) for K in (63, 64))  # C_in * K below 2,048, and at it

each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
of_each_kind = pytest.mark.parametrize("activation", ["gelu", "glu"])
each_layout = pytest.mark.parametrize("layout", BOTH)
stored_too = pytest.mark.parametrize(
    "problem",
    [RECOMPUTED, pytest.param(STORED, marks=interpreter_cannot("the plain op and PyTorch's functions, which the plain run covers"))],
    ids=["recomputed", "stored"],
)


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    grad_y: Tensor
    dilation: int
    activation: str

    @property
    def forward(self) -> tuple:
        return *self[:4], self.dilation, self.activation

    @property
    def backward(self) -> tuple:
        return self.grad_y, *self[:3], self.dilation, self.activation

    def map(self, function) -> "Inputs":
        return Inputs(*(function(value) if isinstance(value, Tensor) else value for value in self))


def make_inputs(problem: Problem, activation: str, dtype, device, x="channels-first", extra=None, residual="another", scale=1.0) -> Inputs:
    """`extra` is the layout of the residual and of grad_y, that of x unless told."""
    B, c_in, channels, T, K, dilation = problem
    c_out = 2 * channels if activation in GATES else channels
    layout = LAYOUTS[extra or x]
    values = randn((B, c_in, T), dtype, device, LAYOUTS[x], scale)
    others = {"x itself": values, "another": randn((B, channels, T), dtype, device, layout), "none": None}
    return Inputs(
        x=values,
        weight=randn((c_out, c_in, K), dtype, device, scale=(c_in * K) ** -0.5),
        bias=torch.randn(c_out, device=device).to(dtype),
        residual=others[residual],
        grad_y=randn((B, channels, T), dtype, device, layout),
        dilation=dilation,
        activation=activation,
    )


def composed(x, weight, bias, residual, dilation, activation, conv=conv1d) -> Tensor:
    """The block as people write it today."""
    p = conv(x, weight, bias, dilation)
    y = ACTIVATIONS[activation](p) if activation in ACTIVATIONS else p
    return y if residual is None else residual + y


def composed_grad(grad_y, x, weight, bias, dilation, activation, conv=conv1d) -> Tensor:
    p = conv(x, weight, bias, dilation).detach().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS[activation](p), p, grad_y)[0]


def composed_input_grad(grad_y, weight, dilation, residual) -> Tensor:
    x = residual.detach().clone().requires_grad_()
    return torch.autograd.grad(conv1d(x, weight, None, dilation), x, grad_y)[0] + residual


def public(x, weight, bias, residual, dilation, activation) -> Tensor:
    return causal_conv1d(x, weight, bias, dilation=dilation, activation=activation, residual=residual)


def double(args: tuple) -> tuple:
    return tuple(arg.double() if isinstance(arg, Tensor) else arg for arg in args)


def assert_accurate(op, args: tuple, compose) -> Tensor:
    """What `op` returns on poisoned memory, once it passes the error rule against `compose` in the same dtype. `args` stay as they are."""
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    with poisoned():
        got = op(*args)
    assert all(torch.equal(arg, copy) for arg, copy in zip(args, before, strict=True) if isinstance(arg, Tensor)), "an argument was written"
    assert_within_the_rule({"result": got}, {"result": compose(*double(args))}, {"result": compose(*args)})
    return got


def assert_within_the_rule(got: dict, want: dict, torchs: dict) -> None:
    """The error rule of oracle.py: at most twice PyTorch's error and eight units of the accumulator's precision.

    In fp64 `want` is PyTorch's own result, so that its error counts as none and both sides' rounding as ours: 64 units there.
    """
    for name, value in want.items():
        dtype = torchs[name].dtype
        assert (got[name].shape, got[name].dtype) == (value.shape, dtype), name
        precision = 64 * torch.finfo(dtype).eps if dtype == torch.float64 else 8 * torch.finfo(torch.float32).eps
        for norm in (float("inf"), 2):
            error, torch_error, size = (_norm(v, norm) for v in (got[name].double() - value, torchs[name].double() - value, value))
            assert error <= 2 * torch_error + precision * size, f"{name}: {norm}-norm {error:.3g}, PyTorch's {torch_error:.3g}"


def _norm(value: Tensor, norm: float) -> float:
    return torch.linalg.vector_norm(value.double(), norm).item() if value.numel() else 0.0


def run(function, inputs: Inputs, residual: str = "another") -> dict[str, Tensor]:
    """`function(x, weight, bias, residual, dilation, activation)` and its gradients by autograd, one result per name."""
    names = ["x", "weight", "bias"] + ["residual"] * (residual == "another")
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in names}
    other = leaves.get("residual", leaves["x"] if residual == "x itself" else None)
    y = function(leaves["x"], leaves["weight"], leaves["bias"], other, inputs.dilation, inputs.activation)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.grad_y.to(y.dtype))
    return {"y": y.detach(), **{f"grad_{name}": value for name, value in zip(names, gradients, strict=True)}}


def schema_order(args: tuple) -> tuple:
    return *args[:4], None, None, *args[4:]
