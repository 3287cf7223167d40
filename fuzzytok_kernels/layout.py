"""How a logical (B, C, T) tensor lies in memory: the rule that every op, its fake and its reference share."""

from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """True if the channels of `x` (B, C, T) are adjacent in memory and its time steps are not."""
    return x.stride(1) == 1 and x.stride(2) != 1


def empty_output(x: Tensor, channels: int) -> Tensor:
    """An unwritten (B, channels, T) tensor: channels-last if `x` (B, C, T) is, else channels-first contiguous."""
    B, _, T = x.shape
    if is_channels_last(x):
        return x.new_empty((B, T, channels)).transpose(1, 2)
    return x.new_empty((B, channels, T))


def empty_weight(x: Tensor, c_out: int, c_in: int, kernel_size: int) -> Tensor:
    """An unwritten (C_out, C_in, K) tensor, tap-major: a view of (K, C_out, C_in) storage, which the kernels read and write as it is."""
    return x.new_empty((kernel_size, c_out, c_in)).permute(1, 2, 0)


def in_layout_of(like: Tensor, value: Tensor) -> Tensor:
    """`value`, copied if its strides are not those of the unwritten tensor `like`."""
    return value if value.stride() == like.stride() else like.copy_(value)
