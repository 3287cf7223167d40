"""What a plan knows of a tensor, and the descriptors that the TMA kernels read and write through."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fuzzytok_kernels.kernels.sequences import row_length
from fuzzytok_kernels.kernels.transpose import channels_last_kernel, planes_kernel
from fuzzytok_kernels.program import Kernel, cdiv

_MOST = 2**31 - 2**16  # sides and bounds: any that a coordinate can be
PLANES = 2  # in bf16, that TF32 is read as by the weight-grad, see `kernels/weight_grad.py`

Described = tuple[Callable[[Tensor], TensorDescriptor], Tensor]  # as `private_triton.described` takes it


class Traits(NamedTuple):
    """All that a plan, and a check, needs to know of a tensor."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool  # to 16 bytes


def traits(x: Tensor) -> Traits:
    return tuple.__new__(Traits, (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0))  # half the time of Traits(...)


class Rows(NamedTuple):
    """The axes of a descriptor that stand for batch and time, those of a batch or of packed sequences: see `kernels/sequences.py`."""

    shape: list[int]
    strides: list[int]
    block: list[int]

    @classmethod
    def of(cls, B: int, T: int, stride_b: int, stride_t: int, block_t: int, packed: bool, looks_on: bool) -> "Rows":
        if not packed:
            return cls([B, T], [stride_b, stride_t], [1, block_t])
        side = row_length.fn()
        if not looks_on:
            return cls([_MOST, side], [stride_t, stride_t], [1, block_t])
        return cls([_MOST, _MOST, side], [2**64 // side - stride_t, stride_t, stride_t], [1, 1, block_t])


def descriptor(shape: list[int], strides: list[int], block: list[int]) -> Callable[[Tensor], Described]:
    """Makes the descriptor of any tensor that lies so. Triton checks the first alone, a plan's tensors being alike: 2 us -> 0.3."""
    fields: dict[str, Any] = {}

    def describe(x: Tensor) -> TensorDescriptor:
        if not fields:
            fields.update(vars(TensorDescriptor(x, shape, strides, block)), base=None)
        made = object.__new__(TensorDescriptor)
        vars(made).update(fields, base=x)
        return made

    return lambda x: (describe, x)


def rows(x: Traits, block_t: int, block_c: int, packed: bool = False, looks_on: bool = False) -> Callable[[Tensor], Described]:
    """Makes the descriptor of [B, T, C] of an x (B, C, T), of its `channels_last` copy if it does not lie so already.

    Of the rows of packed sequences, which begin with one, or end with it where a kernel looks on.
    """
    (B, channels, T), (stride_b, stride_c, stride_t) = x.shape, x.strides
    there, copied = (Rows.of(B, T, *strides, block_t, packed, looks_on) for strides in ((stride_b, stride_t), (T * channels, channels)))
    shape, block = [*there.shape, channels], [*there.block, block_c]
    if _describable(x, *there.strides, stride_c):
        return descriptor(shape, [*there.strides, 1], block)
    copy, describe = channels_last(x), descriptor(shape, [*copied.strides, 1], block)
    return lambda x: describe(copy(x))


def channels_last(x: Traits, tile: int = 64, rounded: bool = False) -> Callable[[Tensor], Tensor]:
    """Makes the contiguous copy [B, T, C] of an x (B, C, T), `rounded` to TF32 if asked, in blocks of `tile` steps and channels.

    24 us for (32, 256, 2048) in bf16 on an H100, PyTorch's own takes 114.
    """
    B, channels, T = x.shape
    copy = Kernel(channels_last_kernel, B * cdiv(T, tile) * cdiv(channels, tile), (rounded, tile, tile))
    numbers = T, channels, *x.strides

    def copied(x: Tensor) -> Tensor:
        rows = x.new_empty((B, T, channels))
        copy(x, rows, *numbers)
        return rows

    return copied


def planes(x: Traits, block_t: int, block_c: int, packed: bool, n_rows: int) -> Callable[[Tensor, Tensor | None], Described]:
    """Makes the descriptor of the planes of an x (B, C, T), [PLANES * B, T, C] or packed rows, and n_rows of sums in a second tensor.

    See `kernels/transpose.planes_kernel`.
    """
    (B, channels, T), width = x.shape, cdiv(x.shape[1], 8) * 8  # rows of 16 bytes
    split = Kernel(planes_kernel, n_rows * cdiv(channels, 64), (PLANES, 64, 64))
    steps = Rows.of(PLANES * B, T, T * width, width, block_t, packed, looks_on=False)
    describe = descriptor([*steps.shape, channels], [*steps.strides, 1], [*steps.block, block_c])

    def described(x: Tensor, sums: Tensor | None) -> Described:
        out = x.new_empty((PLANES, B, T, width), dtype=torch.bfloat16)
        split(x, out, sums, B, T, channels, width, *x.stride(), n_rows)
        return describe(out)

    return described


def rows_or_columns(x: Traits, block_t: int, block_c: int, packed: bool) -> tuple[Callable[[Tensor], Described], bool]:
    """Makes the descriptor of `rows`, or of [B, C, T] where x lies so and T is aligned; says whether it is the first.

    The second for a tensor that is not shifted in time, so not a packed one: a shift by less than 16 bytes along the last axis is an
    illegal instruction on an H100.
    """
    (B, channels, T), (stride_b, stride_c, stride_t) = x.shape, x.strides
    if not packed and not _describable(x, stride_b, stride_t, stride_c) and _describable(x, stride_b, stride_c, stride_t):
        return descriptor([B, channels, T], [stride_b, stride_c, 1], [1, block_c, block_t]), False
    return rows(x, block_t, block_c, packed), True


def taps(
    weight: Traits, axes: tuple, parts: int, block_in: int, block_out: int, rounded: bool
) -> tuple[Callable[[Tensor], Described], bool]:
    """Makes the descriptor of a weight that `axes` turn into (K, C_out, C_in): [K, parts, C_out/parts, C_in], or [K, C_in, C_out].

    The second for a weight that lies so, and of one part; says whether it is the first. A weight that lies in neither way is copied, and
    so is one that is to be `rounded` to TF32: what a kernel rounds in registers has to go through shared memory once more.
    """
    K, c_out, c_in = (weight.shape[axis] for axis in axes)
    stride_k, stride_out, stride_in = (weight.strides[axis] for axis in axes)
    shape, block = [K, parts, c_out // parts, c_in], [1, parts, block_out // parts, block_in]
    if not rounded:
        if _describable(weight, stride_k, stride_out, stride_in):
            return descriptor(shape, [stride_k, c_out // parts * stride_out, stride_out, 1], block), True
        # The tensor cores take 32-bit operands only with the summed axis last.
        if parts == 1 and weight.dtype.itemsize == 2 and _describable(weight, stride_k, stride_in, stride_out):
            return descriptor([K, c_in, c_out], [stride_k, stride_in, 1], [1, block_in, block_out]), False
    describe = descriptor(shape, [c_out * c_in, c_out // parts * c_in, c_in, 1], block)
    turned = weight._replace(shape=torch.Size((K, c_in, c_out)), strides=(stride_k, stride_in, stride_out))
    copy = channels_last(turned, 32, rounded)
    return lambda weight: describe(copy(weight)), True


def as_it_is(x: Any) -> Any:
    """A tensor for the kernels on pointers."""
    return x


def _describable(x: Traits, *strides: int) -> bool:
    row = 16 // x.dtype.itemsize
    *outer, inner = strides
    return x.aligned and inner == 1 and all(stride > 0 and stride % row == 0 for stride in outer)
