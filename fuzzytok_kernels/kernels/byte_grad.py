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

from fuzzytok_kernels.kernels.byte_conv import first_step, row_of, wait
from fuzzytok_kernels.profile import fixed_name


@triton.jit(do_not_specialize=["n_steps", "n_ids"], repr=fixed_name("byte_causal_conv1d_rank"))
def rank_kernel(
    ids, ranks, counts, n_steps, T, n_ids, chunk, stride_ib, stride_it,
    WIDE: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
):  # fmt: skip
    """ranks [B*T]: how many earlier steps of its block have the same id; counts [chunks, V + 1, chunk]: how many steps there are.

    Row V counts the ids that have no row in the table.
    """
    wait(PDL)
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
    column = counts + block % chunk
    for start in range(0, n_ids + 1, BLOCK):
        row = start + at
        tl.store(column + _key(row, block, n_ids, chunk) * chunk, tl.zeros([BLOCK], tl.int32), mask=row <= n_ids)
    tl.debug_barrier()  # the same program's stores, by other threads
    tl.store(column + _key(v, block, n_ids, chunk) * chunk, found + 1, mask=inside & (found < BLOCK))


@triton.jit(do_not_specialize=["n_steps", "n_ids"], repr=fixed_name("byte_causal_conv1d_order"))
def order_kernel(
    ids, ranks, ends, order, keys, n_steps, T, n_ids, chunk, stride_ib, stride_it,
    WIDE: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """order [B*T]: the steps by id, each id's in order of time; in this order rows [B*T], the table's. ends: counts, summed up."""
    wait(PDL)
    block = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    n = block * BLOCK + tl.arange(0, BLOCK)
    inside = n < n_steps
    v = _row_at(ids, n, n_steps, T, n_ids, stride_ib, stride_it)
    key = _key(v, block, n_ids, chunk)
    before = key * chunk + block % chunk - 1
    place = tl.load(ends + before, mask=inside & (before >= 0), other=0) + tl.load(ranks + n, mask=inside, other=0)
    tl.store(order + place, n, mask=inside)
    tl.store(keys + place, key.to(keys.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["n_steps", "n_ids", "dilation", "n_sequences", "n_searches"], repr=fixed_name("byte_causal_conv1d_grad_shares")
)
def share_kernel(
    order, keys, cu_seqlens, grad_p, grad_y, partial,
    n_steps, T, n_ids, channels, c_out, dilation, n_sequences, n_searches, stride_s, stride_pb, stride_pt, stride_gb, stride_gt,
    WIDE: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_p [B, T, C_out], grad_y [B, T, C] -> partial [slots, K * C_out + C]: one share of one tap, or of e, a program.

    Taps fastest, whose rows of grad_p lie close together.
    """
    wait(PDL)
    pid = tl.program_id(0)
    k = pid % (K + 1)
    share = pid // (K + 1)
    at = share * tl.full([], BLOCK_T, tl.int64 if WIDE else tl.int32) + tl.arange(0, BLOCK_T)
    inside = at < n_steps
    n = tl.load(order + at, mask=inside, other=0)
    key = tl.load(keys + at, mask=inside, other=-1)
    before = tl.load(keys + at - 1, mask=(at > 0) & inside, other=-1)
    slot = tl.where(inside & ((at % BLOCK_T == 0) | (key != before)), share + key, -1)[:, None]
    same = (key[:, None] == key[None, :]).to(grad_y.dtype.element_ty)
    b = n // T
    t = n - b * T
    sums = partial + slot * (K * c_out + channels) + k * c_out
    if k < K:
        ahead = k * tl.cast(dilation, n.dtype)
        seen = inside & (t + ahead < T)
        seen = seen & (first_step(tl.where(seen, t + ahead, 0), cu_seqlens, n_sequences, n_searches, stride_s) <= t)
        _sum(
            grad_p + (b * stride_pb + tl.where(seen, t + ahead, 0) * stride_pt)[:, None], seen, same, sums, slot, c_out, PRECISION, BLOCK_C
        )
    else:
        _sum(grad_y + (b * stride_gb + t * stride_gt)[:, None], inside, same, sums, slot, channels, PRECISION, BLOCK_C)


@triton.jit
def _sum(gathered, seen, same, sums, slot, channels, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sums of the rows `gathered` that share an id."""
    for start in range(0, channels, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C))[None, :]
        grad = tl.load(gathered + c, mask=seen[:, None] & (c < channels), other=0.0)  # [T, C]
        total = tl.dot(same, grad, input_precision=PRECISION)
        tl.store(sums + c, total, mask=(slot >= 0) & (c < channels))


@triton.jit(repr=fixed_name("byte_causal_conv1d_grad_sum"))
def sum_slots_kernel(
    partial, ends, grad_table, n_ids, n_chunks, chunk, width,
    SHARE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial [slots, width] -> grad_table [V, width], each id's slots summed in their order, in the digits that products take of it."""
    wait(PDL)
    n_columns = tl.cdiv(width, BLOCK_COLUMNS)
    v = (tl.program_id(0) // n_columns).to(tl.int64)
    column = tl.program_id(0) % n_columns * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    totals = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for i in range(n_chunks):
        key = i * (n_ids + 1) + v
        end = tl.load(ends + (key + 1) * chunk - 1).to(tl.int64)
        begin = tl.load(ends + key * chunk - 1, mask=key > 0, other=0).to(tl.int64)
        first = begin // SHARE
        count = tl.where(end > begin, tl.cdiv(end, SHARE) - first, 0)
        for start in range(0, count, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
            values = partial + (first + key + row)[:, None] * width + column[None, :]
            totals += tl.load(values, mask=(row < count)[:, None] & (column < width)[None, :], other=0.0)
    total = tl.sum(totals, axis=0)
    if PRECISION == "tf32":  # rounded here: by the products, it took half of their instructions
        rounded = ((total.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        total = tl.where(total == total, rounded, total)  # a NaN's bits could carry over into a number
    tl.store(grad_table + v * width + column, total, mask=column < width)


@triton.jit
def _key(v, block, n_ids, chunk):
    """By what steps of `block` are sorted: their chunk, of so many blocks, and then their id. In 64 bits."""
    return (block // chunk).to(tl.int64) * (n_ids + 1) + v


@triton.jit
def _row_at(ids, n, n_steps, T, n_ids, stride_ib, stride_it):
    """The table's rows of the ids at steps n = b * T + t, -1 outside."""
    inside = n < n_steps
    n = tl.where(inside, n, 0)
    b = n // T
    return tl.where(inside, row_of(ids + b * stride_ib, n - b * T, n_ids, stride_it), -1)
