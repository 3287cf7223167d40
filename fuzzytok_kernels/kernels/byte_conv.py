"""The first block of a byte model: `y[t] = e[id_t] + activation(bias + sum_k table[id_{t-k*d}, k])`, look-ups and no product over time.

Bound by writing y and, with a costly activation, by its instructions; the table has to come from L1. So a program keeps to few channels,
whose part of the table fits there (131 kB for 32 channels, three taps and 256 ids, in fp32), and goes through time.
An id that has no row makes NaN of its own step, and counts as nothing for later ones: nothing is read out of bounds, nothing waits.
"""

import triton
import triton.language as tl

from fuzzytok_kernels.kernels.activation import activate, gate
from fuzzytok_kernels.profile import fixed_name, moved_metadata


@triton.jit(
    do_not_specialize=["B", "n_ids", "dilation", "n_sequences", "n_searches"],
    repr=fixed_name("byte_causal_conv1d"),
    launch_metadata=moved_metadata,
)
def byte_conv_kernel(
    ids, table, bias, cu_seqlens, y, B, T, n_ids, channels, dilation, n_sequences, n_searches,
    stride_ib, stride_it, stride_bias, stride_s,
    WIDE: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """ids (B, T), table [V, K * C_out + C], bias (C_out,) or None, cu_seqlens or None -> y contiguous [B, T, C].

    Persistent: as many programs as a multiple of the blocks of 2 * BLOCK_C channels. Two blocks share what leads to their rows, a
    quarter of all instructions. Offsets are 64-bit, and steps if WIDE.
    """
    n_c, n_t = tl.cdiv(channels, 2 * BLOCK_C), tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    left = pid % n_c * 2 * BLOCK_C + tl.arange(0, BLOCK_C)
    right = left + BLOCK_C
    left_biases = biases(bias, left, channels, stride_bias, PARTS)
    right_biases = biases(bias, right, channels, stride_bias, PARTS)
    for tile in range(pid // n_c, B * n_t, tl.num_programs(0) // n_c):
        b = (tile // n_t).to(tl.int64)
        step = (tile % n_t).to(tl.int64 if WIDE else tl.int32) * BLOCK_T + tl.arange(0, BLOCK_T)
        row, t = ids + b * stride_ib, tl.minimum(step, T - 1)
        first = first_step(t, cu_seqlens, n_sequences, n_searches, stride_s)
        rows, seen = sources(row, t, first, n_ids, dilation, stride_it, K)
        left_y = _block(
            table, left_biases, left, rows, seen, row, t, first, n_ids, channels, dilation,
            stride_it, K, PARTS, ACTIVATION, BLOCK_T, BLOCK_C,
        )  # fmt: skip
        right_y = _block(
            table, right_biases, right, rows, seen, row, t, first, n_ids, channels, dilation,
            stride_it, K, PARTS, ACTIVATION, BLOCK_T, BLOCK_C,
        )  # fmt: skip
        out, inside = y + (b * T + step[:, None]) * channels, (step < T)[:, None]
        tl.store(out + left[None, :], left_y.to(y.dtype.element_ty), mask=inside & (left < channels)[None, :])
        tl.store(out + right[None, :], right_y.to(y.dtype.element_ty), mask=inside & (right < channels)[None, :])


@triton.jit
def _block(
    table, starts, c, rows, seen, row, t, first, n_ids, channels, dilation, stride_it,
    K: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[T, C] of y, in fp32."""
    known = seen[0][:, None] & (c < channels)[None, :]
    e = tl.load(table + rows[0][:, None] * ((K * PARTS + 1) * channels) + K * PARTS * channels + c[None, :], mask=known, other=float("nan"))
    p = pre_activation(
        table, starts, 0, c, rows, seen, row, t, first, n_ids, channels, dilation,
        stride_it, K, PARTS, BLOCK_T, BLOCK_C,
    )  # fmt: skip
    if PARTS == 2:
        by = pre_activation(
            table, starts, 1, c, rows, seen, row, t, first, n_ids, channels, dilation,
            stride_it, K, PARTS, BLOCK_T, BLOCK_C,
        )  # fmt: skip
        return e + gate(p, by, ACTIVATION)
    else:
        return e + activate(p, ACTIVATION)


@triton.jit
def biases(bias, c, channels, stride_bias, PARTS: tl.constexpr):
    """The bias of channels c, in fp32, for each part [C] of the output channels."""
    starts = ()
    for part in tl.static_range(PARTS):
        if bias is None:
            start = tl.zeros([c.shape[0]], tl.float32)
        else:
            o = part * channels + c.to(tl.int64)
            start = tl.load(bias + o * stride_bias, mask=c < channels, other=0.0).to(tl.float32)
        starts = starts + (start,)  # type: ignore[assignment]
    return starts


@triton.jit
def sources(row, t, first, n_ids, dilation, stride_it, K: tl.constexpr):
    """For each of up to 8 taps what it reads: the ids [T] and where there is one. Of more taps, the first."""
    v, known = id_at(row, t, n_ids, stride_it)
    rows, seen = (v,), (known,)
    for k in tl.static_range(1, K if K <= 8 else 1):
        v, known = _id_back(row, t, k, first, n_ids, dilation, stride_it)
        rows, seen = rows + (v,), seen + (known,)  # type: ignore[assignment]
    return rows, seen


@triton.jit
def pre_activation(
    table, starts, part: tl.constexpr, c, rows, seen, row, t, first, n_ids, channels, dilation, stride_it,
    K: tl.constexpr, PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[T, C] in fp32: the bias, from `starts`, and K look-ups; `part` 1 are the channels of a gate."""
    within = c < channels
    width = (K * PARTS + 1) * channels
    o = part * channels + c
    p = tl.broadcast_to(starts[part][None, :], [BLOCK_T, BLOCK_C])
    if K <= 8:  # unrolled, so that all look-ups are under way at once
        for k in tl.static_range(K):
            p += _looked_up(table, rows[k], seen[k], k * PARTS * channels + o, within, width)
    else:
        for k in range(K):
            v, known = _id_back(row, t, k, first, n_ids, dilation, stride_it)
            p += _looked_up(table, v, known, k * PARTS * channels + o, within, width)
    return p


@triton.jit
def _looked_up(table, v, known, columns, within, width):
    """[T, C]: what the ids add; nothing where there is none."""
    return tl.load(table + v[:, None] * width + columns[None, :], mask=known[:, None] & within[None, :], other=0.0)


@triton.jit
def _id_back(row, t, k, first, n_ids, dilation, stride_it):
    """[T]: the ids k*d steps back, and where there is one that has a row and is of the same sequence."""
    source = t - k * tl.cast(dilation, t.dtype)
    seen = source >= first
    v, known = id_at(row, tl.where(seen, source, t), n_ids, stride_it)
    return v, seen & known


@triton.jit
def id_at(row, t, n_ids, stride_it):
    """[T]: the ids at steps t, and whether they have a row in the table."""
    v = tl.load(row + t.to(tl.int64) * stride_it)
    wide = v.to(tl.int32) if v.dtype == tl.uint8 else v
    return v.to(tl.int32).to(tl.int64), (wide >= 0) & (wide < n_ids)


@triton.jit
def first_step(t, cu_seqlens, n_sequences, n_searches, stride_s):
    """[T]: where the sequence begins that step t belongs to; a batch has one sequence a row."""
    if cu_seqlens is None:
        return tl.zeros_like(t)
    else:
        low, high = tl.zeros([t.shape[0]], tl.int64), tl.zeros([t.shape[0]], tl.int64) + n_sequences
        for _ in range(n_searches):  # whatever cu_seqlens holds, no index leaves it
            middle = (low + high) // 2
            begun = tl.load(cu_seqlens + middle * stride_s) <= t
            low = tl.where(begun, middle, low)
            high = tl.where(begun, high, middle)
        return tl.maximum(tl.load(cu_seqlens + low * stride_s), 0).to(t.dtype)
