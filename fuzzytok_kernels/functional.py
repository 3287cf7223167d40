"""The public functions."""

from torch import Tensor

from fuzzytok_kernels import ops


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Dense causal dilated 1-D convolution, Eq. 2 and 3 of the FuzzyTok paper, and what follows it in a block: in one kernel.

    `y = residual + activation(p)`, where `p[b,o,t] = bias[o] + sum_c sum_k weight[o,c,k] * x[b,c,t - k*dilation]` and x before t = 0
    counts as 0.

    Args:
        x: (B, C_in, T), any strides; fp16, bf16, fp32, and on the CPU fp64.
        weight: (C_out, C_in, K) in the dtype of x; tap 0 is the present (`torch.nn.Conv1d` orders taps the other way round).
        bias: (C_out,) in the dtype of x, or None.
        dilation: steps between taps, at least 1.
        activation: None, "relu", "silu", "gelu" (exact, by erf), "gelu_tanh", or a gate: "glu", "tanh_sigmoid" (WaveNet's), for which the
            first half of the output channels are values and the second half lets them through, by its sigmoid.
        residual: (B, C, T) in the dtype of x, or None; C is C_out, or half of it for a gate. It may be x itself.

    Returns:
        (B, C, T) in the dtype of x: channels-last in memory if `x.stride(1) == 1 and x.stride(2) != 1`, else contiguous.

    With an activation, the backward computes p anew instead of keeping it, as long as C_in * K is below 2,048; from there on p is kept.

    Raises:
        ValueError: a rank, size or device that does not fit, or another activation.
        TypeError: mixed dtypes outside autocast, integers, or a dtype that the device cannot do.
    """
    if activation is None and residual is None:
        return ops.causal_conv1d(x, weight, bias, dilation)
    return ops.causal_conv1d_fused(x, weight, bias, residual, dilation, "none" if activation is None else activation)
