"""What the ops accept. Each op and its fake call the same check, so that every caller gets the same one-line error."""

from typing import Protocol

import torch

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


def check_causal_conv1d_input_grad(grad_y: Checkable, weight: Checkable, dilation: int = 1) -> None:
    """Raise ValueError or TypeError unless grad_y (B, C_out, T) and weight (C_out, C_in, K) go together."""
    _check_sequence("grad_y", grad_y)
    _check_weight(weight, grad_y, channels=0, of="grad_y's channels (C_out)", name="grad_y")
    check_positive("dilation", dilation)


def check_causal_conv1d_weight_grad(grad_y: Checkable, x: Checkable, kernel_size: int, dilation: int = 1) -> None:
    """Raise ValueError or TypeError unless grad_y (B, C_out, T) and x (B, C_in, T) go together."""
    _check_sequence("grad_y", grad_y)
    _check_sequence("x", x)
    _check_like("x", x, "grad_y", grad_y)
    if x.shape[0] != grad_y.shape[0] or x.shape[2] != grad_y.shape[2]:
        raise ValueError(f"x has shape {tuple(x.shape)}; its batch and time must equal those of grad_y, {tuple(grad_y.shape)}")
    check_positive("kernel_size", kernel_size)
    check_positive("dilation", dilation)


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
