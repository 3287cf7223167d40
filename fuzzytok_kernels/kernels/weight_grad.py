"""The weight- and bias-grad of the causal dilated convolution, deterministic: partial sums, then one reduction in a fixed order.

Each program sums one slice of B * T for one tile of `grad_weight` and TAPS taps: every block of `grad_y` is read once for all of them
(three taps a program: 660 -> 607 us at C=1024 on an H100, where they fill a wave that single ones do not). Of its slice it adds one share
to the bias's sum, on the tensor cores, as a product with ones: all programs that read the same `grad_y` share that work (a sum in
registers, by one of them, took 157 us where this takes 46, at C=256). `weight_out`, fp32, holds [splits, K, C_out, C_in] and behind it
the bias's [splits, shares, C_out], with one share for each group of taps and block of input channels. Where one slice is all (DIRECT),
`weight_out` and `bias_out` are the results themselves, and one program of each block of output channels sums the bias.

Through descriptors, where TF32 is allowed, fp32 is the sum of two PLANES in bf16, which `transpose.planes_kernel` has written: what is
summed over the slower axis in memory, the tensor cores take in 16 bits alone. That kernel sums the bias, too. Strict fp32 is split in
registers: of three planes in memory the tensor cores would add each small product to the large sum, whose last bits they cut off, which was
up to 60 times as far off as PyTorch's (the L2 norm of a long sum, on an H100).

Where there are `cu_seqlens`, each block of time is of one sequence (see `sequences.py`). Rows of x beyond either end of
that sequence count as zeros, and are not multiplied with zeros of `grad_y`: another sequence may hold NaN.
"""

import triton
import triton.language as tl

from fuzzytok_kernels.kernels.dot import dot
from fuzzytok_kernels.kernels.sequences import count_blocks, find_block, following, load
from fuzzytok_kernels.profile import fixed_name, moved_metadata, weight_grad_metadata


@triton.jit(
    do_not_specialize=["B", "shift", "n_splits", "n_sequences"],
    repr=fixed_name("causal_conv1d_weight_grad_tma"),
    launch_metadata=weight_grad_metadata,
)
def weight_grad_tma_kernel(
    grad_y, x, weight_out, bias_out, cu_seqlens, B, T, c_in, c_out, shift, n_splits, n_sequences,
    K: tl.constexpr, PRECISION: tl.constexpr, DIRECT: tl.constexpr, GRAD_Y_CHANNELS_LAST: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Descriptors: grad_y [B, T, C_out] (GRAD_Y_CHANNELS_LAST) or [B, C_out, T], which is not shifted; x [B, T, C_in], which is.

    Where there are `cu_seqlens`, both have a bound and a step in place of [B, T]. PLANES follow each other along B, or T.
    """
    n_t, blocks = count_blocks(cu_seqlens, n_sequences, T, BLOCK_T)
    k, ci, co, split, first, last, share, share_first, share_last = _slice(
        B * n_t, c_in, c_out, n_splits, K, DIRECT, BLOCK_C_IN, BLOCK_C_OUT, TAPS
    )  # fmt: skip
    sums = (tl.zeros([BLOCK_C_OUT, BLOCK_C_IN], tl.float32),) * TAPS
    bias_sum = tl.zeros([BLOCK_C_OUT, 16], tl.float32)
    ones = tl.full([BLOCK_T, 16], 1.0, grad_y.dtype)
    sums, bias_sum = _add_blocks(
        sums, bias_sum, ones, grad_y, x, cu_seqlens, n_sequences, blocks, first, last, n_t, B, T, k, ci, co, shift, share_first, share_last,
        PRECISION, GRAD_Y_CHANNELS_LAST, PLANES, BLOCK_T, BLOCK_C_IN, BLOCK_C_OUT, TAPS,
    )  # fmt: skip
    _store_taps(sums, weight_out, k, ci, co, split, c_in, c_out, K, BLOCK_C_IN, BLOCK_C_OUT, TAPS)
    if PLANES == 1:
        _store_bias(bias_sum, bias_out, co, split, share, c_in, c_out, n_splits, K, DIRECT, BLOCK_C_IN, BLOCK_C_OUT, TAPS)


@triton.jit
def _add_blocks(
    sums, bias_sum, ones, grad_y, x, cu_seqlens, n_sequences, blocks, first, last, n_t, B, T, k, ci, co, shift, share_first, share_last,
    PRECISION: tl.constexpr, GRAD_Y_CHANNELS_LAST: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The sums and those of the time blocks from `first` to `last`."""
    apart = B if cu_seqlens is None else T
    if cu_seqlens is not None:
        n, start, length, block_t = find_block(first, blocks, cu_seqlens, n_sequences, T, BLOCK_T)
    PRODUCTS: tl.constexpr = 2 * PLANES - 1  # that of both second planes is less than their rounding
    for i in range(first * PRODUCTS, last * PRODUCTS):
        block = i // PRODUCTS
        of_grad_y, of_x = i % PRODUCTS // 2, i % PRODUCTS % 2  # planes: 0 0, 0 1, 1 0
        b, t = block // n_t, block % n_t * BLOCK_T
        if cu_seqlens is not None:
            # Moved so that it ends with the sequence at the latest. The steps before the block, which are of another one, count as zeros:
            # for grad_y the row begins with the block.
            b, t = start, tl.minimum(block_t, length - BLOCK_T)
            dy = load(grad_y, b + block_t + of_grad_y * apart, t - block_t, co).reshape(BLOCK_T, BLOCK_C_OUT).T
        elif GRAD_Y_CHANNELS_LAST:
            dy = grad_y.load([b + of_grad_y * apart, t, co]).reshape(BLOCK_T, BLOCK_C_OUT).T  # [C_out, T], zeros from T on
        else:
            dy = grad_y.load([b, co, t]).reshape(BLOCK_C_OUT, BLOCK_T)
        grown = ()
        for j in tl.static_range(TAPS):
            # [T, C_in], zeros before t = 0, by the hardware
            rows = load(x, b + of_x * apart, t - (k + j) * shift, ci).reshape(BLOCK_T, BLOCK_C_IN)
            grown = grown + (dot(dy, rows, sums[j], PRECISION),)  # type: ignore[assignment]  # [C_out, C_in] each
        sums = grown
        if PLANES == 1 and (i >= share_first) & (i < share_last):
            bias_sum = _add_rows(dy, ones, bias_sum, PRECISION)
        # At the end, and carried over: a load that another waits for within the loop takes stages from it.
        if cu_seqlens is not None and (i + 1) % PRODUCTS == 0:
            n, start, length, block_t = following(n, start, length, block_t, cu_seqlens, n_sequences, T, BLOCK_T)
    return sums, bias_sum


@triton.jit(
    do_not_specialize=["B", "shift", "n_splits", "n_sequences"],
    repr=fixed_name("causal_conv1d_weight_grad_pointer"),
    launch_metadata=weight_grad_metadata,
)
def weight_grad_pointer_kernel(
    grad_y, x, weight_out, bias_out, cu_seqlens, B, T, c_in, c_out, shift, n_splits, n_sequences,
    stride_yb, stride_yc, stride_yt, stride_xb, stride_xc, stride_xt,
    K: tl.constexpr, PRECISION: tl.constexpr, DIRECT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Any strides and any alignment; offsets are 64-bit. Where there are `cu_seqlens`, stride_yb and stride_xb are one step."""
    n_t, blocks = count_blocks(cu_seqlens, n_sequences, T, BLOCK_T)
    k, ci, co, split, first, last, share, share_first, share_last = _slice(
        B * n_t, c_in, c_out, n_splits, K, DIRECT, BLOCK_C_IN, BLOCK_C_OUT, TAPS
    )  # fmt: skip
    sums = (tl.zeros([BLOCK_C_OUT, BLOCK_C_IN], tl.float32),) * TAPS
    bias_sum = tl.zeros([BLOCK_C_OUT, 16], tl.float32)
    ones = tl.full([BLOCK_T, 16], 1.0, grad_y.dtype.element_ty)
    sums, bias_sum = _add_blocks_by_pointers(
        sums, bias_sum, ones, grad_y, x, cu_seqlens, n_sequences, blocks, first, last, n_t, T, k, ci, co, c_in, c_out, shift,
        share_first, share_last, stride_yb, stride_yc, stride_yt, stride_xb, stride_xc, stride_xt,
        PRECISION, BLOCK_T, BLOCK_C_IN, BLOCK_C_OUT, TAPS,
    )  # fmt: skip
    _store_taps(sums, weight_out, k, ci, co, split, c_in, c_out, K, BLOCK_C_IN, BLOCK_C_OUT, TAPS)
    _store_bias(bias_sum, bias_out, co, split, share, c_in, c_out, n_splits, K, DIRECT, BLOCK_C_IN, BLOCK_C_OUT, TAPS)


@triton.jit
def _add_blocks_by_pointers(
    sums, bias_sum, ones, grad_y, x, cu_seqlens, n_sequences, blocks, first, last, n_t, T, k, ci, co, c_in, c_out, shift,
    share_first, share_last, stride_yb, stride_yc, stride_yt, stride_xb, stride_xc, stride_xt,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """As `_add_blocks`."""
    o = co + tl.arange(0, BLOCK_C_OUT).to(tl.int64)
    c = ci + tl.arange(0, BLOCK_C_IN).to(tl.int64)
    length = T
    if cu_seqlens is not None:
        n, start, length, block_t = find_block(first, blocks, cu_seqlens, n_sequences, T, BLOCK_T)
    for i in range(first, last):
        if cu_seqlens is None:
            b = (i // n_t).to(tl.int64)
            first_t = i % n_t * BLOCK_T
        else:
            b, first_t = start.to(tl.int64), block_t
        t = first_t + tl.arange(0, BLOCK_T).to(tl.int64)
        dy = tl.load(  # [T, C_out]
            grad_y + b * stride_yb + t[:, None] * stride_yt + o[None, :] * stride_yc,
            mask=(t < length)[:, None] & (o < c_out)[None, :],
            other=0.0,
        ).T  # [C_out, T]
        grown = ()
        for j in tl.static_range(TAPS):
            source = t - (k + j) * tl.cast(shift, tl.int64)
            causal = (source >= 0) & (source < length)  # Eq. 7
            if cu_seqlens is not None:  # as the descriptors' blocks, which end with the sequence: what no gradient meets may be NaN
                causal &= t < length
            clamped = tl.where(causal, source, 0)  # Eq. 8
            rows = tl.load(  # [T, C_in]
                x + b * stride_xb + clamped[:, None] * stride_xt + c[None, :] * stride_xc,
                mask=causal[:, None] & (c < c_in)[None, :],
                other=0.0,
            )
            grown = grown + (dot(dy, rows, sums[j], PRECISION),)  # type: ignore[assignment]  # [C_out, C_in] each
        sums = grown
        if (i >= share_first) & (i < share_last):
            bias_sum = _add_rows(dy, ones, bias_sum, PRECISION)
        if cu_seqlens is not None:  # at the end, as above
            n, start, length, block_t = following(n, start, length, block_t, cu_seqlens, n_sequences, T, BLOCK_T)
    return sums, bias_sum


@triton.jit(
    do_not_specialize=["n_splits", "n_rows"],
    repr=fixed_name("causal_conv1d_weight_grad_reduce"),
    launch_metadata=moved_metadata,
)
def reduce_partials_kernel(
    partial, grad_weight, grad_bias, n_weight, n_bias, n_splits, n_rows, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Sum the weight's n_splits rows and the bias's n_rows behind them in a fixed order; cast to the outputs' dtype."""
    pid = tl.program_id(0)
    weight_programs = tl.cdiv(n_weight, BLOCK_COLUMNS)
    if pid < weight_programs:
        _sum_rows(partial, grad_weight, pid, n_weight, n_splits, BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        bias_partial = partial + tl.cast(n_splits, tl.int64) * n_weight
        _sum_rows(bias_partial, grad_bias, pid - weight_programs, n_bias, n_rows, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def _sum_rows(rows, out, block, n, count, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    column = block.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    totals = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)  # summed over once, in the end
    for first in range(0, count, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        totals += tl.load(rows + row[:, None] * n + column[None, :], mask=(row < count)[:, None] & (column < n)[None, :], other=0.0)
    tl.store(out + column, tl.sum(totals, axis=0).to(out.dtype.element_ty), mask=column < n)


@triton.jit
def _slice(
    n_steps, c_in, c_out, n_splits,
    K: tl.constexpr, DIRECT: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """This program's first tap, tile and range of time blocks, and the share of that range that it adds to the bias's sum.

    Taps fastest, splits slowest: programs that run together share rows in L2.
    """
    GROUPS: tl.constexpr = (K + TAPS - 1) // TAPS
    n_shares, n_co = GROUPS * tl.cdiv(c_in, BLOCK_C_IN), tl.cdiv(c_out, BLOCK_C_OUT)
    pid = tl.program_id(0)
    share = pid % n_shares
    k, ci = share % GROUPS * TAPS, share // GROUPS * BLOCK_C_IN
    co = pid // n_shares % n_co * BLOCK_C_OUT
    split = pid // n_shares // n_co
    per_split = tl.cdiv(n_steps, n_splits)
    first = split * per_split
    last = min(first + per_split, n_steps)
    per_share = per_split if DIRECT else tl.cdiv(per_split, n_shares)
    share_first = first + share * per_share
    return k, ci, co, split, first, last, share, share_first, share_first + per_share


@triton.jit
def _add_rows(dy, ones, bias_sum, PRECISION: tl.constexpr):
    """Adds the sums over T of dy [C_out, T] to every column of bias_sum [C_out, 16], in full fp32 even where TF32 is allowed."""
    return dot(dy, ones, bias_sum, "bf16x6" if PRECISION == "bf16x3" else PRECISION)


@triton.jit
def _store_taps(
    sums, weight_out, k, ci, co, split, c_in, c_out,
    K: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    o, c = co + tl.arange(0, BLOCK_C_OUT).to(tl.int64), ci + tl.arange(0, BLOCK_C_IN)
    for j in tl.static_range(TAPS):
        tap = (split.to(tl.int64) * K + k + j) * c_out
        n_rows = tl.where(k + j < K, c_out, 0)  # the last group of taps may be short
        out = weight_out + (tap + o[:, None]) * c_in + c[None, :]
        tl.store(out, sums[j].to(weight_out.dtype.element_ty), mask=(o < n_rows)[:, None] & (c < c_in)[None, :])


@triton.jit
def _store_bias(
    bias_sum, bias_out, co, split, share, c_in, c_out, n_splits,
    K: tl.constexpr, DIRECT: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    o = co + tl.arange(0, BLOCK_C_OUT).to(tl.int64)
    first_column = tl.where(tl.arange(0, 16)[None, :] == 0, bias_sum, 0.0)
    n_shares = tl.cdiv(K, TAPS) * tl.cdiv(c_in, BLOCK_C_IN)
    row, n_rows = split.to(tl.int64) * n_shares + share, c_out
    if DIRECT:
        row, n_rows = tl.zeros_like(row), tl.where(share == 0, c_out, 0)
    else:
        bias_out += tl.cast(n_splits, tl.int64) * K * c_out * c_in
    tl.store(bias_out + row * c_out + o, tl.sum(first_column, axis=1).to(bias_out.dtype.element_ty), mask=o < n_rows)
