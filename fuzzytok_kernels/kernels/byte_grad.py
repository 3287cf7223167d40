"""The gradients of the look-ups by id, deterministic and without atomics: steps in the order of their ids, then sums of runs.

`rank_kernel`, a cumulative sum and `order_kernel` are a counting sort of all B*T steps by chunk of time and id. A run is what one id has of
RUN places in that order, so that neither a frequent id nor a rare one leaves most programs without work. `run_kernel` gathers a run's rows
and adds them up in fp32: for the embedding those of grad_y, for tap k those of the gradient before the activation k*d steps later.
A run's number is place // RUN + key, where a key is chunk and id: along the order one of the two grows from run to run, so that every run
has a number of its own, and those of a key lie one behind the other for the last sum.

At B*T=65,536, C=256 and three taps a run's rows are 134 MB in all. The product with the whole 0/1 matrix of (256, B*T), which needs no
sorting, took 72 us on an H100 at best and the sum of its parts 15 us (bf16, 2026-11-27), and it grows with every id that a model adds. Here
sorting takes 16 us and the last sum 7; the runs took 69, 32 steps at a time by 4 warps, and with 16 by 2 forward and backward take 27 less
(not timed apart again). Chunks, for then most of what the taps gather comes from L2.
"""

import triton
import triton.language as tl

from fuzzytok_kernels.kernels.byte_conv import row_of, sequence
from fuzzytok_kernels.kernels.dot import nearest_tf32
from fuzzytok_kernels.profile import fixed_name


@triton.jit(do_not_specialize=["n_steps", "n_ids"], repr=fixed_name("byte_causal_conv1d_rank"))
def rank_kernel(
    ids, ranks, counts, runs, n_steps, T, n_ids, chunk, n_runs, stride_ib, stride_it,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
):  # fmt: skip
    """ranks [B*T]: how many earlier steps of its block have the same id; counts [chunks, V + 1, chunk]: how many steps there are.

    Row V counts the ids that have no row in the table. All of runs [n_runs, 2] becomes empty.
    """
    block = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    at = tl.arange(0, BLOCK)
    for start in range(block * BLOCK, 2 * n_runs, tl.num_programs(0) * BLOCK):
        tl.store(runs + start + at, tl.zeros([BLOCK], tl.int32), mask=start + at < 2 * n_runs)
    n = block * BLOCK + at
    v = _row_at(ids, n, n_steps, T, n_ids, stride_ib, stride_it)
    column = counts + block % chunk
    for start in range(0, n_ids + 1, BLOCK):
        row = start + at
        tl.store(column + _key(row, block, n_ids, chunk) * chunk, tl.zeros([BLOCK], tl.int32), mask=row <= n_ids)
    found = tl.zeros([BLOCK, BLOCK_OTHERS], tl.int32)
    for start in tl.static_range(0, BLOCK, BLOCK_OTHERS):
        other = start + tl.arange(0, BLOCK_OTHERS)
        same = v[:, None] == _row_at(ids, block * BLOCK + other, n_steps, T, n_ids, stride_ib, stride_it)[None, :]
        found += tl.where(same, tl.where(other[None, :] < at[:, None], BLOCK + 1, BLOCK), 0)
    found = tl.sum(found, axis=1)  # earlier ones, and BLOCK times all
    earlier, inside = found % BLOCK, n < n_steps
    tl.store(ranks + n, earlier, mask=inside)
    tl.debug_barrier()  # the zeros, by other threads of the program
    tl.store(column + _key(v, block, n_ids, chunk) * chunk, found // BLOCK, mask=inside & (earlier == 0))


@triton.jit(do_not_specialize=["n_steps", "n_ids", "n_sequences", "n_searches"], repr=fixed_name("byte_causal_conv1d_order"))
def order_kernel(
    ids, ranks, ends, cu_seqlens, order, later, runs,
    n_steps, T, n_ids, chunk, n_sequences, n_searches, stride_ib, stride_it, stride_s,
    WIDE: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """order [B*T]: the steps by key, each key's in order of time; in this order later [B*T], how many steps their sequences have from them
    on; runs [n_runs, 2]: their first place and the one behind their last. ends: counts, summed up.
    """
    block = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    n = block * BLOCK + tl.arange(0, BLOCK)
    inside = n < n_steps
    v = _row_at(ids, n, n_steps, T, n_ids, stride_ib, stride_it)
    key = _key(v, block, n_ids, chunk)
    before = key * chunk + block % chunk - 1
    place = tl.load(ends + before, mask=inside & (before >= 0), other=0) + tl.load(ranks + n, mask=inside, other=0)
    tl.store(order + place, n, mask=inside)
    t = tl.where(inside, n % T, 0)
    end = tl.zeros_like(t) + T
    if cu_seqlens is not None:
        following = sequence(t, cu_seqlens, n_sequences, n_searches, stride_s) + 1
        end = tl.minimum(tl.load(cu_seqlens + following * stride_s).to(t.dtype), end)
    tl.store(later + place, end - t, mask=inside)
    first = tl.load(ends + key * chunk - 1, mask=inside & (key > 0), other=0)
    begins = inside & (v < n_ids) & ((place == first) | (place % RUN == 0))
    run = runs + 2 * (place // RUN + key)
    tl.store(run, place, mask=begins)
    last = tl.load(ends + (key + 1) * chunk - 1, mask=begins, other=0)
    tl.store(run + 1, tl.minimum(last, place // RUN * RUN + RUN), mask=begins)


@triton.jit(do_not_specialize=["dilation"], repr=fixed_name("byte_causal_conv1d_grad_runs"))
def run_kernel(
    order, later, runs, grad_p, grad_y, partial, channels, c_out, dilation, stride_p, stride_g,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_p [B*T, C_out], grad_y [B*T, C] -> partial [n_runs, K * C_out + C]: one run of one tap, or of e, a program; empty ones none."""
    k, run = tl.program_id(0) % (K + 1), (tl.program_id(0) // (K + 1)).to(tl.int64)
    begin, end = tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1)
    sums = partial + run * (K * c_out + channels) + k * c_out
    if k < K:
        _sum(order, later, begin, end, k * tl.cast(dilation, begin.dtype), grad_p, stride_p, sums, c_out, BLOCK_T, BLOCK_C)
    else:
        _sum(order, later, begin, end, tl.zeros_like(begin), grad_y, stride_g, sums, channels, BLOCK_T, BLOCK_C)


@triton.jit
def _sum(order, later, begin, end, ahead, grad, stride, sums, channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum of the rows of grad that are `ahead` of the steps at these places, and in their sequences."""
    for start in range(0, tl.where(begin < end, channels, 0), BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for first in range(begin, end, BLOCK_T):
            place = first + tl.arange(0, BLOCK_T)
            inside = place < end
            seen = tl.load(later + place, mask=inside, other=0) > ahead
            row = tl.load(order + place, mask=inside, other=0) + ahead
            value = tl.load(grad + (row * stride)[:, None] + c[None, :], mask=seen[:, None] & (c < channels)[None, :], other=0.0)
            total += value.to(tl.float32)
        tl.store(sums + c, tl.sum(total, axis=0), mask=c < channels)


@triton.jit(repr=fixed_name("byte_causal_conv1d_grad_sum"))
def sum_runs_kernel(
    partial, ends, grad_table, n_ids, n_chunks, chunk, width,
    RUN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial [n_runs, width] -> grad_table [V, width], each id's runs summed in their order, in the digits that products take of it."""
    n_columns = tl.cdiv(width, BLOCK_COLUMNS)
    v = (tl.program_id(0) // n_columns).to(tl.int64)
    column = tl.program_id(0) % n_columns * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    totals = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for i in range(n_chunks):
        key = i * (n_ids + 1) + v
        end = tl.load(ends + (key + 1) * chunk - 1).to(tl.int64)
        begin = tl.load(ends + key * chunk - 1, mask=key > 0, other=0).to(tl.int64)
        first = begin // RUN
        count = tl.where(end > begin, tl.cdiv(end, RUN) - first, 0)
        for start in range(0, count, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
            values = partial + (first + key + row)[:, None] * width + column[None, :]
            totals += tl.load(values, mask=(row < count)[:, None] & (column < width)[None, :], other=0.0)
    total = tl.sum(totals, axis=0)
    if PRECISION == "tf32":
        total = nearest_tf32(total)  # rounded here: by the products, it took half of their instructions
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
