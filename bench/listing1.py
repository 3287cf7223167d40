"""The two forward kernels of the FuzzyTok paper's Table 1, rebuilt from its Listing 1: tiled over channels by 32, and not tiled.

Rivals, no part of the package. Channels-first, one output tile a program, Eq. 7 and 8 for causality, forward only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["dilation"])  # one compilation for all: the untiled one takes a quarter of a minute
def conv_kernel(
    x, weight, bias, y, c_in, c_out, T, dilation,
    stride_xb, stride_xc, stride_xt, stride_wo, stride_wi, stride_wk, stride_yb, stride_yc, stride_yt,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C_OUT: tl.constexpr, BLOCK_C_IN: tl.constexpr,
):  # fmt: skip
    """x (B, C_in, T), weight (C_out, C_in, K), bias (C_out,) -> y (B, C_out, T), any strides; 32-bit offsets, as in the paper."""
    b = tl.program_id(0)
    o = tl.program_id(1) * BLOCK_C_OUT + tl.arange(0, BLOCK_C_OUT)
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    acc = tl.zeros([BLOCK_C_OUT, BLOCK_T], tl.float32)
    for first in range(0, c_in, BLOCK_C_IN):
        c = first + tl.arange(0, BLOCK_C_IN)
        for k in tl.static_range(K):
            source = t - k * dilation
            causal = source >= 0
            values = tl.load(  # [C_in, T]
                x + b * stride_xb + c[:, None] * stride_xc + tl.where(causal, source, 0)[None, :] * stride_xt,
                mask=(c < c_in)[:, None] & (causal & (t < T))[None, :],
                other=0.0,
            )
            tap = tl.load(  # [C_out, C_in]
                weight + o[:, None] * stride_wo + c[None, :] * stride_wi + k * stride_wk,
                mask=(o < c_out)[:, None] & (c < c_in)[None, :],
                other=0.0,
            )
            acc += tl.dot(tap, values)
    acc += tl.load(bias + o, mask=o < c_out, other=0.0).to(tl.float32)[:, None]
    out = y + b * stride_yb + o[:, None] * stride_yc + t[None, :] * stride_yt
    tl.store(out, acc.to(y.dtype.element_ty), mask=(o < c_out)[:, None] & (t < T)[None, :])


def tiled(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """Listing 1 with tiles of 32 in all three axes."""
    return _launch(x, weight, bias, dilation, 32, 32, num_stages=3)


def naive(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """The same with all channels in one tile. Its tiles leave no room to load ahead, so that it has one stage."""
    c_out, c_in, _ = weight.shape
    block_out, block_in = (max(16, triton.next_power_of_2(channels)) for channels in (c_out, c_in))  # 16 is the least of tl.dot
    return _launch(x, weight, bias, dilation, block_out, block_in, num_stages=1)


def _launch(x: Tensor, weight: Tensor, bias: Tensor, dilation: int, block_out: int, block_in: int, num_stages: int) -> Tensor:
    (B, c_in, T), (c_out, _, K) = x.shape, weight.shape
    y = torch.empty(B, c_out, T, dtype=x.dtype, device=x.device)
    conv_kernel[(B, triton.cdiv(c_out, block_out), triton.cdiv(T, 32))](
        x, weight, bias, y, c_in, c_out, T, dilation, *x.stride(), *weight.stride(), *y.stride(),
        K=K, BLOCK_T=32, BLOCK_C_OUT=block_out, BLOCK_C_IN=block_in, num_warps=4, num_stages=num_stages,
    )  # fmt: skip
    return y
