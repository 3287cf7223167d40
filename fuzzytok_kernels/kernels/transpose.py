"""The copies that the descriptor path may need: any (B, C, T) tensor to channels-last, as it is, rounded to TF32 or as planes in bf16."""

import triton
import triton.language as tl

from fuzzytok_kernels.kernels.dot import nearest_tf32
from fuzzytok_kernels.profile import fixed_name, moved_metadata


@triton.jit(repr=fixed_name("causal_conv1d_channels_last"), launch_metadata=moved_metadata)
def channels_last_kernel(
    x, out, T, channels, stride_b, stride_c, stride_t, ROUND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """x (B, C, T) of any strides -> out contiguous [B, T, C], in the nearest TF32 if ROUND. Offsets are 64-bit.

    One grid axis counts all tiles.
    """
    n_c, n_t = tl.cdiv(channels, BLOCK_C), tl.cdiv(T, BLOCK_T)
    tile = tl.program_id(0)
    c = tile % n_c * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    t = tile // n_c % n_t * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    b = (tile // n_c // n_t).to(tl.int64)
    mask = (c < channels)[:, None] & (t < T)[None, :]
    values = tl.load(x + b * stride_b + c[:, None] * stride_c + t[None, :] * stride_t, mask=mask)  # [C, T]
    if ROUND:
        values = nearest_tf32(values)
    tl.store(out + (b * T + t[:, None]) * channels + c[None, :], values.T, mask=mask.T)


@triton.jit(do_not_specialize=["B", "n_rows"], repr=fixed_name("causal_conv1d_planes"), launch_metadata=moved_metadata)
def planes_kernel(
    x, out, sums, B, T, channels, width, stride_b, stride_c, stride_t, n_rows,
    PLANES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x (B, C, T) of any strides, fp32 -> out, contiguous [PLANES, B, T, width], bf16: the nearest to x, and to what is then left of it.

    Of the channels [0, C) alone. Persistent, n_rows programs for each block of channels, of which each writes what it has summed over time,
    exact but for fp32's rounding, to its row of `sums` [n_rows, C], if there is one.
    """
    n_c, n_t = tl.cdiv(channels, BLOCK_C), tl.cdiv(T, BLOCK_T)
    row = tl.program_id(0) // n_c
    c = tl.program_id(0) % n_c * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    total = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(row, B * n_t, n_rows):
        b = (tile // n_t).to(tl.int64)
        t = tile % n_t * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        mask = (t < T)[:, None] & (c < channels)[None, :]
        rest = tl.load(x + b * stride_b + t[:, None] * stride_t + c[None, :] * stride_c, mask=mask, other=0.0)  # [T, C]
        if sums is not None:
            total += tl.sum(rest, axis=0)
        for p in tl.static_range(PLANES):
            plane = rest.to(out.dtype.element_ty)
            tl.store(out + ((p * tl.cast(B, tl.int64) + b) * T + t[:, None]) * width + c[None, :], plane, mask=mask)
            rest -= plane.to(tl.float32)
    if sums is not None:
        tl.store(sums + row.to(tl.int64) * channels + c, total, mask=c < channels)
