"""The first block of a byte model: `y[t] = e[id_t] + activation(sum_k table[id_{t-k*d}, k])`, look-ups and no product over time.

Bound by its instructions and by writing y: forward on an H100, bf16, B=32 T=2048 C=256, 26.1 us with the table and LayerNorm, of which
writing y takes 13.1 (2026-11-28). The table has to come from L1. So a program keeps to the channels of one line of 128 bytes,
whose part of the table fits there (131 kB for 64 channels in 16 bits, three taps and 256 ids), and goes through time.
An id that has no row makes NaN of its own step, and counts as nothing for later ones: nothing is read out of bounds, nothing waits. The
last row of the table is both, so that no look-up has a mask for steps.
"""

import triton
import triton.language as tl

from fuzzytok_kernels.kernels.activation import activate, derivative, gate, gate_grads
from fuzzytok_kernels.profile import byte_name, moved_metadata


@triton.jit(
    do_not_specialize=["B", "n_ids", "dilation", "n_sequences", "n_searches"],
    repr=byte_name,
    launch_metadata=moved_metadata,
)
def byte_conv_kernel(
    ids, table, cu_seqlens, grad_y, y,
    B, T, n_ids, channels, dilation, n_sequences, n_searches, stride_ib, stride_it, stride_s, stride_gb, stride_gt,
    WIDE: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, GRAD: tl.constexpr, APPROXIMATE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """ids (B, T), table [V + 1, K * C_out + C], cu_seqlens or None -> y contiguous [B, T, C]; if GRAD, of grad_y [B, T, C], in place of y
    the gradient [B, T, C_out] before the activation.

    Persistent: as many programs as a multiple of the blocks of 2 * BLOCK_C channels. Two blocks share what leads to their rows, a fifth of
    all instructions. Steps and offsets have 64 bits if WIDE, else 32: in 64, addresses took almost half.
    """
    OUT: tl.constexpr = PARTS if GRAD else 1
    n_c, n_t = tl.cdiv(channels, 2 * BLOCK_C), tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    c = pid % n_c * 2 * BLOCK_C + tl.arange(0, BLOCK_C)
    columns, out_columns = table + c, y + c
    first_tile, stride = pid // n_c, tl.num_programs(0) // n_c
    b, block = (first_tile // n_t).to(tl.int64 if WIDE else tl.int32), first_tile % n_t
    rows_on, blocks_on = stride // n_t, stride % n_t
    for _ in range(first_tile, B * n_t, stride):
        step = block.to(b.dtype) * BLOCK_T + tl.arange(0, BLOCK_T)
        row, t = ids + b * stride_ib, tl.minimum(step, T - 1)
        first = _first_step(t, cu_seqlens, n_sequences, n_searches, stride_s)
        rows = _sources(row, t, first, n_ids, dilation, stride_it, K)
        out, inside = ((b * T + step) * (OUT * channels))[:, None], (step < T)[:, None]
        for half in tl.static_range(0, 2 * BLOCK_C, BLOCK_C):
            mask, to = inside & (c + half < channels)[None, :], (out_columns + half)[None, :] + out
            p = _pre_activation(columns + half, rows, row, t, first, n_ids, channels, dilation, stride_it, K, PARTS)
            if PARTS == 2:
                by = _pre_activation(columns + half + channels, rows, row, t, first, n_ids, channels, dilation, stride_it, K, PARTS)
            if GRAD:
                at = (grad_y + half + c)[None, :] + (b * stride_gb + step * stride_gt)[:, None]
                grad = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                if PARTS == 2:
                    value, right = gate_grads(p, by, grad, ACTIVATION)
                    tl.store(to + channels, right.to(y.dtype.element_ty), mask=mask)
                else:
                    value = derivative(p, ACTIVATION, APPROXIMATE) * grad
            else:
                e = _looked_up(columns + half + K * PARTS * channels, rows[0], channels, K, PARTS)
                value = e + (gate(p, by, ACTIVATION, APPROXIMATE) if PARTS == 2 else activate(p, ACTIVATION, APPROXIMATE))
            tl.store(to, value.to(y.dtype.element_ty), mask=mask)
        block += blocks_on  # a division for each tile took 25 of 430 instructions
        carry = (block >= n_t).to(tl.int32)
        block -= carry * n_t
        b += rows_on + carry


@triton.jit
def _pre_activation(columns, rows, row, t, first, n_ids, channels, dilation, stride_it, K: tl.constexpr, PARTS: tl.constexpr):
    """[T, C] in fp32: K look-ups, the bias among them."""
    p = _looked_up(columns, rows[0], channels, K, PARTS)
    if K <= 8:  # unrolled, so that all look-ups are under way at once
        for k in tl.static_range(1, K):
            p += _looked_up(columns + k * PARTS * channels, rows[k], channels, K, PARTS)
    else:
        for k in range(1, K):
            p += _looked_up(columns + k * PARTS * channels, _row_back(row, t, k, first, n_ids, dilation, stride_it), channels, K, PARTS)
    return p


@triton.jit
def _looked_up(columns, rows, channels, K: tl.constexpr, PARTS: tl.constexpr):
    """[T, C] in fp32, from where row 0 of the table has these columns. Without a mask: columns that there are not are those of the next
    row, or lie in what the launcher allocates behind the last one."""
    value = tl.load(columns[None, :] + (rows * ((K * PARTS + 1) * channels))[:, None])
    if value.dtype == tl.bfloat16:  # of two in a register the upper takes one instruction so, and the compiler's own conversion two
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def _sources(row, t, first, n_ids, dilation, stride_it, K: tl.constexpr):
    """For each of up to 8 taps the row of the table [T] that it looks up. Of more taps, the first's."""
    rows = (row_of(row, t, n_ids, stride_it),)
    for k in tl.static_range(1, K if K <= 8 else 1):
        rows = rows + (_row_back(row, t, k, first, n_ids, dilation, stride_it),)  # type: ignore[assignment]
    return rows


@triton.jit
def _row_back(row, t, k, first, n_ids, dilation, stride_it):
    """[T]: the table's rows of the ids k*d steps back, its last where that is another sequence's step."""
    source = t - k * tl.cast(dilation, t.dtype)
    seen = source >= first
    return tl.where(seen, row_of(row, tl.where(seen, source, t), n_ids, stride_it), n_ids)


@triton.jit
def row_of(row, t, n_ids, stride_it):
    """[T]: the table's rows of the ids at steps t, its last for ids that have none. In 64 bits where steps are."""
    return tl.minimum(tl.load(row + t * stride_it).to(tl.uint64), n_ids).to(t.dtype)


@triton.jit
def _first_step(t, cu_seqlens, n_sequences, n_searches, stride_s):
    """[T]: where the sequence begins that step t belongs to; a batch has one sequence a row."""
    if cu_seqlens is None:
        return tl.zeros_like(t)
    else:
        n = sequence(t, cu_seqlens, n_sequences, n_searches, stride_s)
        return tl.maximum(tl.load(cu_seqlens + n * stride_s), 0).to(t.dtype)


@triton.jit
def sequence(t, cu_seqlens, n_sequences, n_searches, stride_s):
    """[T]: which of a packed batch's sequences step t belongs to; one of them, whatever cu_seqlens holds."""
    low, high = tl.zeros([t.shape[0]], tl.int64), tl.zeros([t.shape[0]], tl.int64) + n_sequences
    for _ in range(n_searches):
        middle = (low + high) // 2
        begun = tl.load(cu_seqlens + middle * stride_s) <= t
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low
