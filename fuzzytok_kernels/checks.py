"""What the ops accept. Each op and its fake call the same check, so that every caller gets the same one-line error."""

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

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
        _check_bias(bias, weight, "x", x)
    check_at_least(1, "dilation", dilation)


def check_causal_conv1d_fused(
    x: Checkable,
    weight: Checkable,
    bias: Checkable | None,
    residual: Checkable | None,
    initial_state: Checkable | None,
    cu_seqlens: Checkable | None,
    dilation: int,
    activation: str,
) -> None:
    """As `check_causal_conv1d`; besides, raise for an activation that there is not, a residual that is not like y, or other sequences."""
    check_causal_conv1d(x, weight, bias, dilation)
    _check_sequences(x, weight, initial_state, cu_seqlens, dilation)
    check_activation(activation)
    expected = (x.shape[0], _produced(weight, activation), x.shape[2])
    if residual is not None:
        _check_like("residual", residual, "x", x)
        _check_shape("residual", residual, expected, "the output's")


def check_causal_conv1d_activation_grad(
    grad_y: Checkable,
    x: Checkable,
    weight: Checkable,
    bias: Checkable | None,
    initial_state: Checkable | None,
    cu_seqlens: Checkable | None,
    dilation: int,
    activation: str,
) -> None:
    """As `check_causal_conv1d`; besides, raise for an activation that there is not, a grad_y that is not like y, or other sequences."""
    check_causal_conv1d(x, weight, bias, dilation)
    _check_sequences(x, weight, initial_state, cu_seqlens, dilation)
    check_activation(activation)
    if activation == "none":
        raise ValueError("activation is 'none'; expected one that has a gradient of its own")
    _check_like("grad_y", grad_y, "x", x)
    _check_shape("grad_y", grad_y, (x.shape[0], _produced(weight, activation), x.shape[2]), "the output's")


def check_causal_conv1d_input_grad(
    grad_y: Checkable, weight: Checkable, dilation: int = 1, residual: Checkable | None = None, cu_seqlens: Checkable | None = None
) -> None:
    """Raise ValueError or TypeError unless grad_y (B, C_out, T), weight (C_out, C_in, K) and residual (B, C_in, T) go together."""
    _check_sequence("grad_y", grad_y)
    _check_weight(weight, grad_y, channels=0, of="grad_y's channels (C_out)", name="grad_y")
    check_at_least(1, "dilation", dilation)
    if residual is not None:
        _check_like("residual", residual, "grad_y", grad_y)
        _check_shape("residual", residual, (grad_y.shape[0], weight.shape[1], grad_y.shape[2]), "grad_x's")
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, "grad_y", grad_y)


def check_causal_conv1d_weight_grad(
    grad_y: Checkable, x: Checkable, kernel_size: int, dilation: int = 1, cu_seqlens: Checkable | None = None
) -> None:
    """Raise ValueError or TypeError unless grad_y (B, C_out, T) and x (B, C_in, T) go together."""
    _check_sequence("grad_y", grad_y)
    _check_sequence("x", x)
    _check_like("x", x, "grad_y", grad_y)
    if x.shape[0] != grad_y.shape[0] or x.shape[2] != grad_y.shape[2]:
        raise ValueError(f"x has shape {tuple(x.shape)}; its batch and time must equal those of grad_y, {tuple(grad_y.shape)}")
    check_at_least(1, "kernel_size", kernel_size)
    check_at_least(1, "dilation", dilation)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, "grad_y", grad_y)


def check_byte_causal_conv1d(
    ids: Checkable,
    embedding: Checkable,
    weight: Checkable,
    bias: Checkable | None,
    dilation: int,
    activation: str,
    cu_seqlens: Checkable | None = None,
) -> None:
    """Raise ValueError or TypeError unless ids (B, T), embedding (V, C), weight (C_out, C, K), bias (C_out,) and cu_seqlens go together."""
    check_ids(ids)
    if len(embedding.shape) != 2 or 0 in embedding.shape:
        raise ValueError(f"embedding has shape {tuple(embedding.shape)}; expected 2 dimensions (ids, channels), neither of them 0")
    _check_device("embedding", embedding, "ids", ids)
    _check_dtype("embedding", embedding)
    _check_weight(weight, embedding, channels=1, of="embedding's channels (C)", name="embedding")
    if bias is not None:
        _check_bias(bias, weight, "embedding", embedding)
    check_at_least(1, "dilation", dilation)
    check_activation(activation)
    if _produced(weight, activation) != embedding.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; with activation {activation!r} it makes {_produced(weight, activation)} channels, "
            f"expected those of embedding, {embedding.shape[1]}"
        )
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, "ids", ids)


def check_byte_causal_conv1d_grad(
    grad_y: Checkable,
    ids: Checkable,
    embedding: Checkable,
    weight: Checkable,
    bias: Checkable | None,
    dilation: int,
    activation: str,
    cu_seqlens: Checkable | None = None,
) -> None:
    """As `check_byte_causal_conv1d`; besides, raise ValueError or TypeError for a grad_y that is not like y."""
    check_byte_causal_conv1d(ids, embedding, weight, bias, dilation, activation, cu_seqlens)
    _check_like("grad_y", grad_y, "embedding", embedding)
    _check_shape("grad_y", grad_y, (ids.shape[0], embedding.shape[1], ids.shape[1]), "the output's")


def check_causal_conv1d_update(
    x: Checkable,
    conv_state: Checkable,
    weight: Checkable,
    bias: Checkable | None,
    residual: Checkable | None,
    cache_seqlens: Checkable | None,
    conv_state_indices: Checkable | None,
    dilation: int,
    activation: str,
) -> None:
    """As `check_causal_conv1d_fused`; besides, raise ValueError or TypeError unless conv_state (slots, C_in, (K-1)*d) and the rest fit."""
    check_causal_conv1d(x, weight, bias, dilation)
    check_activation(activation)
    if residual is not None:
        _check_like("residual", residual, "x", x)
        _check_shape("residual", residual, (x.shape[0], _produced(weight, activation), x.shape[2]), "the output's")
    slots = _slots("conv_state", conv_state, x)
    _check_shape("conv_state", conv_state, (slots, x.shape[1], (weight.shape[2] - 1) * dilation), "(slots, C_in, (K-1)*dilation)")
    _check_indices("cache_seqlens", cache_seqlens, x, x.shape[0], "one a row of x")
    _check_slots("conv_state_indices", conv_state_indices, x, "conv_state", slots)


def check_residual_stack_update(
    x: Checkable,
    history: Checkable,
    positions: Checkable,
    slots: Checkable | None,
    weights: Sequence[Checkable],
    biases: Sequence[Checkable],
    dilations: Sequence[int],
    activation: str,
) -> None:
    """Raise ValueError or TypeError unless x (B, C, L), history (slots, sum of (K-1)*d, C), positions (slots,) and the layers fit."""
    _check_sequence("x", x)
    check_activation(activation)
    if not len(weights) == len(biases) == len(dilations):
        raise ValueError(f"there are {len(weights)} weights, {len(biases)} biases, {len(dilations)} dilations; expected as many of each")
    for weight, bias, dilation in zip(weights, biases, dilations, strict=True):
        check_causal_conv1d(x, weight, bias, dilation)
        if _produced(weight, activation) != x.shape[1]:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; expected one that returns the channels of x, {x.shape[1]}")
    count = _slots("history", history, x)
    total = sum((weight.shape[2] - 1) * dilation for weight, dilation in zip(weights, dilations, strict=True))
    _check_shape("history", history, (count, total, x.shape[1]), "(slots, the sum of (K-1)*dilation, C)")
    _check_indices("positions", positions, x, count, "one a slot of history")
    _check_slots("slots", slots, x, "history", count)


def check_embedding_norm(ids: Checkable, embedding: Checkable, weight: Checkable, bias: Checkable, eps: float) -> None:
    """Raise ValueError or TypeError unless ids (B, L) are uint8 or long, embedding is (num_ids, C), and weight and bias (C,)."""
    check_ids(ids)
    _check_device("ids", ids, "embedding", embedding)
    if len(embedding.shape) != 2 or 0 in embedding.shape:
        raise ValueError(f"embedding has shape {tuple(embedding.shape)}; expected (num_ids, C), neither of them 0")
    for name, value in (("weight", weight), ("bias", bias)):
        _check_like(name, value, "embedding", embedding)
        _check_shape(name, value, (embedding.shape[1],), "one value a channel")


CHECKS: dict[str, Callable[..., None]] = {
    "causal_conv1d": check_causal_conv1d,
    "causal_conv1d_fused": check_causal_conv1d_fused,
    "causal_conv1d_activation_grad": check_causal_conv1d_activation_grad,
    "causal_conv1d_input_grad": check_causal_conv1d_input_grad,
    "causal_conv1d_weight_grad": check_causal_conv1d_weight_grad,
    "byte_causal_conv1d": check_byte_causal_conv1d,
    "byte_causal_conv1d_grad": check_byte_causal_conv1d_grad,
    "causal_conv1d_update": check_causal_conv1d_update,
    "residual_stack_update": check_residual_stack_update,
    "embedding_norm": check_embedding_norm,
}


def check_boundaries(cu_seqlens: Tensor, T: int) -> None:
    """Raise ValueError unless the values of `cu_seqlens` begin with 0, never decrease, and end with T. Waits for a GPU to have them."""
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"cu_seqlens begins with {values[0]}; expected 0")
    for n, (start, end) in enumerate(pairwise(values)):
        if start > end:
            raise ValueError(f"cu_seqlens falls from {start} to {end} at number {n + 1}; expected values that never decrease")
    if values[-1] != T:
        raise ValueError(f"cu_seqlens ends with {values[-1]}; expected the time steps of the packed batch, {T}")


def check_ids(ids: Checkable) -> None:
    """Raise ValueError or TypeError unless ids is (B, T), uint8 or int64."""
    if not hasattr(ids, "shape"):
        raise TypeError(f"ids is of type {type(ids).__name__}; expected a tensor (batch, time), as FuzzyTokenizer.encode makes it")
    if len(ids.shape) != 2:
        hint = "; add a batch dimension with unsqueeze(0)" if len(ids.shape) == 1 else ""
        raise ValueError(f"ids has shape {tuple(ids.shape)}; expected 2 dimensions (batch, time){hint}")
    if ids.dtype not in (torch.uint8, torch.long):
        raise TypeError(f"ids has dtype {ids.dtype}; expected uint8 or int64")


def check_lengths(lengths: Checkable, name: str, rows: Checkable) -> None:
    """Raise ValueError or TypeError unless `lengths` is a tensor (B,) of integers, one a row of `rows`."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths is of type {type(lengths).__name__}; expected a tensor ({rows.shape[0]},), one a row of {name}")
    _check_shape("lengths", lengths, (rows.shape[0],), f"one a row of {name}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths has dtype {lengths.dtype}; expected int32 or int64")


def check_activation(activation: str, known: Collection[str] = ACTIVATIONS) -> None:
    """Raise ValueError unless `activation` is one of `known`."""
    if activation not in known:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(map(repr, known))}")


def _produced(weight: Checkable, activation: str) -> int:
    channels = weight.shape[0]
    if activation not in GATES:
        return channels
    if channels % 2 != 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; {activation!r} halves the output channels, which must be even")
    return channels // 2


def _check_sequences(x: Checkable, weight: Checkable, initial_state: Checkable | None, cu_seqlens: Checkable | None, dilation: int) -> None:
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, "x", x)
    if initial_state is not None:
        _check_like("initial_state", initial_state, "x", x)
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        expected = (rows, x.shape[1], (weight.shape[2] - 1) * dilation)
        _check_shape("initial_state", initial_state, expected, "one row a sequence, (K - 1) * dilation steps")


def _check_cu_seqlens(cu_seqlens: Checkable, name: str, x: Checkable) -> None:
    _check_device("cu_seqlens", cu_seqlens, name, x)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; expected torch.int32")
    if len(cu_seqlens.shape) != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected (N + 1,), the boundaries of N sequences")
    if x.shape[0] != 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected a batch of one where cu_seqlens is given: sequences lie end to end")


def _slots(name: str, state: Checkable, x: Checkable) -> int:
    """The slots of a state, which is not cast as other tensors are: it is written in place."""
    _check_device(name, state, "x", x)
    if state.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {state.dtype}; expected the dtype that x has or is cast to, {x.dtype}")
    if len(state.shape) != 3:
        raise ValueError(f"{name} has shape {tuple(state.shape)}; expected 3 dimensions")
    return state.shape[0]


def _check_slots(name: str, indices: Checkable | None, x: Checkable, state: str, slots: int) -> None:
    _check_indices(name, indices, x, x.shape[0], "one a row of x")
    if indices is None and slots != x.shape[0]:
        raise ValueError(f"{state} has {slots} slots and x {x.shape[0]} rows; expected as many, or {name} to say which slot each row has")


def _check_indices(name: str, value: Checkable | None, x: Checkable, count: int, meaning: str) -> None:
    if value is None:
        return
    _check_device(name, value, "x", x)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {value.dtype}; expected int32 or int64")
    _check_shape(name, value, (count,), meaning)


def _check_shape(name: str, value: Checkable, expected: tuple, whose: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {whose}, {expected}")


def _check_sequence(name: str, x: Checkable) -> None:
    if len(x.shape) != 3:
        hint = "; add a batch dimension with unsqueeze(0)" if len(x.shape) == 2 else ""
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected 3 dimensions (batch, channels, time){hint}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected at least one channel")
    _check_dtype(name, x)


def _check_dtype(name: str, x: Checkable) -> None:
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


def _check_bias(bias: Checkable, weight: Checkable, like_name: str, like: Checkable) -> None:
    _check_like("bias", bias, like_name, like)
    if len(bias.shape) != 1 or bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},), one value per output channel of weight")


def _check_device(name: str, value: Checkable, like_name: str, like: Checkable) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; expected the device of {like_name}, {like.device}")


def _check_like(name: str, value: Checkable, like_name: str, like: Checkable) -> None:
    _check_device(name, value, like_name, like)
    if value.dtype != like.dtype:
        raise TypeError(
            f"{name} has dtype {value.dtype}; expected the dtype of {like_name}, {like.dtype} (torch.autocast casts them for you)"
        )


def check_at_least(least: int, name: str, value: int) -> None:
    if not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    if value < least:
        raise ValueError(f"{name} is {value}; expected at least {least}")
