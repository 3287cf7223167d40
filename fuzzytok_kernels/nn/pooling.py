"""From bytes to words or patches and back, so that a language model runs on fewer positions than bytes. Deterministic, as the gradients."""

import torch
from torch import Tensor

from fuzzytok_kernels.checks import check_at_least, check_lengths


def segments_from_starts(starts: Tensor, lengths: Tensor | None = None) -> Tensor:
    """starts (B, T) bool, True where a segment begins -> the segment (B, T) long of each byte: 0, 1, 2, ..., or -1 for padding.

    A row's first byte begins segment 0 in any case. With lengths (B,), what lies behind them is padding.

    Raises:
        ValueError: starts is not (B, T), or lengths not (B,).
        TypeError: starts is not bool, or lengths neither int32 nor int64.
    """
    if starts.dim() != 2:
        raise ValueError(f"starts has shape {tuple(starts.shape)}; expected 2 dimensions (batch, time)")
    if starts.dtype != torch.bool:
        raise TypeError(f"starts has dtype {starts.dtype}; expected bool")
    steps = torch.arange(starts.shape[1], device=starts.device)
    segments = (starts & (steps > 0)).cumsum(1)
    if lengths is None:
        return segments
    check_lengths(lengths, "starts", starts)
    return segments.masked_fill(steps >= lengths[:, None], -1)


def pool(z: Tensor, segments: Tensor, count: int | None = None) -> Tensor:
    """The mean of z (B, T, C) over each segment of segments (B, T) -> (B, count, C) in the dtype of z; zeros for a segment without bytes.

    A segment below 0 counts nowhere. `count` None is the largest segment and one more, which waits for the GPU.

    A mean sees the whole of its segment: a model that predicts bytes may give them the mean of the segment *before*, see `unpool`.

    Raises:
        ValueError: segments is not (B, T), or reaches `count` (on a GPU that is an assertion of the device); a count below 0.
        TypeError: segments is neither int32 nor int64, or count no integer.
    """
    _check("z", z, segments)
    if count is None:
        count = int(segments.max()) + 1 if segments.numel() else 0
    else:
        check_at_least(0, "count", count)
        if segments.device.type == "cpu" and segments.numel() and segments.max() >= count:
            raise ValueError(f"segments reaches {segments.max()}; expected at most count - 1, {count - 1}")
    rows, inside = torch.arange(len(z), device=z.device)[:, None], segments >= 0
    index = rows, torch.where(inside, segments, 0)  # what lies outside adds a zero to segment 0: a zero even where z has a NaN
    wide = torch.promote_types(z.dtype, torch.float32)
    # index_put sums in a fixed order, where index_add and scatter_add would use atomics.
    sums = z.new_zeros(len(z), max(count, 1), z.shape[2], dtype=wide).index_put(index, _where(inside, z.to(wide)), accumulate=True)
    sizes = torch.zeros(len(z), max(count, 1), dtype=wide, device=z.device).index_put(index, inside.to(wide), accumulate=True)
    return (sums / sizes.clamp(min=1)[:, :, None])[:, :count].to(z.dtype)


def unpool(pooled: Tensor, segments: Tensor) -> Tensor:
    """Each byte gets what its segment has: pooled (B, S, C), segments (B, T) -> (B, T, C), zeros for a segment below 0.

    `unpool(pooled, segments - 1)` gives each byte what the segment before its own has, and zeros in the first: nothing that comes later.

    Raises:
        ValueError: segments is not (B, T), or reaches S (on a GPU that is an assertion of the device).
        TypeError: segments is neither int32 nor int64.
    """
    _check("pooled", pooled, segments)
    if not pooled.shape[1]:
        return pooled.new_zeros(*segments.shape, pooled.shape[2])
    rows, inside = torch.arange(len(pooled), device=pooled.device)[:, None], segments >= 0
    try:
        spread = pooled[rows, torch.where(inside, segments, 0)]
    except IndexError as error:
        raise ValueError(f"segments reaches {segments.max()}; expected at most {pooled.shape[1] - 1}, the last of pooled") from error
    return _where(inside, spread)


def _where(inside: Tensor, value: Tensor) -> Tensor:
    """value (B, T, C) where inside (B, T), and zeros elsewhere, whatever value has there."""
    return value.masked_fill(~inside[:, :, None], 0)


def _check(name: str, value: Tensor, segments: Tensor) -> None:
    if value.dim() != 3:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected 3 dimensions (batch, positions, channels)")
    T = value.shape[1] if name == "z" else segments.shape[-1]
    if segments.shape != (len(value), T):
        raise ValueError(f"segments has shape {tuple(segments.shape)}; expected {(len(value), T)}, one a byte of {name}")
    if segments.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"segments has dtype {segments.dtype}; expected int32 or int64")
