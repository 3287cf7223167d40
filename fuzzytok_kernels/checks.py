"""What the ops accept. Each op and its fake call the same check, so that every caller gets the same one-line error."""

from collections.abc import Callable
from typing import Protocol

import torch

from fuzzytok_kernels.reference import ACTIVATIONS, GATES

_CUDA_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_DTYPES = (*_CUDA_DTYPES, torch.float64)


class Checkable(Protocol):
    """What a check looks at: a tensor has it, and so have the traits that a launcher's plan is made for."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


def check_causal_conv1d(x: Checkable, weight: Checkable, bias: Checkable | None = None, dilation: int = 1) -> None:
    """Raise ValueError or TypeError unless x (B, C_in, T), weight (C_out, C_in, K) and bias (C_out,) go together."""
    _check_sequence("x", x)
    _check_weight(weight, x, channels=1, of="x's channels (C_in)", name="x")
    if bias is not None:
        _check_like("bias", bias, "x", x)
        if len(bias.shape) != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},), one value per output channel of weight")
    check_positive("dilation", dilation)


def check_causal_conv1d_fused(
    x: Checkable, weight: Checkable, bias: Checkable | None, residual: Checkable | None, dilation: int, activation: str
) -> None:
    """As `check_causal_conv1d`; besides, raise ValueError for an activation that there is not, or a residual that is not like y."""
    check_causal_conv1d(x, weight, bias, dilation)
    check_activation(activation)
    expected = (x.shape[0], _produced(weight, activation), x.shape[2])
    if residual is not None:
        _check_like("residual", residual, "x", x)
        _check_shape("residual", residual, expected, "the output's")


def check_causal_conv1d_activation_grad(
    grad_y: Checkable, x: Checkable, weight: Checkable, bias: Checkable | None, dilation: int, activation: str
) -> None:
    """As `check_causal_conv1d`; besides, raise ValueError for an activation that there is not, or a grad_y that is not like y."""
    check_causal_conv1d(x, weight, bias, dilation)
    check_activation(activation)
    if activation == "none":
        raise ValueError("activation is 'none'; expected one that has a gradient of its own")
    _check_like("grad_y", grad_y, "x", x)
    _check_shape("grad_y", grad_y, (x.shape[0], _produced(weight, activation), x.shape[2]), "the output's")


def check_causal_conv1d_input_grad(grad_y: Checkable, weight: Checkable, dilation: int = 1, residual: Checkable | None = None) -> None:
    """Raise ValueError or TypeError unless grad_y (B, C_out, T), weight (C_out, C_in, K) and residual (B, C_in, T) go together."""
    _check_sequence("grad_y", grad_y)
    _check_weight(weight, grad_y, channels=0, of="grad_y's channels (C_out)", name="grad_y")
    check_positive("dilation", dilation)
    if residual is not None:
        _check_like("residual", residual, "grad_y", grad_y)
        _check_shape("residual", residual, (grad_y.shape[0], weight.shape[1], grad_y.shape[2]), "grad_x's")


def check_causal_conv1d_weight_grad(grad_y: Checkable, x: Checkable, kernel_size: int, dilation: int = 1) -> None:
    """Raise ValueError or TypeError unless grad_y (B, C_out, T) and x (B, C_in, T) go together."""
    _check_sequence("grad_y", grad_y)
    _check_sequence("x", x)
    _check_like("x", x, "grad_y", grad_y)
    if x.shape[0] != grad_y.shape[0] or x.shape[2] != grad_y.shape[2]:
        raise ValueError(f"x has shape {tuple(x.shape)}; its batch and time must equal those of grad_y, {tuple(grad_y.shape)}")
    check_positive("kernel_size", kernel_size)
    check_positive("dilation", dilation)


CHECKS: dict[str, Callable[..., None]] = {
    "causal_conv1d": check_causal_conv1d,
    "causal_conv1d_fused": check_causal_conv1d_fused,
    "causal_conv1d_activation_grad": check_causal_conv1d_activation_grad,
    "causal_conv1d_input_grad": check_causal_conv1d_input_grad,
    "causal_conv1d_weight_grad": check_causal_conv1d_weight_grad,
}


def check_activation(activation: str) -> None:
    """Raise ValueError unless `activation` is one of `reference.ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(map(repr, ACTIVATIONS))}")


def _produced(weight: Checkable, activation: str) -> int:
    channels = weight.shape[0]
    if activation not in GATES:
        return channels
    if channels % 2 != 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; {activation!r} halves the output channels, which must be even")
    return channels // 2


def _check_shape(name: str, value: Checkable, expected: tuple, whose: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {whose}, {expected}")


def _check_sequence(name: str, x: Checkable) -> None:
    if len(x.shape) != 3:
        hint = "; add a batch dimension with unsqueeze(0)" if len(x.shape) == 2 else ""
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected 3 dimensions (batch, channels, time){hint}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected at least one channel")
    allowed = _CUDA_DTYPES if x.device.type == "cuda" else _DTYPES
    if x.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} has dtype {x.dtype} on {x.device.type}; expected one of {names}")


def _check_weight(weight: Checkable, x: Checkable, channels: int, of: str, name: str) -> None:
    _check_like("weight", weight, name, x)
    if len(weight.shape) != 3:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected 3 dimensions (C_out, C_in, K)")
    if weight.shape[channels] != x.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; its dimension {channels} must equal {of}, {x.shape[1]}")
    if 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected at least one input channel, output channel and tap")


def _check_like(name: str, value: Checkable, like_name: str, like: Checkable) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; expected the device of {like_name}, {like.device}")
    if value.dtype != like.dtype:
        raise TypeError(
            f"{name} has dtype {value.dtype}; expected the dtype of {like_name}, {like.dtype} (torch.autocast casts them for you)"
        )


def check_positive(name: str, value: int) -> None:
    if not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    if value < 1:
        raise ValueError(f"{name} is {value}; expected at least 1")
