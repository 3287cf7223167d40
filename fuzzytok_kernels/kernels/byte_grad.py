"""The gradients of the look-ups by id, deterministic and without atomics: steps in the order of their ids, then sums of runs.

`rank_kernel`, a cumulative sum and `order_kernel` are a counting sort of all B*T steps by id. A share is BLOCK_T steps in that order, so
that it holds few ids, in runs. What a share adds to the rows of its ids is one product on the tensor cores with the 0/1 matrix of
`same id`, whose rows of a run are all alike: the first of each is stored. Its slot is number share + id: along the order one of the two
grows from run to run, so that every run has a slot of its own, and those of an id lie one behind the other for the last sum.

`grad_y` is read once, since `share_kernel` goes through it in this order: from a step it makes the gradient before the activation, its
part of tap 0 and its part of the embedding's. Tap k gathers that gradient k*d steps later. By bytes, at B*T=65,536, C=256 and three taps:
134 MB; a product with the whole 0/1 matrix of (256, B*T) would take 34 GFLOP and the pre-activation as often as there are blocks of ids.
"""

import triton
import triton.language as tl

from fuzzytok_kernels.kernels.activation import derivative, gate_grads
from fuzzytok_kernels.kernels.byte_conv import biases, first_step, id_at, pre_activation, sources
from fuzzytok_kernels.profile import fixed_name


@triton.jit(do_not_specialize=["n_steps", "n_ids"], repr=fixed_name("byte_causal_conv1d_rank"))
def rank_kernel(ids, ranks, counts, n_steps, T, n_ids, n_blocks, stride_ib, stride_it, BLOCK: tl.constexpr, BLOCK_OTHERS: tl.constexpr):
    """ranks [B*T]: how many earlier steps of its block have the same id; counts [V + 1, n_blocks], zero before: how many steps there are.

    Row V counts the ids that have no row in the table.
    """
    block = tl.program_id(0)
    n = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = _row_of(ids, n, n < n_steps, T, n_ids, stride_ib, stride_it)
    rank, later = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, BLOCK, BLOCK_OTHERS):
        others = block.to(tl.int64) * BLOCK + start + tl.arange(0, BLOCK_OTHERS)
        same = v[:, None] == _row_of(ids, others, others < n_steps, T, n_ids, stride_ib, stride_it)[None, :]
        rank += tl.sum((same & (others[None, :] < n[:, None])).to(tl.int32), axis=1)
        later += tl.sum((same & (others[None, :] > n[:, None])).to(tl.int32), axis=1)
    tl.store(ranks + n, rank, mask=n < n_steps)
    tl.store(counts + v.to(tl.int64) * n_blocks + block, rank + 1, mask=(n < n_steps) & (later == 0))


@triton.jit(do_not_specialize=["n_steps", "n_ids"], repr=fixed_name("byte_causal_conv1d_order"))
def order_kernel(ids, ranks, ends, order, ordered_ids, n_steps, T, n_ids, n_blocks, stride_ib, stride_it, BLOCK: tl.constexpr):
    """order [B*T]: the steps by id, each id's in order of time, and their ids; ends is the cumulative sum of counts."""
    block = tl.program_id(0)
    n = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < n_steps
    v = _row_of(ids, n, inside, T, n_ids, stride_ib, stride_it)
    before = v.to(tl.int64) * n_blocks + block - 1
    place = tl.load(ends + before, mask=inside & (before >= 0), other=0) + tl.load(ranks + n, mask=inside, other=0)
    tl.store(order + place, n.to(order.dtype.element_ty), mask=inside)
    tl.store(ordered_ids + place, v, mask=inside)


@triton.jit(
    do_not_specialize=["n_steps", "n_ids", "dilation", "n_sequences", "n_searches"], repr=fixed_name("byte_causal_conv1d_grad_shares")
)
def share_kernel(
    ids, order, ordered_ids, table, bias, cu_seqlens, grad_y, grad_p, partial,
    n_steps, T, n_ids, channels, dilation, n_sequences, n_searches,
    stride_ib, stride_it, stride_bias, stride_s, stride_gb, stride_gc, stride_gt,
    K: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_y (B, C, T) -> grad_p contiguous [B, T, C_out], and of partial [slots, K * C_out + C] the columns of tap 0 and of e."""
    n, b, t, inside, same, slot = _share(tl.program_id(0), order, ordered_ids, n_steps, T, grad_y.dtype.element_ty, BLOCK_T)
    row = ids + b * stride_ib
    first = first_step(t, cu_seqlens, n_sequences, n_searches, stride_s)
    rows, seen = sources(row, t, first, n_ids, dilation, stride_it, K)
    c_out = PARTS * channels
    sums = partial + slot * (K * c_out + channels)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        within = c < channels
        mask = inside[:, None] & within[None, :]
        grad = tl.load(  # [T, C]
            grad_y + b[:, None] * stride_gb + t.to(tl.int64)[:, None] * stride_gt + c.to(tl.int64)[None, :] * stride_gc,
            mask=mask,
            other=0.0,
        )
        _store_sums(same, grad, sums + K * c_out, slot, c, within, PRECISION, BLOCK_T, BLOCK_C)
        starts = biases(bias, c, channels, stride_bias, PARTS)
        p = pre_activation(
            table, starts, 0, c, rows, seen, row, t, first, n_ids, channels, dilation,
            stride_it, K, PARTS, BLOCK_T, BLOCK_C,
        )  # fmt: skip
        out = grad_p + n[:, None] * c_out + c[None, :]
        if PARTS == 2:
            by = pre_activation(
                table, starts, 1, c, rows, seen, row, t, first, n_ids, channels, dilation,
                stride_it, K, PARTS, BLOCK_T, BLOCK_C,
            )  # fmt: skip
            left, right = gate_grads(p, by, grad.to(tl.float32), ACTIVATION)
            tl.store(out + channels, right.to(grad_p.dtype.element_ty), mask=mask)
            _store_sums(same, right, sums + channels, slot, c, within, PRECISION, BLOCK_T, BLOCK_C)
        elif ACTIVATION == "none":
            left = grad.to(tl.float32)
        else:
            left = derivative(p, ACTIVATION) * grad.to(tl.float32)
        tl.store(
            out, left.to(grad_p.dtype.element_ty), mask=mask
        )  # the sums take it as it is: rounded, fp16's bias-grad broke the error rule
        _store_sums(same, left, sums, slot, c, within, PRECISION, BLOCK_T, BLOCK_C)


@triton.jit(do_not_specialize=["n_steps", "dilation", "n_sequences", "n_searches"], repr=fixed_name("byte_causal_conv1d_grad_taps"))
def tap_kernel(
    order, ordered_ids, cu_seqlens, grad_p, partial, n_steps, T, channels, c_out, dilation, n_sequences, n_searches, stride_s,
    K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of partial the columns of taps 1 to K - 1: one share and tap a program, taps fastest, whose rows of grad_p lie close together."""
    pid = tl.program_id(0)
    k = 1 + pid % (K - 1)
    n, _, t, inside, same, slot = _share(pid // (K - 1), order, ordered_ids, n_steps, T, grad_p.dtype.element_ty, BLOCK_T)
    ahead = k * tl.cast(dilation, t.dtype)
    seen = inside & (t + ahead < T)
    seen = seen & (first_step(tl.where(seen, t + ahead, 0), cu_seqlens, n_sequences, n_searches, stride_s) <= t)
    rows = grad_p + tl.where(seen, n + ahead, 0) * c_out
    sums = partial + slot * (K * c_out + channels) + k * c_out
    for start in range(0, c_out, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        grad = tl.load(rows[:, None] + c[None, :], mask=seen[:, None] & (c < c_out)[None, :], other=0.0)  # [T, C_out]
        _store_sums(same, grad, sums, slot, c, c < c_out, PRECISION, BLOCK_T, BLOCK_C)


@triton.jit(repr=fixed_name("byte_causal_conv1d_grad_sum"))
def sum_slots_kernel(
    partial, ends, grad_table, n_blocks, width, SHARE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """partial [slots, width] -> grad_table [V, width], each id's slots summed in their order."""
    n_columns = tl.cdiv(width, BLOCK_COLUMNS)
    v = tl.program_id(0) // n_columns
    column = tl.program_id(0) % n_columns * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    last = (v + 1).to(tl.int64) * n_blocks - 1
    end = tl.load(ends + last).to(tl.int64)
    begin = tl.load(ends + last - n_blocks, mask=v > 0, other=0).to(tl.int64)
    first = begin // SHARE
    count = tl.where(end > begin, tl.cdiv(end, SHARE) - first, 0)
    totals = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, count, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        values = partial + (first + v + row)[:, None] * width + column[None, :]
        totals += tl.load(values, mask=(row < count)[:, None] & (column < width)[None, :], other=0.0)
    tl.store(grad_table + v.to(tl.int64) * width + column, tl.sum(totals, axis=0), mask=column < width)


@triton.jit
def _share(share, order, ordered_ids, n_steps, T, dtype: tl.constexpr, BLOCK_T: tl.constexpr):
    """A share's steps n = b * T + t, which of them there are, the matrix [T, T] of equal ids, and the slots [T, 1] of its rows.

    A slot is -1 where an earlier row of the same run stores the same sums.
    """
    at = share.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = at < n_steps
    n = tl.load(order + at, mask=inside, other=0)
    b = n // T
    t = n - b * T
    v = tl.load(ordered_ids + at, mask=inside, other=-1)
    before = tl.load(ordered_ids + at - 1, mask=inside & (at % BLOCK_T > 0), other=-1)
    slot = tl.where(v == before, -1, share + v).to(tl.int64)[:, None]  # of rows that there are not, too
    return n.to(tl.int64), b.to(tl.int64), t, inside, (v[:, None] == v[None, :]).to(dtype), slot


@triton.jit
def _store_sums(same, values, sums, slot, c, within, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sums [T, C] of the rows of `values` that share an id, stored once a run."""
    same = same.to(values.dtype)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    if values.dtype == tl.float32 and PRECISION == "tf32x3":  # 0 and 1 are exact in TF32: two products do, and fewer registers
        high = (values.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
        total = tl.dot(same, high, total, input_precision="tf32")
        total = tl.dot(same, values - high, total, input_precision="tf32")
    else:
        total = tl.dot(same, values, total, input_precision=PRECISION)
    tl.store(sums + c[None, :], total, mask=(slot >= 0) & within[None, :])


@triton.jit
def _row_of(ids, n, inside, T, n_ids, stride_ib, stride_it):
    """The ids at steps n = b * T + t; n_ids for those that have no row in the table, -1 outside."""
    n = tl.where(inside, n, 0)
    b = n // T
    v, known = id_at(ids + b * stride_ib, n - b * T, n_ids, stride_it)
    return tl.where(inside, tl.where(known, v, n_ids), -1)
