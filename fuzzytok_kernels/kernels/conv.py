"""The causal dilated convolution (Eq. 2 and 3 of the FuzzyTok paper) with what follows it in a residual block: one kernel a path.

It serves the plain and the fused forward, the gradient of the pre-activation, which is computed anew, and the input-grad: the same sum
with the time shift reversed and the weight's channel axes swapped. Here `c_in` are the channels summed over and `c_out` those that the
product has; `shift` is the dilation, negative for the input-grad.

A gate has c_out / 2 channels of values and as many of gates (PARTS = 2, else 1). A tile's columns are then half values, half the gates of
the same channels. `extra` is nothing, the residual to be added, or the gradient of the block's output (EXTRA).

Where there are `cu_seqlens`, a tile is of one sequence (see `sequences.py`), and its steps are counted from that one's beginning until they
are read or written as the batch's. Where there is a `state` [N, C_in, (K - 1) * shift], oldest step first and one row a sequence, the tiles
that look beyond a sequence's beginning read it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from fuzzytok_kernels.kernels.activation import activate, derivative, gate, gate_grads
from fuzzytok_kernels.kernels.dot import dot, dot_rounded, waited
from fuzzytok_kernels.kernels.sequences import bounded, count_blocks, find_block, following, load, moved, place, sequence_of, share
from fuzzytok_kernels.profile import conv_metadata, conv_name


@triton.jit(do_not_specialize=["B", "shift", "n_sequences"], repr=conv_name("tma"), launch_metadata=conv_metadata)
def conv_tma_kernel(
    x, weight, bias, extra, y, y_memory, state, cu_seqlens, B, T, c_in, c_out, shift, stride_bias,
    stride_eb, stride_ec, stride_et, stride_yb, stride_yc, stride_yt, n_sequences, stride_sn, stride_sc, stride_st,
    K: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr,
    EXTRA: tl.constexpr, PRECISION: tl.constexpr, IN_LAST: tl.constexpr, Y_DESCRIBED: tl.constexpr, FLATTEN: tl.constexpr,
    FAR: tl.constexpr, PDL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr,
):  # fmt: skip
    """Persistent over output tiles. Descriptors: x [B, T, C_in], weight [K, PARTS, C_out/PARTS, C_in] (IN_LAST) or [K, C_in, C_out].

    extra [B, T, C] and y [B, T, parts, C] are descriptors too (Y_DESCRIBED), or else pointers. Where there are `cu_seqlens`, x has a bound
    and a step in place of [B, T], and y_memory points to y. Taps that see nothing but zeros are left out where shifts are FAR.
    PDL: the next launch may start before this one has ended, which it then waits for.
    """
    if PDL:
        gdc_launch_dependents()
    channels = c_out // PARTS
    WIDTH: tl.constexpr = BLOCK_C_OUT // PARTS
    n_ci, n_co = tl.cdiv(c_in, BLOCK_C_IN), tl.cdiv(channels, WIDTH)
    n_t, blocks = count_blocks(cu_seqlens, n_sequences, T, BLOCK_T)
    first, last, apart = tl.program_id(0), B * n_t * n_co, tl.num_programs(0)
    if cu_seqlens is not None:
        # Blocks of time that follow each other, each found from the last one, of one block of channels: searched for one by one, those of
        # sequences of 512 steps took 58 us where they take 56, and in slots, of 16 sequences among 8,192 boundaries, 516 us (with GELU,
        # C=256, 65,536 steps, H200). All blocks of channels in turn took 3 % more.
        group, groups = first // n_co, apart // n_co
        block, end_block = share(n_t, group, groups), share(n_t, group + 1, groups)
        first, last, apart = block * n_co + first % n_co, end_block * n_co, n_co
        next_n, next_start, next_length, next_t = find_block(block, blocks, cu_seqlens, n_sequences, T, BLOCK_T)
    for tile in tl.range(first, last, apart, flatten=FLATTEN):
        c = tile % n_co * WIDTH
        t = tile // n_co % n_t * BLOCK_T
        b = tile // n_co // n_t
        n, start = b, None
        bound, step, end = b, t, T
        if cu_seqlens is not None:
            n, start, length = next_n, next_start, next_length
            t = moved(next_t, length, shift, BLOCK_T)
            next_n, next_start, next_length, next_t = following(n, start, length, next_t, cu_seqlens, n_sequences, T, BLOCK_T)
            bound, step = bounded(x, start, length, t)
            end = start + length
        acc = tl.zeros([BLOCK_T, BLOCK_C_OUT], tl.float32)
        taps = K
        if FAR:
            taps = _seen(t, shift, T, K, BLOCK_T)
        # 32-bit rows pass the registers anyway, and two loops' blocks do not fit.
        if state is not None and ((x.dtype.primitive_bitwidth == 32) | (t < (K - 1) * shift)):
            acc = _add_taps(
                acc, x, weight, bound, step, c, n_ci, taps, shift, state, n, c_in, stride_sn, stride_sc, stride_st,
                K, PRECISION, IN_LAST, BLOCK_T, BLOCK_C_IN, BLOCK_C_OUT,
            )  # fmt: skip
        else:
            acc = _add_taps(
                acc, x, weight, bound, step, c, n_ci, taps, shift, None, n, c_in, stride_sn, stride_sc, stride_st,
                K, PRECISION, IN_LAST, BLOCK_T, BLOCK_C_IN, BLOCK_C_OUT,
            )  # fmt: skip
        _finish(
            acc, bias, extra, y, y_memory, b, t if start is None else start + t, c, start, end, channels, stride_bias,
            stride_eb, stride_ec, stride_et, stride_yb, stride_yc, stride_yt,
            PARTS, HAS_BIAS, ACTIVATION, APPROXIMATE, EXTRA, Y_DESCRIBED, BLOCK_T, BLOCK_C_OUT,
        )  # fmt: skip


@triton.jit
def _seen(t, shift, T, K: tl.constexpr, BLOCK_T: tl.constexpr):
    """How many taps, from the first on, see anything but zeros from a tile whose first step is t.

    In 32 bits, since `launch` hands rows of 2^31 steps and more, with what their taps look back, to pointers.
    """
    steps = tl.where(shift > 0, t + BLOCK_T, T - t)
    return tl.minimum(K, tl.cdiv(steps, tl.abs(shift)))


@triton.jit
def _add_taps(
    acc, x, weight, b, t, c, n_ci, taps, shift, state, n, c_in, stride_sn, stride_sc, stride_st,
    K: tl.constexpr, PRECISION: tl.constexpr, IN_LAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr,
):  # fmt: skip
    """`acc` and the products of the first `taps` taps; before step 0 lies row n of the state, or zeros (None)."""
    STAGES: tl.constexpr = None if state is None else 2  # what a gather of rows leaves room for
    for i in tl.range(taps * n_ci, num_stages=STAGES):
        k = i % taps  # taps innermost: the rows of one channel block are read again while hot (46.4 -> 41.7 us at C=256 on an H100)
        ci = i // taps * BLOCK_C_IN
        rows = load(x, b, t - k * shift, ci).reshape(BLOCK_T, BLOCK_C_IN)  # zeros before step 0 and from T on, or on one side
        if state is not None:
            source = t - k * tl.cast(shift, tl.int64) + tl.arange(0, BLOCK_T)
            past = _past(state, n, source, ci, c_in, shift, stride_sn, stride_sc, stride_st, K, BLOCK_C_IN)
            rows = tl.where((source >= 0)[:, None], rows, past)
        if IN_LAST:
            tap = weight.load([k, 0, c, ci]).reshape(BLOCK_C_OUT, BLOCK_C_IN).T  # [C_in, C_out]
        else:
            tap = weight.load([k, ci, c]).reshape(BLOCK_C_IN, BLOCK_C_OUT)
        acc = dot_rounded(rows, tap, acc, PRECISION)  # [T, C_out]
        if state is not None:
            acc = waited(acc)
    return acc


@triton.jit(do_not_specialize=["shift", "n_sequences"], repr=conv_name("pointer"), launch_metadata=conv_metadata)
def conv_pointer_kernel(
    x, weight, bias, extra, y, state, cu_seqlens, T, c_in, c_out, shift, stride_bias,
    stride_xb, stride_xc, stride_xt, stride_wk, stride_wo, stride_wi,
    stride_eb, stride_ec, stride_et, stride_yb, stride_yc, stride_yt, n_sequences, stride_sn, stride_sc, stride_st,
    K: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr,
    EXTRA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr,
):  # fmt: skip
    """One output tile a program, any strides and any alignment; offsets are 64-bit, one grid axis counts all tiles.

    Where there are `cu_seqlens`, stride_xb, stride_eb and stride_yb are one step.
    """
    channels = c_out // PARTS
    WIDTH: tl.constexpr = BLOCK_C_OUT // PARTS
    n_co, n_t = tl.cdiv(channels, WIDTH), tl.cdiv(T, BLOCK_T)
    tile = tl.program_id(0)
    first_c, first_t, b = tile % n_co * WIDTH, tile // n_co % n_t * BLOCK_T, tile // n_co // n_t
    n = b
    if cu_seqlens is not None:
        n = sequence_of(tile // n_co, cu_seqlens, n_sequences, T, BLOCK_T)
        b, T, first_t = place(tile // n_co, n, cu_seqlens, n_sequences, T, BLOCK_T)
    if cu_seqlens is None or first_t < T:
        acc = tl.zeros([BLOCK_T, BLOCK_C_OUT], tl.float32)
        if state is not None and first_t < (K - 1) * tl.cast(shift, tl.int64):
            acc = _add_taps_by_pointers(
                acc, x, weight, b, first_t, first_c, T, c_in, channels, shift, state, n,
                stride_xb, stride_xc, stride_xt, stride_wk, stride_wo, stride_wi, stride_sn, stride_sc, stride_st,
                K, PARTS, PRECISION, BLOCK_T, BLOCK_C_IN, BLOCK_C_OUT,
            )  # fmt: skip
        else:
            acc = _add_taps_by_pointers(
                acc, x, weight, b, first_t, first_c, T, c_in, channels, shift, None, n,
                stride_xb, stride_xc, stride_xt, stride_wk, stride_wo, stride_wi, stride_sn, stride_sc, stride_st,
                K, PARTS, PRECISION, BLOCK_T, BLOCK_C_IN, BLOCK_C_OUT,
            )  # fmt: skip
        _finish(
            acc, bias, extra, y, None, b, first_t, first_c, None, T, channels, stride_bias,
            stride_eb, stride_ec, stride_et, stride_yb, stride_yc, stride_yt,
            PARTS, HAS_BIAS, ACTIVATION, APPROXIMATE, EXTRA, False, BLOCK_T, BLOCK_C_OUT,
        )  # fmt: skip


@triton.jit
def _add_taps_by_pointers(
    acc, x, weight, b, first_t, first_c, T, c_in, channels, shift, state, n,
    stride_xb, stride_xc, stride_xt, stride_wk, stride_wo, stride_wi, stride_sn, stride_sc, stride_st,
    K: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr,
):  # fmt: skip
    """As `_add_taps`."""
    WIDTH: tl.constexpr = BLOCK_C_OUT // PARTS
    column = tl.arange(0, BLOCK_C_OUT).to(tl.int64)
    within = first_c + column % WIDTH
    o = column // WIDTH * channels + within
    t = first_t + tl.arange(0, BLOCK_T).to(tl.int64)
    row = x + b.to(tl.int64) * stride_xb
    for i in range(K * tl.cdiv(c_in, BLOCK_C_IN)):
        k = i % K  # taps innermost, as above
        c = i // K * BLOCK_C_IN + tl.arange(0, BLOCK_C_IN).to(tl.int64)
        source = t - k * tl.cast(shift, tl.int64)
        causal = (source >= 0) & (source < T)  # Eq. 7; the upper end is the input-grad's
        clamped = tl.where(causal, source, 0)  # Eq. 8: no address outside the tensor is ever formed
        rows = tl.load(  # [T, C_in]
            row + clamped[:, None] * stride_xt + c[None, :] * stride_xc, mask=causal[:, None] & (c < c_in)[None, :], other=0.0
        )
        if state is not None:
            past = _past(state, n, source, i // K * BLOCK_C_IN, c_in, shift, stride_sn, stride_sc, stride_st, K, BLOCK_C_IN)
            rows = tl.where((source >= 0)[:, None], rows, past)
        tap = tl.load(  # [C_in, C_out]
            weight + k * tl.cast(stride_wk, tl.int64) + c[:, None] * stride_wi + o[None, :] * stride_wo,
            mask=(c < c_in)[:, None] & (within < channels)[None, :],
            other=0.0,
        )
        acc = dot(rows, tap, acc, PRECISION)  # [T, C_out]
        if state is not None:
            acc = waited(acc)
    return acc


@triton.jit
def _past(state, n, source, ci, c_in, shift, stride_sn, stride_sc, stride_st, K: tl.constexpr, BLOCK_C_IN: tl.constexpr):
    """[T, C_in] of row n of the state, of the steps `source` [T] that lie before step 0; zeros for all others."""
    step = (K - 1) * tl.cast(shift, tl.int64) + source
    c = ci + tl.arange(0, BLOCK_C_IN).to(tl.int64)
    row = n.to(tl.int64) * stride_sn + step * stride_st
    mask = ((source < 0) & (step >= 0))[:, None] & (c < c_in)[None, :]
    return tl.load(state + row[:, None] + c[None, :] * stride_sc, mask=mask, other=0.0)


@triton.jit
def _finish(
    acc, bias, extra, y, y_memory, b, t, c, begin, end, channels, stride_bias,
    stride_eb, stride_ec, stride_et, stride_yb, stride_yc, stride_yt,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr, EXTRA: tl.constexpr,
    DESCRIBED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C_OUT: tl.constexpr,
):  # fmt: skip
    """Bias, activation or its gradient, residual, and the store of a tile, from its channel c and step t on.

    What lies before `begin`, if that is not None, or from `end` on is not stored. In two halves: half the shared memory of a whole tile, so
    that two programs fit a multiprocessor.
    """
    HALF: tl.constexpr = BLOCK_C_OUT // 2
    left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_T, 2, HALF)), (0, 2, 1)))
    part = PARTS - 1  # of the right half, where it begins at channel
    right_c = c + (2 - PARTS) * HALF
    if HAS_BIAS:
        left += _bias(bias, 0, c, channels, stride_bias, HALF)
        right += _bias(bias, part, right_c, channels, stride_bias, HALF)
    if PARTS == 1:
        if EXTRA != "none":
            more = _read(extra, b, t, c, begin, end, channels, stride_eb, stride_ec, stride_et, DESCRIBED, BLOCK_T, HALF)
            left = _with_extra(left, more, ACTIVATION, APPROXIMATE, EXTRA)
        else:
            left = activate(left, ACTIVATION, APPROXIMATE)
        _write(left, y, y_memory, b, t, 0, c, begin, end, channels, stride_yb, stride_yc, stride_yt, DESCRIBED, BLOCK_T, HALF)
        if EXTRA != "none":
            more = _read(extra, b, t, right_c, begin, end, channels, stride_eb, stride_ec, stride_et, DESCRIBED, BLOCK_T, HALF)
            right = _with_extra(right, more, ACTIVATION, APPROXIMATE, EXTRA)
        else:
            right = activate(right, ACTIVATION, APPROXIMATE)
        _write(right, y, y_memory, b, t, 0, right_c, begin, end, channels, stride_yb, stride_yc, stride_yt, DESCRIBED, BLOCK_T, HALF)
    elif EXTRA == "grad_y":
        grad = _read(extra, b, t, c, begin, end, channels, stride_eb, stride_ec, stride_et, DESCRIBED, BLOCK_T, HALF)
        left, right = gate_grads(left, right, grad, ACTIVATION)
        _write(left, y, y_memory, b, t, 0, c, begin, end, channels, stride_yb, stride_yc, stride_yt, DESCRIBED, BLOCK_T, HALF)
        _write(right, y, y_memory, b, t, 1, c, begin, end, channels, stride_yb, stride_yc, stride_yt, DESCRIBED, BLOCK_T, HALF)
    else:
        out = gate(left, right, ACTIVATION, APPROXIMATE)
        if EXTRA == "residual":
            out += _read(extra, b, t, c, begin, end, channels, stride_eb, stride_ec, stride_et, DESCRIBED, BLOCK_T, HALF)
        _write(out, y, y_memory, b, t, 0, c, begin, end, channels, stride_yb, stride_yc, stride_yt, DESCRIBED, BLOCK_T, HALF)


@triton.jit
def _with_extra(p, extra, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr, EXTRA: tl.constexpr):
    if EXTRA == "residual":
        return activate(p, ACTIVATION, APPROXIMATE) + extra
    else:
        return derivative(p, ACTIVATION, APPROXIMATE) * extra


@triton.jit
def _bias(bias, part, c, channels, stride_bias, HALF: tl.constexpr):
    """[1, C_out]"""
    within = c + tl.arange(0, HALF)
    o = part * channels + within.to(tl.int64)
    return tl.load(bias + o * stride_bias, mask=within < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _read(
    x, b, t, c, begin, end, channels, stride_b, stride_c, stride_t, DESCRIBED: tl.constexpr, BLOCK_T: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """[T, C], zeros or anything where nothing is stored."""
    if DESCRIBED:
        return x.load([b, t, c]).reshape(BLOCK_T, HALF).to(tl.float32)
    else:
        offsets, inside = _block(b, t, 0, c, begin, end, channels, stride_b, stride_c, stride_t, BLOCK_T, HALF)
        return tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _write(
    value, y, y_memory, b, t, part, c, begin, end, channels, stride_b, stride_c, stride_t,
    DESCRIBED: tl.constexpr, BLOCK_T: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    if not DESCRIBED:
        offsets, inside = _block(b, t, part, c, begin, end, channels, stride_b, stride_c, stride_t, BLOCK_T, HALF)
        tl.store(y + offsets, value.to(y.dtype.element_ty), mask=inside)
    elif begin is None or end - begin >= BLOCK_T:  # the tile is whole, see `moved`
        y.store([b, t, part, c], value.to(y.dtype).reshape(1, BLOCK_T, 1, HALF))
    else:
        offsets, inside = _block(b, t, part, c, begin, end, channels, stride_b, stride_c, stride_t, BLOCK_T, HALF)
        tl.store(y_memory + offsets, value.to(y.dtype), mask=inside)


@triton.jit
def _block(b, t, part, c, begin, end, channels, stride_b, stride_c, stride_t, BLOCK_T: tl.constexpr, HALF: tl.constexpr):
    """Offsets [T, C], 64-bit, and which of them are inside."""
    steps, within = t + tl.arange(0, BLOCK_T).to(tl.int64), c + tl.arange(0, HALF).to(tl.int64)
    o = part * channels + within
    offsets = b.to(tl.int64) * stride_b + steps[:, None] * stride_t + o[None, :] * stride_c
    inside = steps < end if begin is None else (steps >= begin) & (steps < end)
    return offsets, inside[:, None] & (within < channels)[None, :]
