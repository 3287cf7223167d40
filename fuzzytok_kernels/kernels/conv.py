"""The causal dilated convolution (Eq. 2 and 3 of the FuzzyTok paper), forward and input-grad alike.

The input-grad is the same sum with the time shift reversed and the weight's channel axes swapped, so that one kernel a path serves
both ops. Here `c_in` are the channels summed over and `c_out` those produced; `shift` is the dilation, negative for the input-grad.
"""

import triton
import triton.language as tl

from fuzzytok_kernels.kernels.dot import dot


@triton.jit(do_not_specialize=["B", "shift"])
def conv_tma_kernel(
    x, weight, bias, y, B, T, c_in, c_out, shift, stride_bias,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, IN_LAST: tl.constexpr, Y_CHANNELS_LAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr,
):  # fmt: skip
    """Persistent over output tiles. Descriptors: x [B, T, C_in], weight [K, C_out, C_in] (IN_LAST) or [K, C_in, C_out].

    y is a descriptor [B, T, C_out] (Y_CHANNELS_LAST) or a pointer to contiguous [B, C_out, T].
    """
    n_ci, n_co, n_t = tl.cdiv(c_in, BLOCK_C_IN), tl.cdiv(c_out, BLOCK_C_OUT), tl.cdiv(T, BLOCK_T)
    for tile in tl.range(tl.program_id(0), B * n_t * n_co, tl.num_programs(0), flatten=True):
        co = tile % n_co * BLOCK_C_OUT
        t = tile // n_co % n_t * BLOCK_T
        b = tile // n_co // n_t
        acc = tl.zeros([BLOCK_T, BLOCK_C_OUT], tl.float32)
        for i in range(K * n_ci):
            k = i % K  # taps innermost: the rows of one channel block are read again while hot (46.4 -> 41.7 us at C=256 on an H100)
            ci = i // K * BLOCK_C_IN
            rows = x.load([b, t - k * shift, ci]).reshape(BLOCK_T, BLOCK_C_IN)  # zeros outside 0 <= t < T, by the hardware
            if IN_LAST:
                tap = weight.load([k, co, ci]).reshape(BLOCK_C_OUT, BLOCK_C_IN).T  # [C_in, C_out]
            else:
                tap = weight.load([k, ci, co]).reshape(BLOCK_C_IN, BLOCK_C_OUT)
            acc = dot(rows, tap, acc, PRECISION)  # [T, C_out]
        if HAS_BIAS:
            o = co + tl.arange(0, BLOCK_C_OUT).to(tl.int64)
            acc += tl.load(bias + o * stride_bias, mask=o < c_out, other=0.0).to(tl.float32)[None, :]
        if Y_CHANNELS_LAST:
            # Stored in two halves: half the shared memory, so that two programs fit a multiprocessor.
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_T, 2, BLOCK_C_OUT // 2)), (0, 2, 1)))
            y.store([b, t, co], left.to(y.dtype).reshape(1, BLOCK_T, BLOCK_C_OUT // 2))
            y.store([b, t, co + BLOCK_C_OUT // 2], right.to(y.dtype).reshape(1, BLOCK_T, BLOCK_C_OUT // 2))
        else:
            steps, o = t + tl.arange(0, BLOCK_T), co + tl.arange(0, BLOCK_C_OUT)
            out = y + (b.to(tl.int64) * c_out + o[None, :]) * T + steps[:, None]  # [T, C_out]
            tl.store(out, acc.to(y.dtype.element_ty), mask=(steps < T)[:, None] & (o < c_out)[None, :])


@triton.jit(do_not_specialize=["shift"])
def conv_pointer_kernel(
    x, weight, bias, y, T, c_in, c_out, shift, stride_bias,
    stride_xb, stride_xc, stride_xt, stride_wk, stride_wo, stride_wi, stride_yb, stride_yc, stride_yt,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr,
):  # fmt: skip
    """One output tile a program, any strides and any alignment; offsets are 64-bit, one grid axis counts all tiles."""
    n_co, n_t = tl.cdiv(c_out, BLOCK_C_OUT), tl.cdiv(T, BLOCK_T)
    tile = tl.program_id(0)
    o = tile % n_co * BLOCK_C_OUT + tl.arange(0, BLOCK_C_OUT).to(tl.int64)
    t = tile // n_co % n_t * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    b = (tile // n_co // n_t).to(tl.int64)
    acc = tl.zeros([BLOCK_T, BLOCK_C_OUT], tl.float32)
    for i in range(K * tl.cdiv(c_in, BLOCK_C_IN)):
        k = i % K  # taps innermost, as above
        c = i // K * BLOCK_C_IN + tl.arange(0, BLOCK_C_IN).to(tl.int64)
        source = t - k * tl.cast(shift, tl.int64)
        causal = (source >= 0) & (source < T)  # Eq. 7; the upper end is the input-grad's
        clamped = tl.where(causal, source, 0)  # Eq. 8: no address outside the tensor is ever formed
        rows = tl.load(  # [T, C_in]
            x + b * stride_xb + clamped[:, None] * stride_xt + c[None, :] * stride_xc,
            mask=causal[:, None] & (c < c_in)[None, :],
            other=0.0,
        )
        tap = tl.load(  # [C_in, C_out]
            weight + k * tl.cast(stride_wk, tl.int64) + c[:, None] * stride_wi + o[None, :] * stride_wo,
            mask=(c < c_in)[:, None] & (o < c_out)[None, :],
            other=0.0,
        )
        acc = dot(rows, tap, acc, PRECISION)  # [T, C_out]
    if HAS_BIAS:
        acc += tl.load(bias + o * stride_bias, mask=o < c_out, other=0.0).to(tl.float32)[None, :]
    out = y + b * stride_yb + t[:, None] * stride_yt + o[None, :] * stride_yc
    tl.store(out, acc.to(y.dtype.element_ty), mask=(t < T)[:, None] & (o < c_out)[None, :])
