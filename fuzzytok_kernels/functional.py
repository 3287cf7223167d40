"""The public functions."""

from typing import Any

from torch import Tensor

from fuzzytok_kernels import ops
from fuzzytok_kernels.sequences import last_steps


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
