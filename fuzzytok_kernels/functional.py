"""The public functions."""

from typing import Any

from torch import Tensor

from fuzzytok_kernels import ops
from fuzzytok_kernels.sequences import last_steps
from fuzzytok_kernels.streaming import ops as streaming_ops


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:
    """Dense causal dilated 1-D convolution, Eq. 2 and 3 of the FuzzyTok paper, and what follows it in a block: in one kernel.

    `y = residual + activation(p)`, where `p[b,o,t] = bias[o] + sum_c sum_k weight[o,c,k] * x[b,c,t - k*dilation]` and x before t = 0
    counts as 0, or is the initial state.

    Args:
        x: (B, C_in, T), any strides; fp16, bf16, fp32, and on the CPU fp64.
        weight: (C_out, C_in, K) in the dtype of x; tap 0 is the present (`torch.nn.Conv1d` orders taps the other way round).
        bias: (C_out,) in the dtype of x, or None.
        dilation: steps between taps, at least 1.
        activation: None, "relu", "silu", "gelu" (exact, by erf), "gelu_tanh", or a gate: "glu", "tanh_sigmoid" (WaveNet's), for which the
            first half of the output channels are values and the second half lets them through, by its sigmoid.
        residual: (B, C, T) in the dtype of x, or None; C is C_out, or half of it for a gate. It may be x itself.
        initial_state: (B, C_in, (K - 1) * dilation) in the dtype of x, the steps of x before t = 0, the oldest first; or None for zeros.
            Where sequences are packed, (N, C_in, (K - 1) * dilation), a row for each.
        cu_seqlens: (N + 1,) int32 on the device of x, from 0 to T, or None. N sequences then lie end to end in a batch of one,
            x (1, C_in, T), without padding: the n-th is the steps from `cu_seqlens[n]` to `cu_seqlens[n + 1]`, maybe none, and sees no
            other.
        return_final_state: whether the state behind the last step is returned too: the last (K - 1) * dilation steps of the initial state
            (or zeros) and x together, for each sequence; as the initial state of what follows it goes on where this ended.

    Returns:
        (B, C, T) in the dtype of x: channels-last in memory if `x.stride(1) == 1 and x.stride(2) != 1`, else contiguous. With
        return_final_state, this and the state, of the shape of initial_state. Both are differentiable.

    With an activation, the backward computes p anew instead of keeping it, as long as C_in * K is below 2,048; from there on p is kept.

    Raises:
        ValueError: a rank, size or device that does not fit, or another activation. On the CPU, `cu_seqlens` that does not begin with 0,
            decreases, or does not end with T; on a GPU, where a check would wait for it, that is a device-side assertion.
        TypeError: mixed dtypes outside autocast, integers, or a dtype that the device cannot do.
    """
    if activation is None and residual is None and initial_state is None and cu_seqlens is None:
        y = ops.causal_conv1d(x, weight, bias, dilation)
    else:
        activation = "none" if activation is None else activation
        y = ops.causal_conv1d_fused(x, weight, bias, residual, initial_state, cu_seqlens, dilation, activation)
    if not return_final_state:
        return y
    return y, last_steps(x, (weight.shape[2] - 1) * dilation, initial_state, cu_seqlens)


def byte_causal_conv1d(
    ids: Tensor,
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The first residual block of a byte model, its embedding included: look-ups, and no product over time.

    `y[b,:,t] = e[b,:,t] + activation(p[b,:,t])`, where `e[b,:,t] = embedding[ids[b,t]]` and p is `causal_conv1d(e, weight, bias)`. As e
    depends on the id alone, so does what each tap makes of it: a product over the V rows gives a table, and p is K look-ups in it.

    Args:
        ids: (B, T), any strides; uint8 or int64, from 0 to V - 1.
        embedding: (V, C), one row an id, normalised already where the model does so; fp16, bf16, fp32, and on the CPU fp64.
        weight: (C_out, C, K) in the dtype of embedding; tap 0 is the present. C_out is C, or 2 * C for a gate.
        bias: (C_out,) in the dtype of embedding, or None.
        dilation: steps between taps, at least 1.
        activation: as of `causal_conv1d`.
        cu_seqlens: (N + 1,) int32, for a batch of one in which N sequences lie end to end: sequence i is steps `cu_seqlens[i]` to
            `cu_seqlens[i + 1] - 1`, and sees nothing of the others. It begins with 0, ends with T and never decreases.

    Returns:
        (B, C, T) in the dtype of embedding, channels-last in memory.

    The backward keeps the arguments alone and sums by id in a fixed order. Products are strict, whatever PyTorch's TF32 switches say.

    Raises:
        ValueError: a rank, size or device that does not fit, or another activation.
        TypeError: mixed dtypes outside autocast, or a dtype that the device cannot do.
        IndexError: on the CPU, an id that has no row. On a GPU a check would wait for it: there y is NaN at such a step.
    """
    return ops.byte_causal_conv1d(ids, embedding, weight, bias, dilation, "none" if activation is None else activation, cu_seqlens)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d` of the next steps of a stream: x behind the steps that conv_state holds, which is updated in place. For inference.

    Call by call it returns what `causal_conv1d` returns on all the steps at once, to rounding, if the state began with zeros.

    Args:
        x: (B, C_in, L), L >= 0 new steps, or (B, C_in) for one; fp16, bf16, fp32, and on the CPU fp64.
        conv_state: (slots, C_in, (K-1)*dilation) in the dtype of x: the last inputs of each slot, zeros at the start.
        weight, bias, dilation, activation: as of `causal_conv1d`.
        residual: (B, C, L), or (B, C) where x is (B, C_in), or None.
        cache_seqlens: (B,) int32 or int64, the number of steps of each row before this call (the caller counts them on). With it the
            state is circular: step s lies at `s % ((K-1)*dilation)`, and a call writes new steps alone. None: oldest first, and a call
            moves the whole state.
        conv_state_indices: (B,) int32 or int64, the slot of each row, no slot twice; None: slot b for row b. A row whose index is no
            slot, by custom -1, is empty: no state changes, and its output is zeros.

    Returns:
        (B, C, L), or (B, C) where x is (B, C_in), as `causal_conv1d` lays it out.

    Everything that changes from call to call lies in tensors on the device: a captured CUDA graph can be replayed.

    Raises:
        ValueError: a rank, size or device that does not fit, or another activation.
        TypeError: mixed dtypes; under autocast what is read is cast, but conv_state must already have that dtype.
        RuntimeError: grad mode is on and a tensor requires grad. There is no derivative.
    """
    one = x.dim() == 2
    if one:
        x, residual = x.unsqueeze(2), residual if residual is None else residual.unsqueeze(-1)
    kind = "none" if activation is None else activation
    y = streaming_ops.causal_conv1d_update(x, conv_state, weight, bias, residual, cache_seqlens, conv_state_indices, dilation, kind)
    return y.squeeze(2) if one else y
