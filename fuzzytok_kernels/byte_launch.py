"""The launchers of the look-ups by byte: the same functions as `reference`'s, on Triton.

Their configs are fixed, and no ops of the tuner: the large kernels wait for memory, and their blocks follow from what has to stay in L1
and in registers (see `kernels/byte_conv.py` and `kernels/byte_grad.py`); the small ones are bound by their launch.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fuzzytok_kernels.checks import CHECKS
from fuzzytok_kernels.descriptors import Traits, traits
from fuzzytok_kernels.kernels.byte_conv import byte_conv_kernel
from fuzzytok_kernels.kernels.byte_grad import order_kernel, rank_kernel, share_kernel, sum_slots_kernel, tap_kernel
from fuzzytok_kernels.kernels.byte_table import embedding_grad_kernel, table_kernel, tap_grad_kernel
from fuzzytok_kernels.layout import empty_of_bytes, empty_weight
from fuzzytok_kernels.program import Kernel, cdiv, on
from fuzzytok_kernels.reference import GATES, check_range
from fuzzytok_kernels.support import facts

_plans = functools.lru_cache(maxsize=4096)
_TILE = 1024  # elements of half a tile of the forward: 16 results a thread
_CHANNELS = 16  # of half a tile at most, see `kernels/byte_conv.py`
_PROGRAMS = 5  # a multiprocessor, by their registers
_SHARE = 64  # steps of a share: the least that the tensor cores of Hopper take at once; half of it elsewhere, where 64 spill registers
_SORTED, _COMPARED = 128, 32  # steps that one program sorts, by comparing all with all, 32 at a time
_SUMMED = (16, 256)  # slots and columns at a time
_TABLE = (32, 64, 64)  # ids, output channels, input channels of a block of a product
_EMBEDDING_GRAD = (32, 64, 32)
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
    block_c = min(_CHANNELS, _power_of_two(channels))
    block_t = min(_TILE // block_c, _power_of_two(T))
    blocks, tiles = cdiv(channels, 2 * block_c), B * cdiv(T, block_t)
    programs = blocks * max(1, min(tiles, _PROGRAMS * facts(ids.device).multiprocessors // blocks))
    constants = (_is_wide(ids, K, dilation), K, 2 if activation in GATES else 1, activation, block_t, block_c)
    kernel = Kernel(byte_conv_kernel, programs, constants)
    make_table = _table(embedding, weight)
    numbers = (B, T, V, channels, min(dilation, T), *_searches(cu_seqlens), *ids.strides, _stride(bias), _stride(cu_seqlens))

    def look_up(ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        table, y = make_table(embedding, weight), empty_of_bytes(embedding, ids)
        kernel(ids, table, bias, cu_seqlens, y, *numbers)
        return y

    return on(ids.device, look_up)


@_plans
def _grad_plan(
    grad_y: Traits, ids: Traits, embedding: Traits, weight: Traits, bias: Traits | None,
    dilation: int, activation: str, cu_seqlens: Traits | None,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    CHECKS["byte_causal_conv1d_grad"](grad_y, ids, embedding, weight, bias, dilation, activation, cu_seqlens)
    (B, T), (V, channels), (c_out, _, K) = ids.shape, embedding.shape, weight.shape
    n_steps, width = B * T, K * c_out + channels
    table_grads = _table_grads(embedding, weight)
    if n_steps == 0:
        return lambda grad_y, ids, embedding, weight, *others: table_grads(
            embedding.new_zeros((V, width), dtype=torch.float32), embedding, weight
        )
    make_table, ordered = _table(embedding, weight), _order(ids, V, torch.int64 if _is_wide(ids, K, dilation) else torch.int32)
    steps = _SHARE if facts(ids.device).descriptors else _SHARE // 2
    shares, block_c, precision = cdiv(n_steps, steps), _power_of_two(channels), _precision(ids.device)
    share_constants = (K, c_out // channels, activation, precision, steps, min(32, block_c))
    share = Kernel(share_kernel, shares, share_constants, num_warps=8, num_stages=1)
    taps = Kernel(tap_kernel, shares * (K - 1), (K, precision, steps, min(64, block_c)))
    sum_slots = Kernel(sum_slots_kernel, V * cdiv(width, _SUMMED[1]), (steps, *_SUMMED))
    sequences, stride_s = (min(dilation, T), *_searches(cu_seqlens)), _stride(cu_seqlens)
    numbers = (n_steps, T, V, channels, *sequences, *ids.strides, _stride(bias), stride_s, *grad_y.strides)

    def gradients(
        grad_y: Tensor, ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        table = make_table(embedding, weight)
        order, ordered_ids, ends, n_blocks = ordered(ids)
        grad_p, partial = embedding.new_empty((n_steps, c_out)), table.new_empty((shares + V + 1, width))
        share(ids, order, ordered_ids, table, bias, cu_seqlens, grad_y, grad_p, partial, *numbers)
        if K > 1:
            taps(order, ordered_ids, cu_seqlens, grad_p, partial, n_steps, T, channels, c_out, *sequences, stride_s)
        grad_table = torch.empty_like(table)
        sum_slots(partial, ends, grad_table, n_blocks, width)
        return table_grads(grad_table, embedding, weight)

    return on(ids.device, gradients)


def _order(ids: Traits, n_ids: int, dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor, int]]:
    """The steps in the order of their ids, in `dtype`, these ids, and where each id ends in each of how many blocks of steps."""
    B, T = ids.shape
    n_steps, n_blocks = B * T, cdiv(B * T, _SORTED)
    rank, order_by_id = Kernel(rank_kernel, n_blocks, (_SORTED, _COMPARED)), Kernel(order_kernel, n_blocks, (_SORTED,))
    numbers = n_steps, T, n_ids, n_blocks, *ids.strides

    def ordered(ids: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        ranks, counts = ids.new_empty(n_steps, dtype=torch.int32), ids.new_zeros((n_ids + 1) * n_blocks, dtype=torch.int32)
        rank(ids, ranks, counts, *numbers)
        ends, order, ordered_ids = counts.cumsum(0, dtype=dtype), ids.new_empty(n_steps, dtype=dtype), torch.empty_like(ranks)
        order_by_id(ids, ranks, ends, order, ordered_ids, *numbers)
        return order, ordered_ids, ends, n_blocks

    return ordered


def _table(embedding: Traits, weight: Traits) -> Callable[[Tensor, Tensor], Tensor]:
    """Makes the table [V, K * C_out + C] in fp32."""
    (V, channels), (c_out, _, K) = embedding.shape, weight.shape
    block_v, block_o, _ = blocks = _blocks(_TABLE, V, c_out, channels)
    programs = cdiv(V, block_v) * (K * cdiv(c_out, block_o) + cdiv(channels, block_o))
    kernel = Kernel(table_kernel, programs, (K, _precision(embedding.device), *blocks))
    numbers = V, channels, c_out, *embedding.strides, *weight.strides

    def make(embedding: Tensor, weight: Tensor) -> Tensor:
        table = embedding.new_empty((V, K * c_out + channels), dtype=torch.float32)
        kernel(embedding, weight, table, *numbers)
        return table

    return make


def _table_grads(embedding: Traits, weight: Traits) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The gradients of embedding, weight and bias from that of the table."""
    (V, channels), (c_out, _, K), precision = embedding.shape, weight.shape, _precision(embedding.device)
    block_v, _, block_i = blocks = _blocks(_EMBEDDING_GRAD, V, c_out, channels)
    of_embedding = Kernel(embedding_grad_kernel, cdiv(V, block_v) * cdiv(channels, block_i), (K, precision, *blocks))
    _, block_o, block_i = blocks = _blocks(_TAP_GRAD, V, c_out, channels)
    of_taps = Kernel(tap_grad_kernel, K * cdiv(c_out, block_o) * cdiv(channels, block_i), (K, precision, *blocks))
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


def _searches(cu_seqlens: Traits | None) -> tuple[int, int]:
    """How many sequences there are, and in how many halvings one of them is found."""
    if cu_seqlens is None:
        return 1, 0
    n = cu_seqlens.shape[0] - 1
    return n, n.bit_length()


def _is_wide(ids: Traits, kernel_size: int, dilation: int) -> bool:
    """Whether steps need 64 bits; else 32 take less time, above all to divide."""
    B, T = ids.shape
    return B * T + kernel_size * min(dilation, T) >= 2**31


def _power_of_two(size: int) -> int:
    """`size`, rounded up to one that a block can have."""
    return max(16, 1 << (size - 1).bit_length())


def _or_none(x: Tensor | None) -> Traits | None:
    return None if x is None else traits(x)


def _stride(x: Traits | None) -> int:
    return 0 if x is None else x.strides[0]
