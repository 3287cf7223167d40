"""The launchers of the look-ups by byte: the same functions as `reference`'s, on Triton.

Their configs are fixed, and no ops of the tuner: the large kernels wait for memory, and their blocks follow from what has to stay in L1
and in registers (see `kernels/byte_conv.py` and `kernels/byte_grad.py`); the small ones are bound by their launch.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fuzzytok_kernels.checks import CHECKS
from fuzzytok_kernels.descriptors import Traits, as_it_is, channels_last, traits
from fuzzytok_kernels.kernels.byte_conv import byte_conv_kernel
from fuzzytok_kernels.kernels.byte_grad import order_kernel, rank_kernel, share_kernel, sum_slots_kernel
from fuzzytok_kernels.kernels.byte_table import embedding_grad_kernel, table_kernel, tap_grad_kernel
from fuzzytok_kernels.layout import empty_of_bytes, empty_weight
from fuzzytok_kernels.program import Kernel, cdiv, has_pdl, launched, named, on
from fuzzytok_kernels.reference import GATES, check_range
from fuzzytok_kernels.support import approximates, facts

_plans = functools.lru_cache(maxsize=4096)
_TILE = 2048  # elements of a tile of the forward: 16 results a thread
_PAIRS = True
_STORE, _READ = "", ""
_LINE = 128  # bytes of a row of the table that a program keeps to, see `kernels/byte_conv.py`
_PROGRAMS = {2: 7, 4: 5}  # a multiprocessor, by their registers and so by the bytes of an element
_SHARE = 64  # steps of a share: the least that the tensor cores of Hopper take at once; half of it elsewhere, where 64 spill registers
_SHARE_CHANNELS = 64
_SHARE_OPTIONS = {}
_CHUNK = 16_384
_SORTED, _COMPARED = 256, 32  # steps that one program sorts, by comparing all with all, 32 at a time
_SUMMED = (16, 256)  # slots and columns at a time
_TABLE = (32, 64, 256)  # ids, output channels, and input channels in 16 bits, all at once: it waits for memory once
_EMBEDDING_GRAD = (16, 128, 32)  # few ids, so that all multiprocessors have a block
_TAP_GRAD = (64, 64, 32)


def byte_causal_conv1d(
    ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, activation: str, cu_seqlens: Tensor | None = None
) -> Tensor:
    """ids (B, T), embedding (V, C), weight (C_out, C, K), bias (C_out,) -> y (B, C, T)."""
    plan = _forward_plan(*map(traits, (ids, embedding, weight)), _or_none(bias), dilation, activation, _or_none(cu_seqlens))
    check_range(ids, len(embedding))
    return plan(ids, embedding, weight, bias, cu_seqlens)


def byte_causal_conv1d_grad(
    grad_y: Tensor, ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor | None,
    dilation: int, activation: str, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """grad_y (B, C, T) and the arguments of `byte_causal_conv1d` -> the gradients of embedding, weight and bias."""
    traits_of_all = map(traits, (grad_y, ids, embedding, weight))
    plan = _grad_plan(*traits_of_all, _or_none(bias), dilation, activation, _or_none(cu_seqlens))
    check_range(ids, len(embedding))
    return plan(grad_y, ids, embedding, weight, bias, cu_seqlens)


@_plans
def _forward_plan(
    ids: Traits, embedding: Traits, weight: Traits, bias: Traits | None, dilation: int, activation: str, cu_seqlens: Traits | None
) -> Callable[..., Tensor]:
    CHECKS["byte_causal_conv1d"](ids, embedding, weight, bias, dilation, activation, cu_seqlens)
    (B, T), (V, channels), K = ids.shape, embedding.shape, weight.shape[2]
    if B * T == 0:
        return lambda ids, embedding, *others: empty_of_bytes(embedding, ids)
    look_up = _look_up(ids, embedding, weight, dilation, activation, cu_seqlens, embedding.dtype)
    make_table = _table(embedding, weight, bias, embedding.dtype)

    def forward(ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        y = empty_of_bytes(embedding, ids)
        look_up(ids, make_table(embedding, weight, bias), cu_seqlens, None, y)
        return y

    return on(ids.device, named("byte_causal_conv1d", forward))


@_plans
def _grad_plan(
    grad_y: Traits, ids: Traits, embedding: Traits, weight: Traits, bias: Traits | None,
    dilation: int, activation: str, cu_seqlens: Traits | None,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    CHECKS["byte_causal_conv1d_grad"](grad_y, ids, embedding, weight, bias, dilation, activation, cu_seqlens)
    (B, T), (V, channels), (c_out, _, K) = ids.shape, embedding.shape, weight.shape
    n_steps, width = B * T, K * c_out + channels
    products = _products(embedding)
    table_grads = _table_grads(embedding, weight, products)
    if n_steps == 0:
        return lambda grad_y, ids, embedding, weight, *others: table_grads(
            embedding.new_zeros((V, width), dtype=torch.float32), embedding, weight
        )
    read_grad: Callable[[Tensor], Tensor] = as_it_is
    grad_strides = grad_y.strides[0], grad_y.strides[2]
    if grad_y.strides[1] != 1:
        read_grad, grad_strides = channels_last(grad_y), (T * channels, channels)
    strides_of_p = grad_strides if activation == "none" else (T * c_out, c_out)
    wide = _is_wide(ids, K, dilation, c_out, embedding, weight, grad_y)
    ordered, chunk, chunks = _order(ids, V, wide)
    grad_of_p = _activation_grad(ids, embedding, weight, bias, dilation, activation, cu_seqlens, grad_strides)
    steps, pdl = _SHARE if facts(ids.device).descriptors else _SHARE // 2, has_pdl(ids.device)
    shares, block_c = cdiv(n_steps, steps), min(_SHARE_CHANNELS, _power_of_two(channels))
    share = Kernel(
        share_kernel, shares * (K + 1), (wide, K, _precision(ids.device), pdl, steps, block_c), **launched(pdl), **_SHARE_OPTIONS
    )
    sum_slots = Kernel(sum_slots_kernel, V * cdiv(width, _SUMMED[1]), (steps, products, pdl, *_SUMMED), **launched(pdl))
    numbers = (n_steps, T, V, channels, c_out, min(dilation, T), *_searches(cu_seqlens), _stride(cu_seqlens), *strides_of_p, *grad_strides)

    def gradients(
        grad_y: Tensor, ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_y = read_grad(grad_y)
        order, keys, ends = ordered(ids)
        grad_p = grad_of_p(grad_y, ids, embedding, weight, bias, cu_seqlens)
        partial = embedding.new_empty((shares + chunks * (V + 1), width), dtype=torch.float32)
        share(order, keys, cu_seqlens, grad_p, grad_y, partial, *numbers)
        grad_table = partial.new_empty((V, width))
        sum_slots(partial, ends, grad_table, V, chunks, chunk, width)
        return table_grads(grad_table, embedding, weight)

    return on(ids.device, named("byte_causal_conv1d_grad", gradients))


def _look_up(
    ids: Traits, embedding: Traits, weight: Traits, dilation: int, activation: str, cu_seqlens: Traits | None,
    dtype: torch.dtype, grad_strides: tuple[int, int] | None = None,
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor], None]:  # fmt: skip
    """The look-ups in a table of `dtype`; with the strides of a batch entry and a step of grad_y, the gradient before the activation."""
    (B, T), (V, channels), K = ids.shape, embedding.shape, weight.shape[2]
    block_c = min(_LINE // 2 // dtype.itemsize, _power_of_two(channels))
    block_t = min(_TILE // 2 // block_c, _power_of_two(T))
    wide = _is_wide(ids, K, dilation, weight.shape[0], embedding, weight)
    programs = _persistent(ids.device, cdiv(channels, 2 * block_c), B * cdiv(T, block_t), _PROGRAMS[dtype.itemsize])
    approximate, pdl = approximates(embedding.dtype, ids.device), has_pdl(ids.device)
    parts = 2 if activation in GATES else 1
    constants = (
        wide,
        K,
        parts,
        activation,
        grad_strides is not None,
        approximate,
        approximate and _PAIRS,
        pdl,
        _STORE,
        _READ,
        block_t,
        block_c,
    )
    kernel = Kernel(byte_conv_kernel, programs, constants, **launched(pdl))
    numbers = (B, T, V, channels, min(dilation, T), *_searches(cu_seqlens), *ids.strides, _stride(cu_seqlens), *(grad_strides or (0, 0)))
    return lambda *tensors: kernel(*tensors, *numbers)


def _activation_grad(
    ids: Traits, embedding: Traits, weight: Traits, bias: Traits | None, dilation: int, activation: str, cu_seqlens: Traits | None,
    grad_strides: tuple[int, int],
) -> Callable[..., Tensor]:  # fmt: skip
    """The gradient [B, T, C_out] before the activation."""
    if activation == "none":
        return lambda grad_y, *others: grad_y
    dtype = torch.float32 if activation == "relu" else embedding.dtype  # rounded, a p near 0 would change its sign
    make_table = _table(embedding, weight, bias, dtype)
    look_up = _look_up(ids, embedding, weight, dilation, activation, cu_seqlens, dtype, grad_strides)

    def gradient(grad_y: Tensor, ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        grad_p = embedding.new_empty((*ids.shape, weight.shape[0]))
        look_up(ids, make_table(embedding, weight, bias), cu_seqlens, grad_y, grad_p)
        return grad_p

    return gradient


def _order(ids: Traits, n_ids: int, wide: bool) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], int, int]:
    """What sorts the steps by chunk and id: the steps in this order, the key of each, and where each key ends in each block of steps; then how
    many blocks a chunk has, and how many chunks there are.
    """
    B, T = ids.shape
    n_steps, n_blocks, dtype = B * T, cdiv(B * T, _SORTED), torch.int64 if wide else torch.int32
    chunk, pdl = min(n_blocks, _CHUNK // _SORTED), has_pdl(ids.device)
    chunks = cdiv(n_blocks, chunk)
    rank = Kernel(rank_kernel, chunks * chunk, (wide, pdl, _SORTED, _COMPARED), num_warps=8, **launched(pdl))
    order_by_key = Kernel(order_kernel, n_blocks, (wide, pdl, _SORTED), **launched(pdl))
    numbers = (n_steps, T, n_ids, chunk, *ids.strides)

    def ordered(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ranks, counts = (ids.new_empty(n, dtype=torch.int32) for n in (n_steps, (n_ids + 1) * chunks * chunk))
        rank(ids, ranks, counts, *numbers)
        ends, order, keys = counts.cumsum(0, dtype=dtype), ranks.new_empty(n_steps, dtype=dtype), ranks.new_empty(n_steps, dtype=dtype)
        order_by_key(ids, ranks, ends, order, keys, *numbers)
        return order, keys, ends

    return ordered, chunk, chunks


def _table(embedding: Traits, weight: Traits, bias: Traits | None, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Makes the table [V + 1, K * C_out + C], with a line's elements behind it, see `kernels/byte_conv.looked_up`."""
    (V, channels), (c_out, _, K) = embedding.shape, weight.shape
    most = (*_TABLE[:2], 2 * _TABLE[2] // embedding.dtype.itemsize)
    block_v, block_o, _ = blocks = _blocks(most, V + 1, c_out, channels)
    programs = cdiv(V + 1, block_v) * (K * cdiv(c_out, block_o) + cdiv(channels, block_o))
    pdl = has_pdl(embedding.device)
    kernel = Kernel(table_kernel, programs, (K, _precision(embedding.device), pdl, *blocks), num_stages=2, **launched(pdl))
    numbers = V, channels, c_out, *embedding.strides, *weight.strides, _stride(bias)

    def make(embedding: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        table = embedding.new_empty((V + 1) * (K * c_out + channels) + _LINE, dtype=dtype)
        kernel(embedding, weight, bias, table, *numbers)
        return table

    return make


def _table_grads(embedding: Traits, weight: Traits, precision: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The gradients of embedding, weight and bias from that of the table."""
    (V, channels), (c_out, _, K) = embedding.shape, weight.shape
    pdl = has_pdl(embedding.device)
    block_v, _, block_i = blocks = _blocks(_EMBEDDING_GRAD, V, c_out, channels)
    of_embedding = Kernel(embedding_grad_kernel, cdiv(V, block_v) * cdiv(channels, block_i), (K, precision, pdl, *blocks), **launched(pdl))
    _, block_o, block_i = blocks = _blocks(_TAP_GRAD, V, c_out, channels)
    of_taps = Kernel(tap_grad_kernel, K * cdiv(c_out, block_o) * cdiv(channels, block_i), (K, precision, pdl, *blocks), **launched(pdl))
    sizes, strides, weight_strides = (V, channels, c_out), embedding.strides, weight.strides

    def gradients(grad_table: Tensor, embedding: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad_embedding, grad_bias = embedding.new_empty((V, channels)), embedding.new_empty(c_out)
        grad_weight = empty_weight(embedding, c_out, channels, K)
        of_embedding(grad_table, weight, grad_embedding, *sizes, *weight_strides)
        of_taps(grad_table, embedding, grad_weight, grad_bias, *sizes, *strides)
        return grad_embedding, grad_weight, grad_bias

    return gradients


def _blocks(most: tuple[int, ...], *sizes: int) -> tuple[int, ...]:
    return tuple(min(block, _power_of_two(size)) for block, size in zip(most, sizes, strict=True))


def _precision(device: torch.device) -> str:
    """`input_precision` of fp32 dots: strict whatever the switches say, for these products take no time."""
    return "tf32x3" if facts(device).tf32 else "ieee"


def _products(embedding: Traits) -> str:
    """`input_precision` of the products with the table's gradient. TF32 has the digits of fp16, to which PyTorch rounds every step's."""
    return "tf32" if embedding.dtype.itemsize == 2 and facts(embedding.device).tf32 else _precision(embedding.device)


def _searches(cu_seqlens: Traits | None) -> tuple[int, int]:
    """How many sequences there are, and in how many halvings one of them is found."""
    if cu_seqlens is None:
        return 1, 0
    n = cu_seqlens.shape[0] - 1
    return n, n.bit_length()


def _persistent(device: torch.device, blocks: int, tiles: int, most: int) -> int:
    """How many programs: as many for each of `blocks` of channels, `most` a multiprocessor."""
    return blocks * max(1, min(tiles, most * facts(device).multiprocessors // blocks))


def _is_wide(ids: Traits, kernel_size: int, dilation: int, c_out: int, embedding: Traits, weight: Traits, *others: Traits) -> bool:
    """Whether steps and offsets need 64 bits; else 32 take less time."""
    (B, T), (V, channels) = ids.shape, embedding.shape
    n_steps, reach = B * T, kernel_size * min(dilation, T)
    width = kernel_size * weight.shape[0] + channels
    spans = (sum((n - 1) * stride for n, stride in zip(x.shape, x.strides, strict=True)) for x in (ids, *others))
    slots = n_steps // (_SHARE // 2) + cdiv(n_steps, _CHUNK) * (V + 1) + 1
    return max(n_steps * max(c_out, kernel_size) + (reach + _TILE) * c_out, slots * width, *spans) >= 2**31


def _power_of_two(size: int) -> int:
    """`size`, rounded up to one that a block can have."""
    return max(16, 1 << (size - 1).bit_length())


def _or_none(x: Tensor | None) -> Traits | None:
    return None if x is None else traits(x)


def _stride(x: Traits | None) -> int:
    return 0 if x is None else x.strides[0]
