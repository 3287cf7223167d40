"""The weight- and bias-grad of the causal dilated convolution, deterministic: partial sums, then one reduction in a fixed order.

Each program sums one slice of B * T for one tap and one tile of `grad_weight`. Row s of `partial`, fp32, holds the weight's partial
[K, C_out, C_in] of slice s and, behind it, the bias's [C_out].
"""

import triton
import triton.language as tl


@triton.jit
def weight_grad_tma_kernel(
    grad_y, x, partial, B, T, c_in, c_out, shift, n_splits, n_weight,
    K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr,
):  # fmt: skip
    """Descriptors: grad_y [B, T, C_out], x [B, T, C_in]."""
    n_t = tl.cdiv(T, BLOCK_T)
    k, ci, co, split, first, last = _slice(B * n_t, c_in, c_out, n_splits, K, BLOCK_C_IN, BLOCK_C_OUT)
    acc = tl.zeros([BLOCK_C_OUT, BLOCK_C_IN], tl.float32)
    bias_acc = tl.zeros([BLOCK_C_OUT], tl.float32)
    for i in range(first, last):
        b, t = i // n_t, i % n_t * BLOCK_T
        dy = grad_y.load([b, t, co]).reshape(BLOCK_T, BLOCK_C_OUT)  # [T, C_out], zeros from T on
        rows = x.load([b, t - k * shift, ci]).reshape(BLOCK_T, BLOCK_C_IN)  # [T, C_in], zeros before t = 0, by the hardware
        acc = tl.dot(dy.T, rows, acc, input_precision=PRECISION)  # [C_out, C_in]
        bias_acc += tl.sum(dy.to(tl.float32), axis=0)
    _store_partial(acc, bias_acc, partial, k, ci, co, split, c_in, c_out, n_weight, BLOCK_C_IN, BLOCK_C_OUT)


@triton.jit
def weight_grad_pointer_kernel(
    grad_y, x, partial, B, T, c_in, c_out, shift, n_splits, n_weight,
    stride_yb, stride_yc, stride_yt, stride_xb, stride_xc, stride_xt,
    K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr,
):  # fmt: skip
    """Any strides and any alignment; offsets are 64-bit."""
    n_t = tl.cdiv(T, BLOCK_T)
    k, ci, co, split, first, last = _slice(B * n_t, c_in, c_out, n_splits, K, BLOCK_C_IN, BLOCK_C_OUT)
    o = co + tl.arange(0, BLOCK_C_OUT).to(tl.int64)
    c = ci + tl.arange(0, BLOCK_C_IN).to(tl.int64)
    acc = tl.zeros([BLOCK_C_OUT, BLOCK_C_IN], tl.float32)
    bias_acc = tl.zeros([BLOCK_C_OUT], tl.float32)
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
        )
        rows = tl.load(  # [T, C_in]
            x + b * stride_xb + clamped[:, None] * stride_xt + c[None, :] * stride_xc,
            mask=causal[:, None] & (c < c_in)[None, :],
            other=0.0,
        )
        acc = tl.dot(dy.T, rows, acc, input_precision=PRECISION)  # [C_out, C_in]
        bias_acc += tl.sum(dy.to(tl.float32), axis=0)
    _store_partial(acc, bias_acc, partial, k, ci, co, split, c_in, c_out, n_weight, BLOCK_C_IN, BLOCK_C_OUT)


@triton.jit
def reduce_partials_kernel(partial, grad_weight, grad_bias, n_weight, n_bias, n_splits, BLOCK: tl.constexpr):
    """Sum the rows of `partial` [splits, n_weight + n_bias] in order; cast to the outputs' dtype."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = n_weight + n_bias
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(n_splits):
        total += tl.load(partial + split * n + i, mask=i < n, other=0.0)
    tl.store(grad_weight + i, total.to(grad_weight.dtype.element_ty), mask=i < n_weight)
    tl.store(grad_bias + (i - n_weight), total.to(grad_bias.dtype.element_ty), mask=(i >= n_weight) & (i < n))


@triton.jit
def _slice(n_steps, c_in, c_out, n_splits, K: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr):
    """This program's tap, tile and range of time blocks. Taps fastest, splits slowest: programs that run together share rows in L2."""
    n_ci, n_co = tl.cdiv(c_in, BLOCK_C_IN), tl.cdiv(c_out, BLOCK_C_OUT)
    pid = tl.program_id(0)
    k = pid % K
    ci = pid // K % n_ci * BLOCK_C_IN
    co = pid // K // n_ci % n_co * BLOCK_C_OUT
    split = pid // K // n_ci // n_co
    per_split = tl.cdiv(n_steps, n_splits)
    first = split * per_split
    return k, ci, co, split, first, min(first + per_split, n_steps)


@triton.jit
def _store_partial(acc, bias_acc, partial, k, ci, co, split, c_in, c_out, n_weight, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr):
    o, c = co + tl.arange(0, BLOCK_C_OUT).to(tl.int64), ci + tl.arange(0, BLOCK_C_IN)
    row = partial + split.to(tl.int64) * (n_weight + c_out)
    tl.store(row + (k * c_out + o[:, None]) * c_in + c[None, :], acc, mask=(o < c_out)[:, None] & (c < c_in)[None, :])
    if (k == 0) & (ci == 0):
        tl.store(row + n_weight + o, bias_acc, mask=o < c_out)
