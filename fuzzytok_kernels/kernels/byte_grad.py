"""The gradients of the look-ups by id, deterministic and without atomics: steps in the order of their ids, then sums of runs.

`rank_kernel`, a cumulative sum and `order_kernel` are a counting sort of all B*T steps by id. A share is BLOCK_T steps in that order, so
that it holds few ids, in runs. What a share adds to the rows of its ids is one product on the tensor cores with the 0/1 matrix of
`same id`, whose rows of a run are all alike: the first of each is stored. Its slot is number share + id: along the order one of the two
grows from run to run, so that every run has a slot of its own, and those of an id lie one behind the other for the last sum.

`grad_y` is read once, since `share_kernel` goes through it in this order: from a step it makes the gradient before the activation, its
part of tap 0 and its part of the embedding's. Tap k gathers that gradient k*d steps later. By bytes, at B*T=65,536, C=256 and three taps:
134 MB; a product with the whole 0/1 matrix of (256, B*T) would take 34 GFLOP, and more with every id that a model adds.
"""

import triton
import triton.language as tl

from fuzzytok_kernels.kernels.activation import derivative, gate_grads
from fuzzytok_kernels.kernels.byte_conv import first_step, looked_up, row_back, row_of
from fuzzytok_kernels.profile import fixed_name


@triton.jit(do_not_specialize=["n_steps", "n_ids"], repr=fixed_name("byte_causal_conv1d_rank"))
def rank_kernel(
    ids, ranks, counts, n_steps, T, n_ids, n_blocks, stride_ib, stride_it,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
):  # fmt: skip
    """ranks [B*T]: how many earlier steps of its block have the same id; counts [V + 1, n_blocks], zero before: how many steps there are.

    Row V counts the ids that have no row in the table.
    """
    block = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    at = tl.arange(0, BLOCK)
    n = block * BLOCK + at
    v = _row_at(ids, n, n_steps, T, n_ids, stride_ib, stride_it)
    found = tl.zeros([BLOCK, BLOCK_OTHERS], tl.int32)
    for start in tl.static_range(0, BLOCK, BLOCK_OTHERS):
        other = start + tl.arange(0, BLOCK_OTHERS)
        same = v[:, None] == _row_at(ids, block * BLOCK + other, n_steps, T, n_ids, stride_ib, stride_it)[None, :]
        found += tl.where(same, tl.where(other[None, :] < at[:, None], 1, tl.where(other[None, :] > at[:, None], BLOCK, 0)), 0)
    found = tl.sum(found, axis=1)  # earlier ones, and BLOCK times later ones
    inside = n < n_steps
    tl.store(ranks + n, found % BLOCK, mask=inside)
    tl.store(counts + v.to(tl.int64) * n_blocks + block, found + 1, mask=inside & (found < BLOCK))


@triton.jit(do_not_specialize=["n_steps", "n_ids", "dilation", "n_sequences", "n_searches"], repr=fixed_name("byte_causal_conv1d_order"))
def order_kernel(
    ids, ranks, ends, cu_seqlens, order, rows, batch,
    n_steps, T, n_ids, n_blocks, dilation, n_sequences, n_searches, stride_ib, stride_it, stride_s,
    WIDE: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """order [B*T]: the steps by id, each id's in order of time; in this order rows [K, B*T], the table's that they look up, and
    batch [B*T], whose they are. ends: counts, summed up.
    """
    block = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    n = block * BLOCK + tl.arange(0, BLOCK)
    inside = n < n_steps
    v = _row_at(ids, n, n_steps, T, n_ids, stride_ib, stride_it)
    before = v.to(tl.int64) * n_blocks + block - 1
    place = tl.load(ends + before, mask=inside & (before >= 0), other=0) + tl.load(ranks + n, mask=inside, other=0)
    tl.store(order + place, n, mask=inside)
    tl.store(rows + place, v.to(tl.int32), mask=inside)
    b = tl.where(inside, n, 0) // T
    row, t = ids + b * stride_ib, tl.where(inside, n, 0) - b * T
    tl.store(batch + place, b, mask=inside)
    first = first_step(t, cu_seqlens, n_sequences, n_searches, stride_s)
    for k in range(1, K):
        source = row_back(row, t, k, first, n_ids, dilation, stride_it)
        tl.store(rows + k * tl.cast(n_steps, n.dtype) + place, source.to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["n_steps", "n_ids"], repr=fixed_name("byte_causal_conv1d_grad_shares"))
def share_kernel(
    order, rows, batch, table, grad_y, grad_p, partial, n_steps, T, n_ids, channels, stride_gb, stride_gt,
    WIDE: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """grad_y [B, T, C] -> grad_p contiguous [B, T, C_out], and of partial [slots, K * C_out + C] the columns of tap 0 and of e.

    Its channels lie side by side: of another stride, the products take operands of two layouts, and ptxas of CUDA 12.8 (Triton 3.6)
    left a register of their addresses unset, which ended in an illegal memory access.
    Persistent, to BLOCKS * BLOCK_C channels, for the forward's reasons: with all channels of a share a program took its
    look-ups from L2, and 181 us where this reads and writes 67 MB (H100, C=256, B*T=65,536).
    """
    n_c, pid = tl.cdiv(channels, BLOCKS * BLOCK_C), tl.program_id(0)
    c = pid % n_c * BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    for share in range(pid // n_c, tl.cdiv(n_steps, BLOCK_T), tl.num_programs(0) // n_c):
        at, n, inside, v, same, slot = _share(share, order, rows, n_steps, n_ids, grad_y.dtype.element_ty, WIDE, BLOCK_T)
        b = tl.load(batch + at, mask=inside, other=0)  # n // T would take 15 instructions a step
        gathered = (b * stride_gb + (n - b * T) * stride_gt)[:, None]
        out, to = (n * (PARTS * channels))[:, None], slot * ((K * PARTS + 1) * channels)
        for start in tl.static_range(0, BLOCKS * BLOCK_C, BLOCK_C):
            mask, stored = inside[:, None] & (c + start < channels)[None, :], (slot >= 0) & (c + start < channels)[None, :]
            grad = tl.load((grad_y + start + c)[None, :] + gathered, mask=mask, other=0.0)  # [T, C]
            columns, sums, out_columns = table + start + c, (partial + start + c)[None, :] + to, (grad_p + start + c)[None, :] + out
            tl.store(sums + K * PARTS * channels, _sums(same, grad, PRECISION), mask=stored)
            grad = grad.to(tl.float32)
            if ACTIVATION == "none":
                left = grad
            else:
                p = _pre_activation(columns, rows + at, v, inside, n_steps, n_ids, channels, K, PARTS)
                if PARTS == 2:
                    by = _pre_activation(columns + channels, rows + at, v, inside, n_steps, n_ids, channels, K, PARTS)
                    left, right = gate_grads(p, by, grad, ACTIVATION)
                    tl.store(out_columns + channels, right.to(grad_p.dtype.element_ty), mask=mask)
                    tl.store(sums + channels, _sums(same, right, PRECISION), mask=stored)
                else:
                    left = derivative(p, ACTIVATION) * grad
            tl.store(out_columns, left.to(grad_p.dtype.element_ty), mask=mask)
            tl.store(sums, _sums(same, left, PRECISION), mask=stored)


@triton.jit
def _pre_activation(columns, rows, v, inside, n_steps, n_ids, channels, K: tl.constexpr, PARTS: tl.constexpr):
    """[T, C] in fp32: of each tap the row of the table that `order_kernel` found."""
    p = looked_up(columns, v, channels, K, PARTS)
    if K <= 8:  # unrolled, so that all look-ups are under way at once
        for k in tl.static_range(1, K):
            source = tl.load(rows + k * tl.cast(n_steps, v.dtype), mask=inside, other=n_ids).to(v.dtype)
            p += looked_up(columns + k * PARTS * channels, source, channels, K, PARTS)
    else:
        for k in range(1, K):
            source = tl.load(rows + k * tl.cast(n_steps, v.dtype), mask=inside, other=n_ids).to(v.dtype)
            p += looked_up(columns + k * PARTS * channels, source, channels, K, PARTS)
    return p


@triton.jit(
    do_not_specialize=["n_steps", "n_ids", "dilation", "n_sequences", "n_searches"], repr=fixed_name("byte_causal_conv1d_grad_taps")
)
def tap_kernel(
    order, rows, cu_seqlens, grad_p, partial, n_steps, T, n_ids, channels, c_out, dilation, n_sequences, n_searches, stride_s,
    WIDE: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of partial the columns of taps 1 to K - 1: one share and tap a program, taps fastest, whose rows of grad_p lie close together."""
    pid = tl.program_id(0)
    k = 1 + pid % (K - 1)
    _, n, inside, _, same, slot = _share(pid // (K - 1), order, rows, n_steps, n_ids, grad_p.dtype.element_ty, WIDE, BLOCK_T)
    t, ahead = n % T, k * tl.cast(dilation, n.dtype)
    seen = inside & (t + ahead < T)
    seen = seen & (first_step(tl.where(seen, t + ahead, 0), cu_seqlens, n_sequences, n_searches, stride_s) <= t)
    gathered = grad_p + (tl.where(seen, n + ahead, 0) * c_out)[:, None]
    sums = partial + slot * (K * c_out + channels) + k * c_out
    for start in range(0, c_out, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C))[None, :]
        grad = tl.load(gathered + c, mask=seen[:, None] & (c < c_out), other=0.0)  # [T, C_out]
        tl.store(sums + c, _sums(same, grad, PRECISION), mask=(slot >= 0) & (c < c_out))


@triton.jit(repr=fixed_name("byte_causal_conv1d_grad_sum"))
def sum_slots_kernel(
    partial, ends, grad_table, n_blocks, width,
    SHARE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial [slots, width] -> grad_table [V, width], each id's slots summed in their order, in the digits that products take of it."""
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
    total = tl.sum(totals, axis=0)
    if PRECISION == "tf32":  # rounded here: by the products, it took half of their instructions
        rounded = ((total.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        total = tl.where(total == total, rounded, total)  # a NaN's bits could carry over into a number
    tl.store(grad_table + v.to(tl.int64) * width + column, total, mask=column < width)


@triton.jit
def _share(share, order, rows, n_steps, n_ids, dtype: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr):
    """A share's places in the order, its steps n = b * T + t, which of them there are, their rows of the table (its last where there are
    none), the matrix [T, T] of equal rows, and their slots [T, 1]: -1 where an earlier step of the same run stores the same sums.
    """
    at = share * tl.full([], BLOCK_T, tl.int64 if WIDE else tl.int32) + tl.arange(0, BLOCK_T)
    inside = at < n_steps
    n = tl.load(order + at, mask=inside, other=0)
    v = tl.load(rows + at, mask=inside, other=n_ids).to(at.dtype)
    before = tl.load(rows + at - 1, mask=(at > 0) & (at <= n_steps), other=n_ids)
    slot = tl.where((at % BLOCK_T > 0) & (v == before), -1, share + v)
    return at, n, inside, v, (v[:, None] == v[None, :]).to(dtype), slot[:, None]


@triton.jit
def _sums(same, values, PRECISION: tl.constexpr):
    """The sums [T, C] of the rows of `values` that share an id, in fp32, of fp32 values to at least 16 bits each."""
    total = tl.zeros([values.shape[0], values.shape[1]], tl.float32)
    if same.dtype == values.dtype and (same.dtype != tl.float32 or PRECISION == "ieee"):
        return tl.dot(same, values, total, input_precision="ieee")
    else:  # two products, of leading bits and the rest: rounded once to fp16, the bias-grad broke the error rule
        leading = 0xFFFF0000 if same.dtype == tl.bfloat16 else 0xFFFFE000  # of TF32 in fp32: 0 and 1 are exact in it
        high = (values.to(tl.uint32, bitcast=True) & leading).to(tl.float32, bitcast=True)
        total = tl.dot(same, high.to(same.dtype), total, input_precision=PRECISION)
        return tl.dot(same, (values - high).to(same.dtype), total, input_precision=PRECISION)


@triton.jit
def _row_at(ids, n, n_steps, T, n_ids, stride_ib, stride_it):
    """The table's rows of the ids at steps n = b * T + t, -1 outside."""
    inside = n < n_steps
    n = tl.where(inside, n, 0)
    b = n // T
    return tl.where(inside, row_of(ids + b * stride_ib, n - b * T, n_ids, stride_it), -1)
