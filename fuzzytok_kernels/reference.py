"""What every op means, in plain PyTorch: the oracle of the tests, and the implementation on CPU.

Eq. 2 and 3 of the FuzzyTok paper: `y[b,o,t] = bias[o] + sum_c sum_k weight[o,c,k] * x[b,c,t - k*d]`, x being 0 before t = 0.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fuzzytok_kernels.layout import empty_output, empty_weight, in_layout_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # of the pre-activation (B, C_out, T)
    "none": lambda p: p,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "glu": partial(F.glu, dim=1),
    "tanh_sigmoid": lambda p: torch.tanh(p.chunk(2, 1)[0]) * torch.sigmoid(p.chunk(2, 1)[1]),
}
GATES = ("glu", "tanh_sigmoid")  # these halve the channels: the first half are values, the second lets them through


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """x (B, C_in, T), weight (C_out, C_in, K), bias (C_out,) -> y (B, C_out, T)."""
    out = empty_output(x, weight.shape[0])
    if x.numel() == 0:
        return out
    dilation = min(dilation, x.shape[2])  # a tap further back than T sees zeros alone
    history = (weight.shape[2] - 1) * dilation
    y = F.conv2d(F.pad(_image(x), (history, 0)), _image(weight.flip(2)), bias, dilation=(1, dilation))
    return in_layout_of(out, y.squeeze(2))


def causal_conv1d_fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dilation: int,
    activation: str,
) -> Tensor:
    """x (B, C_in, T), weight (C_out, C_in, K), bias (C_out,), residual (B, C, T) -> y (B, C, T); C is C_out, or half of it for a gate.

    `y = residual + activation(p)`, where p is the `causal_conv1d` of each sequence behind its initial state (N, C_in, (K - 1) * dilation).
    """
    channels = weight.shape[0] // 2 if activation in GATES else weight.shape[0]
    y = activated(_convolved(x, weight, bias, initial_state, cu_seqlens, dilation), residual, activation)
    return in_layout_of(empty_output(x, channels), y)


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, dilation: int
) -> Tensor:
    if (initial_state is None and cu_seqlens is None) or x.numel() == 0:
        return causal_conv1d(x, weight, bias, dilation)
    dilation = _within(cu_seqlens, dilation) if initial_state is None else dilation
    history = (weight.shape[2] - 1) * dilation
    return _apart(causal_conv1d(_behind(x, history, initial_state, cu_seqlens), weight, bias, dilation), history, cu_seqlens)


def activated(p: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """What follows the pre-activation p (B, C_out, T), by functions that PyTorch can differentiate."""
    y = ACTIVATIONS[activation](p)
    return y if residual is None else residual + y


def causal_conv1d_activation_grad(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dilation: int,
    activation: str,
) -> Tensor:
    """grad_y (B, C, T), x (B, C_in, T), weight (C_out, C_in, K), bias (C_out,) -> the gradient (B, C_out, T) before the activation."""
    grad_p = activation_grad(grad_y, _convolved(x, weight, bias, initial_state, cu_seqlens, dilation), activation)
    return in_layout_of(empty_output(x, weight.shape[0]), grad_p)


def activation_grad(grad_y: Tensor, p: Tensor, activation: str) -> Tensor:
    """The gradient of `p` from that of `ACTIVATIONS[activation](p)`, by functions that PyTorch can differentiate again."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad_y, p, 0)
    if activation in ("gelu", "gelu_tanh"):
        return torch.ops.aten.gelu_backward(grad_y, p, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "glu":
        return torch.ops.aten.glu_backward(grad_y, p, 1)
    wide = p.to(torch.promote_types(p.dtype, torch.float32))
    if activation == "silu":  # aten::silu_backward has no derivative on every version
        return (grad_y * torch.sigmoid(wide) * (1 + wide * torch.sigmoid(-wide))).to(p.dtype)
    if activation == "tanh_sigmoid":
        value, by = wide.chunk(2, 1)
        value, gate, rest = torch.tanh(value), torch.sigmoid(by), torch.sigmoid(-by)
        return torch.cat([grad_y * gate * (1 - value * value), grad_y * value * gate * rest], 1).to(p.dtype)
    return grad_y


def causal_conv1d_input_grad(
    grad_y: Tensor, weight: Tensor, dilation: int = 1, residual: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """grad_y (B, C_out, T), weight (C_out, C_in, K), residual (B, C_in, T) -> grad_x (B, C_in, T).

    `grad_x[b,c,t] = residual[b,c,t] + sum_o sum_k weight[o,c,k] * grad_y[b,o,t + k*d]`, grad_y being 0 from the sequence's end on.
    """
    (B, _, T), (_, c_in, K) = grad_y.shape, weight.shape
    out = empty_output(grad_y, c_in)
    if grad_y.numel() == 0:
        return out
    if cu_seqlens is not None:
        dilation = _within(cu_seqlens, dilation)
        history = (K - 1) * dilation
        grad_x = _apart(causal_conv1d_input_grad(_behind(grad_y, history, None, cu_seqlens), weight, dilation), history, cu_seqlens)
        return in_layout_of(out, grad_x if residual is None else grad_x + residual)
    dilation = min(dilation, T)
    history = (K - 1) * dilation
    padded = conv2d_input((B, c_in, 1, T + history), _image(weight.flip(2)), _image(grad_y), dilation=(1, dilation))
    grad_x = padded[:, :, 0, history:]
    return in_layout_of(out, grad_x if residual is None else grad_x + residual)


def causal_conv1d_weight_grad(
    grad_y: Tensor, x: Tensor, kernel_size: int, dilation: int = 1, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """grad_y (B, C_out, T), x (B, C_in, T) -> grad_weight (C_out, C_in, K), grad_bias (C_out,).

    `grad_weight[o,c,k] = sum_b sum_t grad_y[b,o,t] * x[b,c,t - k*d]`, `grad_bias[o] = sum_b sum_t grad_y[b,o,t]`.
    """
    c_out, c_in = grad_y.shape[1], x.shape[1]
    out = empty_weight(x, c_out, c_in, kernel_size)
    if x.numel() == 0:
        return out.zero_(), x.new_zeros(c_out)
    if cu_seqlens is not None:
        dilation = _within(cu_seqlens, dilation)
        history = (kernel_size - 1) * dilation
        grad_y, x = (_behind(value, history, None, cu_seqlens) for value in (grad_y, x))
    dilation = min(dilation, x.shape[2])
    history = (kernel_size - 1) * dilation
    padded = F.pad(_image(x), (history, 0))
    grad_weight = conv2d_weight(padded, (c_out, c_in, 1, kernel_size), _image(grad_y), dilation=(1, dilation))
    return in_layout_of(out, grad_weight.squeeze(2).flip(2)), grad_y.sum((0, 2))


def _behind(x: Tensor, history: int, past: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """x (B, C, T) with `history` steps put before each sequence, those of `past` (N, C, history) or zeros, so that it sees no other one."""
    if cu_seqlens is None:
        assert past is not None
        return torch.cat([past, x], 2)
    lengths = cu_seqlens.diff().tolist()
    pasts = [x.new_zeros(1, x.shape[1], history)] * len(lengths) if past is None else past.split(1)
    return torch.cat([steps for pair in zip(pasts, x.split(lengths, 2), strict=True) for steps in pair], 2)


def _apart(y: Tensor, history: int, cu_seqlens: Tensor | None) -> Tensor:
    """y without the `history` steps that `_behind` put before each sequence."""
    if cu_seqlens is None:
        return y[:, :, history:]
    lengths = [steps for length in cu_seqlens.diff().tolist() for steps in (history, length)]
    return torch.cat(y.split(lengths, 2)[1::2], 2)


def _within(cu_seqlens: Tensor | None, dilation: int) -> int:
    """`dilation`, or the longest sequence: a tap further back than that sees zeros alone."""
    return dilation if cu_seqlens is None else min(dilation, int(cu_seqlens.diff().max()))


def byte_causal_conv1d(
    ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, activation: str, cu_seqlens: Tensor | None = None
) -> Tensor:
    """ids (B, T), embedding (V, C), weight (C_out, C, K), bias (C_out,) -> y (B, C, T), channels-last; C is C_out, or half for a gate.

    `y[b,:,t] = e + activation(p)`, where e is `embedding[ids[b,t]]` and p `causal_conv1d` over the embeddings of all ids of the row, or
    of its sequence: sequence i is steps `cu_seqlens[i]` to `cu_seqlens[i + 1] - 1` of a batch of one.
    """
    check_range(ids, len(embedding))
    return looked_up(ids, embedding, weight, bias, dilation, activation, cu_seqlens)


def byte_causal_conv1d_grad(
    grad_y: Tensor, ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor | None,
    dilation: int, activation: str, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """grad_y (B, C, T) and the arguments of `byte_causal_conv1d` -> the gradients of embedding, weight and bias."""
    check_range(ids, len(embedding))
    return looked_up_grads(grad_y, ids, embedding, weight, bias, dilation, activation, cu_seqlens)


def check_range(ids: Tensor, num_ids: int) -> None:
    """Raise IndexError for an id on the CPU that has no row; on a GPU that would wait for it, and the kernel makes NaN of such a step."""
    if ids.device.type == "cpu" and ids.numel() and not 0 <= ids.min().item() <= ids.max().item() < num_ids:
        raise IndexError(f"ids reach from {ids.min()} to {ids.max()}; expected 0 to {num_ids - 1}")


def looked_up(
    ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, activation: str, cu_seqlens: Tensor | None = None
) -> Tensor:
    """`byte_causal_conv1d` by functions that PyTorch can differentiate, rounded once, in the end."""
    p = _looked_up_sum(_table(embedding, weight), _sources(ids, weight.shape[2], dilation, cu_seqlens), bias)
    y = F.embedding(ids.long(), _wide(embedding)) + ACTIVATIONS[activation](p.mT).mT
    return y.to(embedding.dtype).contiguous().mT


def looked_up_grads(
    grad_y: Tensor, ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor | None,
    dilation: int, activation: str, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`byte_causal_conv1d_grad` by functions that PyTorch can differentiate again."""
    sources = _sources(ids, weight.shape[2], dilation, cu_seqlens)
    p = _looked_up_sum(_table(embedding, weight), sources, bias).mT
    return summed_by_id(activation_grad(_wide(grad_y), p, activation), _wide(grad_y), ids, embedding, weight, sources)


def summed_by_id(
    grad_p: Tensor, grad_e: Tensor, ids: Tensor, embedding: Tensor, weight: Tensor, sources: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of embedding, weight and bias from those of the pre-activation (B, C_out, T) and of the embeddings (B, C, T)."""

    def by_id(grad: Tensor, ids: Tensor) -> Tensor:
        return torch.ops.aten.embedding_dense_backward(grad, ids, len(embedding), -1, False)

    grad_table = torch.stack([by_id(torch.where(seen, grad_p.mT, 0.0), at) for at, seen in sources], 1)  # (V, K, C_out)
    grad_embedding = by_id(grad_e.mT, ids.long()) + torch.einsum("vko,oik->vi", grad_table, _wide(weight))
    grad_weight = torch.einsum("vko,vi->koi", grad_table, _wide(embedding)).contiguous().permute(1, 2, 0)  # tap-major, see empty_weight
    grads = grad_embedding.contiguous(), grad_weight, grad_table[:, 0].sum(0)
    return tuple(grad.to(embedding.dtype) for grad in grads)  # type: ignore[return-value]


def _table(embedding: Tensor, weight: Tensor) -> Tensor:
    """What each tap makes of each id: embedding (V, C_in), weight (C_out, C_in, K) -> (V, K, C_out), in at least fp32."""
    return torch.einsum("vi,oik->vko", _wide(embedding), _wide(weight))


def _looked_up_sum(table: Tensor, sources: list[tuple[Tensor, Tensor]], bias: Tensor | None) -> Tensor:
    """The pre-activation (B, T, C_out)."""
    p: Any = 0 if bias is None else bias
    for k, (ids, seen) in enumerate(sources):
        p = p + torch.where(seen, F.embedding(ids, table[:, k]), 0.0)
    return p


def _sources(ids: Tensor, kernel_size: int, dilation: int, cu_seqlens: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """For each tap the ids (B, T) that it reads, and at which steps (T, 1) there is one."""
    T = ids.shape[1]
    steps = torch.arange(T, device=ids.device)
    first = torch.zeros_like(steps)
    if cu_seqlens is not None:
        first = cu_seqlens.long()[torch.searchsorted(cu_seqlens.long(), steps, right=True) - 1]
    sources = [steps - k * min(dilation, T) for k in range(kernel_size)]
    return [(ids[:, source.clamp(min=0)].long(), (source >= first)[:, None]) for source in sources]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _image(x: Tensor) -> Tensor:
    """(B, C, T) as an image of height 1: PyTorch's 2-D convolution takes channels-last as it is, its 1-D one copies (1.8x on a CPU)."""
    return x.unsqueeze(2)
