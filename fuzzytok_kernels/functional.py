"""The public functions."""

from torch import Tensor

from fuzzytok_kernels import ops


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1) -> Tensor:
    """Dense causal dilated 1-D convolution, Eq. 2 and 3 of the FuzzyTok paper.

    `y[b,o,t] = bias[o] + sum_c sum_k weight[o,c,k] * x[b,c,t - k*dilation]`, where x before t = 0 counts as 0.

    Args:
        x: (B, C_in, T), any strides; fp16, bf16, fp32, and on the CPU fp64.
        weight: (C_out, C_in, K) in the dtype of x; tap 0 is the present (`torch.nn.Conv1d` orders taps the other way round).
        bias: (C_out,) in the dtype of x, or None.
        dilation: steps between taps, at least 1.

    Returns:
        (B, C_out, T) in the dtype of x: channels-last in memory if `x.stride(1) == 1 and x.stride(2) != 1`, else contiguous.

    Raises:
        ValueError: a rank, size or device that does not fit.
        TypeError: mixed dtypes outside autocast, integers, or a dtype that the device cannot do.
    """
    return ops.causal_conv1d(x, weight, bias, dilation)
