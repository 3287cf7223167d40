"""The weight- and bias-grad of the causal dilated convolution, deterministic: partial sums, then one reduction in a fixed order.

Each program sums one slice of B * T for one tap and one tile of `grad_weight`. Of its slice it adds one share to the bias's sum, on
the tensor cores, as a product with ones: all programs that read the same `grad_y` share that work (a sum in registers, by one of them,
took 157 us where this takes 46, at C=256 on an H100). `partial`, fp32, holds [splits, K, C_out, C_in] and behind it the
bias's [splits, shares, C_out], with one share for each tap and block of input channels.
"""

import triton
import triton.language as tl

from fuzzytok_kernels.kernels.dot import dot


@triton.jit(do_not_specialize=["B", "shift", "n_splits"])
def weight_grad_tma_kernel(
    grad_y, x, partial, B, T, c_in, c_out, shift, n_splits, n_weight,
    K: tl.constexpr, PRECISION: tl.constexpr, GRAD_Y_CHANNELS_LAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr,
):  # fmt: skip
    """Descriptors: grad_y [B, T, C_out] (GRAD_Y_CHANNELS_LAST) or [B, C_out, T], which is not shifted; x [B, T, C_in], which is."""
    n_t = tl.cdiv(T, BLOCK_T)
    k, ci, co, split, first, last, share, share_first, share_last = _slice(
        B * n_t, c_in, c_out, n_splits, K, BLOCK_C_IN, BLOCK_C_OUT
    )  # fmt: skip
    acc = tl.zeros([BLOCK_C_OUT, BLOCK_C_IN], tl.float32)
    bias_acc = tl.zeros([BLOCK_C_OUT, 16], tl.float32)
    ones = tl.full([BLOCK_T, 16], 1.0, grad_y.dtype)
    for i in range(first, last):
        b, t = i // n_t, i % n_t * BLOCK_T
        if GRAD_Y_CHANNELS_LAST:
            dy = grad_y.load([b, t, co]).reshape(BLOCK_T, BLOCK_C_OUT).T  # [C_out, T], zeros from T on
        else:
            dy = grad_y.load([b, co, t]).reshape(BLOCK_C_OUT, BLOCK_T)
        rows = x.load([b, t - k * shift, ci]).reshape(BLOCK_T, BLOCK_C_IN)  # [T, C_in], zeros before t = 0, by the hardware
        acc = dot(dy, rows, acc, PRECISION)  # [C_out, C_in]
        if (i >= share_first) & (i < share_last):
            bias_acc = _add_rows(dy, ones, bias_acc, PRECISION)
    _store_partial(acc, bias_acc, partial, k, ci, co, split, share, c_in, c_out, n_splits, n_weight, K, BLOCK_C_IN, BLOCK_C_OUT)


@triton.jit(do_not_specialize=["B", "shift", "n_splits"])
def weight_grad_pointer_kernel(
    grad_y, x, partial, B, T, c_in, c_out, shift, n_splits, n_weight,
    stride_yb, stride_yc, stride_yt, stride_xb, stride_xc, stride_xt,
    K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr,
):  # fmt: skip
    """Any strides and any alignment; offsets are 64-bit."""
    n_t = tl.cdiv(T, BLOCK_T)
    k, ci, co, split, first, last, share, share_first, share_last = _slice(
        B * n_t, c_in, c_out, n_splits, K, BLOCK_C_IN, BLOCK_C_OUT
    )  # fmt: skip
    o = co + tl.arange(0, BLOCK_C_OUT).to(tl.int64)
    c = ci + tl.arange(0, BLOCK_C_IN).to(tl.int64)
    acc = tl.zeros([BLOCK_C_OUT, BLOCK_C_IN], tl.float32)
    bias_acc = tl.zeros([BLOCK_C_OUT, 16], tl.float32)
    ones = tl.full([BLOCK_T, 16], 1.0, grad_y.dtype.element_ty)
    for i in range(first, last):
        b = (i // n_t).to(tl.int64)
        t = i % n_t * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        source = t - k * tl.cast(shift, tl.int64)
        causal = (source >= 0) & (source < T)  # Eq. 7
        clamped = tl.where(causal, source, 0)  # Eq. 8
        dy = tl.load(  # [T, C_out]
            grad_y + b * stride_yb + t[:, None] * stride_yt + o[None, :] * stride_yc,
            mask=(t < T)[:, None] & (o < c_out)[None, :],
            other=0.0,
        ).T  # [C_out, T]
        rows = tl.load(  # [T, C_in]
            x + b * stride_xb + clamped[:, None] * stride_xt + c[None, :] * stride_xc,
            mask=causal[:, None] & (c < c_in)[None, :],
            other=0.0,
        )
        acc = dot(dy, rows, acc, PRECISION)  # [C_out, C_in]
        if (i >= share_first) & (i < share_last):
            bias_acc = _add_rows(dy, ones, bias_acc, PRECISION)
    _store_partial(acc, bias_acc, partial, k, ci, co, split, share, c_in, c_out, n_splits, n_weight, K, BLOCK_C_IN, BLOCK_C_OUT)


@triton.jit(do_not_specialize=["n_splits", "n_shares"])
def reduce_partials_kernel(
    partial, grad_weight, grad_bias, n_weight, n_bias, n_splits, n_shares, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Sum the weight's n_splits rows and the bias's n_splits * n_shares rows in a fixed order; cast to the outputs' dtype."""
    pid = tl.program_id(0)
    weight_programs = tl.cdiv(n_weight, BLOCK_COLUMNS)
    if pid < weight_programs:
        _sum_rows(partial, grad_weight, pid, n_weight, n_splits, BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        bias_partial = partial + tl.cast(n_splits, tl.int64) * n_weight
        _sum_rows(bias_partial, grad_bias, pid - weight_programs, n_bias, n_splits * n_shares, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def _sum_rows(rows, out, block, n, count, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    column = block.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    totals = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)  # summed over once, in the end
    for first in range(0, count, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        totals += tl.load(rows + row[:, None] * n + column[None, :], mask=(row < count)[:, None] & (column < n)[None, :], other=0.0)
    tl.store(out + column, tl.sum(totals, axis=0).to(out.dtype.element_ty), mask=column < n)


@triton.jit
def _slice(n_steps, c_in, c_out, n_splits, K: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr):
    """This program's tap, tile and range of time blocks, and the share of that range that it adds to the bias's sum.

    Taps fastest, splits slowest: programs that run together share rows in L2.
    """
    n_ci, n_co = tl.cdiv(c_in, BLOCK_C_IN), tl.cdiv(c_out, BLOCK_C_OUT)
    pid = tl.program_id(0)
    share = pid % (K * n_ci)
    k, ci = share % K, share // K * BLOCK_C_IN
    co = pid // (K * n_ci) % n_co * BLOCK_C_OUT
    split = pid // (K * n_ci) // n_co
    per_split = tl.cdiv(n_steps, n_splits)
    first = split * per_split
    last = min(first + per_split, n_steps)
    per_share = tl.cdiv(per_split, K * n_ci)
    share_first = first + share * per_share
    return k, ci, co, split, first, last, share, share_first, share_first + per_share


@triton.jit
def _add_rows(dy, ones, bias_acc, PRECISION: tl.constexpr):
    """Adds the sums over T of dy [C_out, T] to every column of bias_acc [C_out, 16]; the bias-grad is never rounded to TF32."""
    return dot(dy, ones, bias_acc, "tf32x3" if PRECISION == "tf32" else PRECISION)


@triton.jit
def _store_partial(
    acc, bias_acc, partial, k, ci, co, split, share, c_in, c_out, n_splits, n_weight,
    K: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr,
):  # fmt: skip
    o, c = co + tl.arange(0, BLOCK_C_OUT).to(tl.int64), ci + tl.arange(0, BLOCK_C_IN)
    weight_row = partial + split.to(tl.int64) * n_weight
    tl.store(weight_row + (k * c_out + o[:, None]) * c_in + c[None, :], acc, mask=(o < c_out)[:, None] & (c < c_in)[None, :])
    bias_row = partial + tl.cast(n_splits, tl.int64) * n_weight + (split.to(tl.int64) * K * tl.cdiv(c_in, BLOCK_C_IN) + share) * c_out
    first_column = tl.where(tl.arange(0, 16)[None, :] == 0, bias_acc, 0.0)
    tl.store(bias_row + o, tl.sum(first_column, axis=1), mask=o < c_out)
