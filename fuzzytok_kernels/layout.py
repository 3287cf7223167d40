"""How a logical (B, C, T) tensor lies in memory: the rule that every op, its fake and its reference share."""

from collections.abc import Sequence

from torch import Tensor


def is_channels_last(strides: Sequence[int]) -> bool:
    """True if, by its strides, a (B, C, T) tensor has its channels adjacent in memory and its time steps not."""
    return strides[1] == 1 and strides[2] != 1


def output_strides(strides: Sequence[int], channels: int, T: int) -> tuple[int, int, int]:
    """The strides of an output (B, channels, T): channels-last if the input, which has `strides`, is; else channels-first contiguous."""
    steps = max(T, 1)  # as PyTorch's own tensors without elements
    return (steps * channels, 1, channels) if is_channels_last(strides) else (steps * channels, steps, 1)


def empty_output(x: Tensor, channels: int) -> Tensor:
    """An unwritten (B, channels, T) tensor in the layout of `x` (B, C, T)."""
    B, _, T = x.shape
    return x.new_empty_strided((B, channels, T), output_strides(x.stride(), channels, T))


def empty_of_bytes(embedding: Tensor, ids: Tensor) -> Tensor:
    """An unwritten, channels-last (B, C, T) tensor, for ids (B, T) and embedding (V, C)."""
    return embedding.new_empty((*ids.shape, embedding.shape[1])).mT


def empty_weight(x: Tensor, c_out: int, c_in: int, kernel_size: int) -> Tensor:
    """An unwritten (C_out, C_in, K) tensor, tap-major: (K, C_out, C_in) in memory, which the kernels read and write as it is."""
    return x.new_empty_strided((c_out, c_in, kernel_size), (c_in, 1, c_out * c_in))


def laid_out_as(x: Tensor, value: Tensor) -> Tensor:
    """`value` (B, channels, T), copied if it does not lie as an output of `x` (B, C, T) does. Differentiable."""
    return value.mT.contiguous().mT if is_channels_last(x.stride()) else value.contiguous()


def in_layout_of(like: Tensor, value: Tensor) -> Tensor:
    """`value`, copied if its strides are not those of the unwritten tensor `like`."""
    return value if value.stride() == like.stride() else like.copy_(value)
