"""The convolution of a few new steps behind a state, and what keeps that state.

A state holds the last H = (K-1)*d inputs of each slot. It is circular (step s lies at s % H) or shifted (oldest first).

**No program reads what another program of the same launch writes.** The oldest entry, which the last tap of a step reads, is the one that
this step overwrites, and every block of output channels reads it. So `update_kernel` reads its state and never writes it: that is done by
a later launch, `remember_kernel` or `shift_kernel`, or, in a stack, by extra programs of the next layer's `update_kernel`, which computes
on another part of the state. Each element of a state has one program of that launch that owns it.

Under programmatic dependent launch (PDL) a launch may start before the one in front of it has ended. Every program waits for that one's end
before its first write and before it reads anything that it wrote, and lets the next launch start only after its own wait. So a program that
has started knows: all but the launch directly in front of it has ended. In a stack, that one writes its output, which is our x, and the
state of the layer before it; what a layer behind the first reads besides (EARLY: weights, positions, slots, its own state) was complete
when it started, and is read while the layer before still computes. From the L2 (".cg"): only what the wait covers is known to be gone from
a multiprocessor's L1, which may still hold what the state was a step ago.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fuzzytok_kernels.kernels.activation import activate, gate
from fuzzytok_kernels.kernels.dot import dot
from fuzzytok_kernels.profile import fixed_name, update_metadata


@triton.jit(repr=fixed_name("causal_conv1d_update"), launch_metadata=update_metadata)
def update_kernel(
    x, state, weight, bias, residual, y, positions, slots, past,
    B, L, c_in, c_out, n_slots, dilation, history, offset, past_history, past_offset, past_programs,
    stride_xb, stride_xc, stride_xt, stride_sn, stride_sc, stride_st, stride_wo, stride_wi, stride_wk, stride_bias,
    stride_rb, stride_rc, stride_rt, stride_yb, stride_yc, stride_yt, stride_pb, stride_pc, stride_pt,
    K: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_POSITIONS: tl.constexpr, BY_SLOT: tl.constexpr, HAS_PAST: tl.constexpr,
    APART: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C_IN: tl.constexpr, BLOCK_C_OUT: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y [B, C, L] of x [B, C_in, L] behind state [slots, C_in, offset : offset+history]; a row is one step of one batch entry.

    APART: L is at most the dilation, so that no tap but the present one reads x.

    The first `past_programs` programs write past [B, C_in, L], the input of the layer before, to that layer's part of the state.
    """
    program = tl.program_id(0)
    if HAS_PAST and program < past_programs:
        _wait(PDL)
        _remember(
            program, past, state, positions, slots, L, c_in, n_slots, past_history, past_offset,
            stride_pb, stride_pc, stride_pt, stride_sn, stride_sc, stride_st, HAS_SLOTS, BY_SLOT, BLOCK_M, BLOCK_C,
        )  # fmt: skip
    else:
        if not EARLY:
            _wait(PDL)
        tile = program - past_programs
        WIDTH: tl.constexpr = BLOCK_C_OUT // PARTS
        channels = c_out // PARTS
        n_co = tl.cdiv(channels, WIDTH)
        within = tile % n_co * WIDTH + tl.arange(0, BLOCK_C_OUT) % WIDTH
        o = (tl.arange(0, BLOCK_C_OUT) // WIDTH * channels + within).to(tl.int64)
        row = (tile // n_co).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = row < tl.cast(B, tl.int64) * L
        row = tl.where(inside, row, 0)
        b, t = row // L, row % L
        slot, live = _slot(slots, b, n_slots, HAS_SLOTS)
        base = _base(positions, b, slot, history, 0, HAS_POSITIONS, BY_SLOT)
        there = inside & live

        # The tensor cores add one product of 16 channels after the other, some 33 cycles each: with a sum for each warp, over channels of
        # its own, that chain is as many times shorter as there are GROUPS.
        GROUP: tl.constexpr = BLOCK_C_IN // GROUPS
        channel = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [G, C_in/G]
        n_ci = tl.cdiv(c_in, BLOCK_C_IN)
        acc = tl.zeros([GROUPS, BLOCK_R, BLOCK_C_OUT], tl.float32)
        if K > 1:
            for i in range((K - 1) * n_ci):
                k = 1 + i % (K - 1)
                c = (i // (K - 1) * BLOCK_C_IN + channel).to(tl.int64)
                step = t - k * dilation  # below 0 it is in the state
                from_x = x + (b * stride_xb + step * stride_xt)[None, :, None] + c[:, None, :] * stride_xc
                kept = offset + _entry(base, step, history)
                from_state = state + (slot * stride_sn + kept * stride_st)[None, :, None] + c[:, None, :] * stride_sc
                mask = (c < c_in)[:, None, :]
                if APART:
                    values = tl.load(from_state, mask=there[None, :, None] & mask, other=0.0, cache_modifier=".cg")  # [G, R, C_in/G]
                else:
                    new = (step >= 0)[None, :, None]
                    behind = tl.load(from_state, mask=(there & (step < 0))[None, :, None] & mask, other=0.0)
                    values = tl.where(new, tl.load(from_x, mask=(there & (step >= 0))[None, :, None] & mask, other=0.0), behind)
                tap = _tap(weight, k, c, o, c_in, within < channels, stride_wo, stride_wi, stride_wk)
                acc = dot(values, tap, acc, PRECISION)  # [G, R, C_out]
        tap = _tap(weight, 0, channel.to(tl.int64), o, c_in, within < channels, stride_wo, stride_wi, stride_wk)
        p = tl.zeros([BLOCK_R, BLOCK_C_OUT], tl.float32)
        if HAS_BIAS:
            p += tl.load(bias + o * stride_bias, mask=within < channels, other=0.0, cache_modifier=".cg").to(tl.float32)[None, :]
        if EARLY:
            _wait(PDL)
        co = (tile % n_co * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
        mask = inside[:, None] & (co < channels)[None, :]
        if HAS_RESIDUAL:  # read here, not behind the sum: one wait for the memory less
            at = residual + (b * stride_rb + t * stride_rt)[:, None] + co[None, :] * stride_rc
            extra = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        for i in range(n_ci):  # tap 0, the present
            c = (i * BLOCK_C_IN + channel).to(tl.int64)
            from_x = x + (b * stride_xb + t * stride_xt)[None, :, None] + c[:, None, :] * stride_xc
            values = tl.load(from_x, mask=there[None, :, None] & (c < c_in)[:, None, :], other=0.0)
            acc = dot(values, tap, acc, PRECISION)
            tap = _tap(weight, 0, c + BLOCK_C_IN, o, c_in, within < channels, stride_wo, stride_wi, stride_wk)
        p += tl.sum(acc, 0)  # [R, C_out]
        if PARTS == 1:
            out = activate(p, ACTIVATION)
        else:
            value, by = tl.split(tl.permute(tl.reshape(p, (BLOCK_R, 2, WIDTH)), (0, 2, 1)))
            out = gate(value, by, ACTIVATION)
        if HAS_RESIDUAL:
            out += extra
        out = tl.where(live[:, None], out, 0.0)
        tl.store(y + (b * stride_yb + t * stride_yt)[:, None] + co[None, :] * stride_yc, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(repr=fixed_name("causal_conv1d_update_remember"))
def remember_kernel(
    x, state, positions, slots, L, c_in, n_slots, history, offset,
    stride_xb, stride_xc, stride_xt, stride_sn, stride_sc, stride_st,
    HAS_SLOTS: tl.constexpr, BY_SLOT: tl.constexpr, ADVANCE: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes the last steps of x [B, C_in, L] to a circular state; ADVANCE, of one program a row, then adds L to the row's position."""
    _wait(PDL)
    _remember(
        tl.program_id(0), x, state, positions, slots, L, c_in, n_slots, history, offset,
        stride_xb, stride_xc, stride_xt, stride_sn, stride_sc, stride_st, HAS_SLOTS, BY_SLOT, BLOCK_M, BLOCK_C,
    )  # fmt: skip
    if ADVANCE:
        b = tl.program_id(0).to(tl.int64)
        slot, live = _slot(slots, b, n_slots, HAS_SLOTS)
        if live:
            position = tl.load(positions + slot)
            tl.debug_barrier()  # every warp has read the position, here and in _remember, before one of them writes it
            tl.store(positions + slot, position + L)


@triton.jit(repr=fixed_name("causal_conv1d_update_shift"))
def shift_kernel(
    x, state, slots, L, c_in, n_slots, history, stride_xb, stride_xc, stride_xt, stride_sn, stride_sc, stride_st,
    HAS_SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The last `history` steps of cat(state, x), in place of state; a program owns all the steps of a block of channels of one slot.

    In blocks of steps from the oldest on: a block reads L steps behind where it writes, so that none reads what an earlier one wrote;
    within a block, the barrier stands between the reads and the writes.
    """
    n_c = tl.cdiv(c_in, BLOCK_C)
    b = (tl.program_id(0) // n_c).to(tl.int64)
    c = (tl.program_id(0) % n_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    slot, live = _slot(slots, b, n_slots, HAS_SLOTS)
    if live:
        for first in range(0, history, BLOCK_M):
            to = first + tl.arange(0, BLOCK_M).to(tl.int64)
            mask = (to < history)[:, None] & (c < c_in)[None, :]
            step = (to + L - history)[:, None]
            from_x = x + b * stride_xb + step * stride_xt + c[None, :] * stride_xc
            from_state = state + slot * stride_sn + (step + history) * stride_st + c[None, :] * stride_sc
            values = _either(step >= 0, from_x, from_state, mask)
            tl.debug_barrier()
            tl.store(state + slot * stride_sn + to[:, None] * stride_st + c[None, :] * stride_sc, values, mask=mask)


@triton.jit(repr=fixed_name("causal_conv1d_update_prepend"))
def prepend_kernel(
    x, state, out, positions, slots, L, c_in, n_slots, history, offset,
    stride_xb, stride_xc, stride_xt, stride_sn, stride_sc, stride_st,
    HAS_SLOTS: tl.constexpr, HAS_POSITIONS: tl.constexpr, BY_SLOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out, contiguous [B, history + L, C_in]: the state of each row, oldest first, then x [B, C_in, L]; zeros for an empty row."""
    steps = history + L
    n_c, n_m = tl.cdiv(c_in, BLOCK_C), tl.cdiv(steps, BLOCK_M)
    tile = tl.program_id(0)
    b = (tile // n_c // n_m).to(tl.int64)
    c = (tile % n_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    to = tile // n_c % n_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    mask = (to < steps)[:, None] & (c < c_in)[None, :]
    slot, live = _slot(slots, b, n_slots, HAS_SLOTS)
    base = _base(positions, b, slot, history, 0, HAS_POSITIONS, BY_SLOT)
    step = to - history
    from_x = x + b * stride_xb + step[:, None] * stride_xt + c[None, :] * stride_xc
    kept = offset + _entry(base, step, history)
    from_state = state + slot * stride_sn + kept[:, None] * stride_st + c[None, :] * stride_sc
    known = mask & (c < tl.where(live, c_in, 0))[None, :]
    values = _either((step >= 0)[:, None], from_x, from_state, known)
    tl.store(out + (b * steps + to)[:, None] * c_in + c[None, :], values, mask=mask)


@triton.jit(repr=fixed_name("embedding_norm"))
def embedding_norm_kernel(
    ids, embedding, weight, bias, out, L, channels, n_ids, eps, stride_ib, stride_it, stride_en, stride_ec, stride_w, stride_b,
    PDL: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out, contiguous [B, L, C]: the LayerNorm of the embedding of one id a program (Eq. 1); NaN for an id that there is not."""
    _wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = c < channels
    i = tl.load(ids + row // L * stride_ib + row % L * stride_it).to(tl.int64)
    known = (i >= 0) & (i < n_ids)
    e = tl.load(embedding + tl.where(known, i, 0) * stride_en + c.to(tl.int64) * stride_ec, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, e - tl.sum(e, 0) / channels, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / channels + eps)
    w = tl.load(weight + c.to(tl.int64) * stride_w, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + c.to(tl.int64) * stride_b, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(known, centred * scale * w + shift, float("nan"))
    tl.store(out + row * channels + c, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _remember(
    program, x, state, positions, slots, L, c_in, n_slots, history, offset,
    stride_xb, stride_xc, stride_xt, stride_sn, stride_sc, stride_st,
    HAS_SLOTS: tl.constexpr, BY_SLOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of the steps of one row of x [B, C_in, L] to where a circular state keeps them; of L > history steps, the last ones."""
    count = tl.minimum(L, history)
    n_m = tl.maximum(tl.cdiv(count, BLOCK_M), 1)
    b = (program // n_m).to(tl.int64)
    slot, live = _slot(slots, b, n_slots, HAS_SLOTS)
    base = _base(positions, b, slot, history, L, True, BY_SLOT)
    m = program % n_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    t = L - count + m
    kept = offset + _entry(base, m - count, history)
    wanted = tl.where(live, count, 0)
    for first in range(0, c_in, BLOCK_C):
        c = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
        mask = (m < wanted)[:, None] & (c < c_in)[None, :]
        values = tl.load(x + b * stride_xb + t[:, None] * stride_xt + c[None, :] * stride_xc, mask=mask)  # [M, C]
        tl.store(state + slot * stride_sn + kept[:, None] * stride_st + c[None, :] * stride_sc, values, mask=mask)


@triton.jit
def _slot(slots, b, n_slots, HAS_SLOTS: tl.constexpr):
    """The slot of row b, and whether there is such a slot: 0 and no where not, so that no address outside the state is formed."""
    if HAS_SLOTS:
        slot = tl.load(slots + b, cache_modifier=".cg").to(tl.int64)
        live = (slot >= 0) & (slot < n_slots)
        return tl.where(live, slot, 0), live
    else:
        return b, b >= 0


@triton.jit
def _base(positions, b, slot, history, ahead, HAS_POSITIONS: tl.constexpr, BY_SLOT: tl.constexpr):
    """Where the state keeps the step that comes `ahead` steps after those before this call; of a shifted state, the end: 0."""
    if not HAS_POSITIONS:
        return b * 0
    else:
        position = tl.load(positions + (slot if BY_SLOT else b), cache_modifier=".cg").to(tl.int64)
        base = (position + ahead) % tl.maximum(history, 1)
        return tl.where(base < 0, base + history, base)  # of a position below 0, so that no address outside the state is formed


@triton.jit
def _entry(base, step, history):
    """Where the state keeps what lies `step` steps from `base`, step in [-history, 0). One remainder a row, and none in the loops."""
    entry = base + step
    return tl.where(entry < 0, entry + history, entry)


@triton.jit
def _either(new, from_x, from_state, mask):
    """[M, C], zeros where the mask is not. Not one load by `where` of pointers, which Triton 3.6 cannot compile for AMD."""
    behind = tl.load(from_state, mask=mask & (new == 0), other=0.0)
    return tl.where(new, tl.load(from_x, mask=mask & new, other=0.0), behind)


@triton.jit
def _tap(weight, k, c, o, c_in, inside, stride_wo, stride_wi, stride_wk):
    """[G, C_in/G, C_out]"""
    return tl.load(
        weight + k * tl.cast(stride_wk, tl.int64) + c[:, :, None] * stride_wi + o[None, None, :] * stride_wo,
        mask=(c < c_in)[:, :, None] & inside[None, None, :],
        other=0.0,
        cache_modifier=".cg",
    )


@triton.jit
def _wait(PDL: tl.constexpr):
    """Until all launches before this one have ended; from then on the next one may start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
