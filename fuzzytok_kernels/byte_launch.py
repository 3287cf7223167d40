"""The launchers of the look-ups by byte: the same functions as `reference`'s, on Triton.

Their configs are fixed, and no ops of the tuner: the large kernels wait for memory, and their blocks follow from what has to stay in L1
and in registers (see `kernels/byte_conv.py` and `kernels/byte_grad.py`); the small ones are bound by their launch.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fuzzytok_kernels.asserted import assertion
from fuzzytok_kernels.checks import CHECKS
from fuzzytok_kernels.descriptors import Traits, as_it_is, channels_last, traits
from fuzzytok_kernels.kernels.byte_conv import byte_conv_kernel
from fuzzytok_kernels.kernels.byte_grad import order_kernel, rank_kernel, run_kernel, sum_runs_kernel
from fuzzytok_kernels.kernels.byte_table import table_grads_kernel, table_kernel
from fuzzytok_kernels.layout import empty_of_bytes, empty_weight
from fuzzytok_kernels.program import Kernel, cdiv, named, on, persistent
from fuzzytok_kernels.reference import GATES, check_range
from fuzzytok_kernels.support import approximates, facts

_plans = functools.lru_cache(maxsize=4096)
_TILE = 2048  # elements of a tile of the forward: 16 results a thread
_LINE = 128  # bytes of a row of the table that a program keeps to, see `kernels/byte_conv.py`
_PROGRAMS = {(2, 1): 8, (2, 2): 6, (4, 1): 7, (4, 2): 4}  # a multiprocessor, by an element's bytes and parts: of 56, 80, 72, 110 registers
_RUN = 512  # steps of an id that one program sums at most
_RUN_BLOCK = (16, 256)  # steps and channels at a time, by 2 warps: forward and backward took 151 us on an H100, and 178 with (32, 256) by 4
_CHUNK = 65_536  # steps, about; 16,384, with other tables and programs, took 153 us on an H100 where this takes 145
_SORTED, _COMPARED = 256, 32  # steps that one program sorts, by comparing all with all, 32 at a time
_SUMMED = (16, 256)  # runs and columns at a time
_TABLE = (64, 64, 128)  # ids, output channels, and input channels in 16 bits
_EMBEDDING_GRAD = (16, 128, 32)  # few ids, so that all multiprocessors have a block
_TAP_GRAD = (64, 32, 32)


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
    if 0 in ids.shape:
        return lambda ids, embedding, *others: empty_of_bytes(embedding, ids)
    look_up = _look_up(ids, embedding, weight, dilation, activation, cu_seqlens, embedding.dtype)
    make_table, assert_sequences = _table(embedding, weight, bias, embedding.dtype), assertion(cu_seqlens, ids.shape[1])

    def forward(ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        y = empty_of_bytes(embedding, ids)
        look_up(ids, make_table(embedding, weight, bias), cu_seqlens, None, y)
        assert_sequences(cu_seqlens)
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
    stride_b, stride_c, stride_t = grad_y.strides
    if stride_c != 1 or (B > 1 and stride_b != T * stride_t):
        read_grad, stride_t = channels_last(grad_y), channels
    wide = _is_wide(ids, K, dilation, c_out, embedding, weight, grad_y)
    sort = _order(ids, V, cu_seqlens, wide)
    grad_of_p = _activation_grad(ids, embedding, weight, bias, dilation, activation, cu_seqlens, (T * stride_t, stride_t))
    run = Kernel(run_kernel, sort.n_runs * (K + 1), (K, *_blocks(_RUN_BLOCK, _RUN, channels)), num_warps=2)
    sum_runs = Kernel(sum_runs_kernel, V * cdiv(width, _SUMMED[1]), (_RUN, products, *_SUMMED))
    numbers = channels, c_out, min(dilation, T), stride_t if activation == "none" else c_out, stride_t

    def gradients(
        grad_y: Tensor, ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_y = read_grad(grad_y)
        grad_p = grad_of_p(grad_y, ids, embedding, weight, bias, cu_seqlens)
        order, later, runs, ends = sort.steps(ids, cu_seqlens)
        partial = embedding.new_empty((sort.n_runs, width), dtype=torch.float32)
        run(order, later, runs, grad_p, grad_y, partial, *numbers)
        grad_table = partial.new_empty((V, width))
        sum_runs(partial, ends, grad_table, V, sort.chunks, sort.chunk, width)
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
    parts = 2 if activation in GATES else 1
    programs = persistent(ids.device, cdiv(channels, 2 * block_c), B * cdiv(T, block_t), _PROGRAMS[dtype.itemsize, parts])
    constants = (wide, K, parts, activation, grad_strides is not None, approximates(embedding.dtype, ids.device), block_t, block_c)
    kernel = Kernel(byte_conv_kernel, programs, constants)
    numbers = (B, T, V, channels, min(dilation, T), *_searches(cu_seqlens), *ids.strides, _stride(cu_seqlens), *(grad_strides or (0, 0)))
    return lambda *tensors: kernel(*tensors, *numbers)


def _activation_grad(
    ids: Traits, embedding: Traits, weight: Traits, bias: Traits | None, dilation: int, activation: str, cu_seqlens: Traits | None,
    grad_strides: tuple[int, int],
) -> Callable[..., Tensor]:  # fmt: skip
    """The gradient [B, T, C_out] before the activation."""
    if activation == "none":
        return lambda grad_y, *others: grad_y
    dtype = torch.float32 if embedding.dtype == torch.float16 else embedding.dtype  # of values rounded to fp16, sums broke the error rule
    make_table = _table(embedding, weight, bias, torch.float32)
    look_up = _look_up(ids, embedding, weight, dilation, activation, cu_seqlens, torch.float32, grad_strides)

    def gradient(grad_y: Tensor, ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        grad_p = embedding.new_empty((*ids.shape, weight.shape[0]), dtype=dtype)
        look_up(ids, make_table(embedding, weight, bias), cu_seqlens, grad_y, grad_p)
        return grad_p

    return gradient


class _Order(NamedTuple):
    """What sorts the steps by chunk and id, into runs."""

    steps: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor, Tensor]]  # see `kernels/byte_grad.order_kernel`
    chunk: int  # blocks of steps
    chunks: int
    n_runs: int


def _order(ids: Traits, n_ids: int, cu_seqlens: Traits | None, wide: bool) -> _Order:
    B, T = ids.shape
    n_steps, n_blocks, dtype = B * T, cdiv(B * T, _SORTED), torch.int64 if wide else torch.int32
    chunks = _n_chunks(n_steps)
    chunk = cdiv(n_blocks, chunks)
    n_runs = _n_runs(n_steps, n_ids)
    rank = Kernel(rank_kernel, chunks * chunk, (wide, _SORTED, _COMPARED), num_warps=8)
    order_by_key = Kernel(order_kernel, n_blocks, (wide, _RUN, _SORTED))
    sizes = n_steps, T, n_ids, chunk
    of_sequences, strides, stride_s = _searches(cu_seqlens), ids.strides, _stride(cu_seqlens)

    def steps(ids: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ranks, counts = (ids.new_empty(n, dtype=torch.int32) for n in (n_steps, (n_ids + 1) * chunks * chunk))
        order, later, runs = (ids.new_empty(n, dtype=dtype) for n in (n_steps, n_steps, 2 * n_runs))
        rank(ids, ranks, counts, runs, *sizes, n_runs, *strides)
        ends = counts.cumsum(0, dtype=dtype)
        order_by_key(ids, ranks, ends, cu_seqlens, order, later, runs, *sizes, *of_sequences, *strides, stride_s)
        return order, later, runs, ends

    return _Order(steps, chunk, chunks, n_runs)


def _n_runs(n_steps: int, n_ids: int) -> int:
    return cdiv(n_steps, _RUN) + _n_chunks(n_steps) * (n_ids + 1)


def _n_chunks(n_steps: int) -> int:
    """Alike ones: a few steps more than _CHUNK, as a rank's that sees others' history, are no chunk of their own."""
    return max(1, round(n_steps / _CHUNK))


def _table(embedding: Traits, weight: Traits, bias: Traits | None, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Makes the table [V + 1, K * C_out + C], with a line behind it, see `kernels/byte_conv._looked_up`."""
    (V, channels), (c_out, _, K) = embedding.shape, weight.shape
    most = (*_TABLE[:2], 2 * _TABLE[2] // embedding.dtype.itemsize)
    block_v, block_o, _ = blocks = _blocks(most, V + 1, c_out, channels)
    programs, behind = cdiv(V + 1, block_v) * (K * cdiv(c_out, block_o) + cdiv(channels, block_o)), _LINE // dtype.itemsize
    kernel = Kernel(table_kernel, programs, (K, _precision(embedding.device), behind, *blocks), num_warps=4, num_stages=2)
    numbers = V, channels, c_out, *embedding.strides, *weight.strides, _stride(bias)

    def make(embedding: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        table = embedding.new_empty((V + 1) * (K * c_out + channels) + behind, dtype=dtype)
        kernel(embedding, weight, bias, table, *numbers)
        return table

    return make


def _table_grads(embedding: Traits, weight: Traits, precision: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The gradients of embedding, weight and bias from that of the table."""
    (V, channels), (c_out, _, K) = embedding.shape, weight.shape
    ids, _, inputs = of_embedding = _blocks(_EMBEDDING_GRAD, V, c_out, channels)
    _, tap_outputs, tap_inputs = of_taps = _blocks(_TAP_GRAD, V, c_out, channels)
    of_ids, programs = cdiv(V, ids) * cdiv(channels, inputs), K * cdiv(c_out, tap_outputs) * cdiv(channels, tap_inputs)
    kernel = Kernel(table_grads_kernel, of_ids + programs, (K, precision, *of_embedding, *of_taps))
    numbers = of_ids, V, channels, c_out, *embedding.strides, *weight.strides

    def gradients(grad_table: Tensor, embedding: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad_embedding, grad_bias = embedding.new_empty((V, channels)), embedding.new_empty(c_out)
        grad_weight = empty_weight(embedding, c_out, channels, K)
        kernel(grad_table, embedding, weight, grad_embedding, grad_weight, grad_bias, *numbers)
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


def _is_wide(ids: Traits, kernel_size: int, dilation: int, c_out: int, embedding: Traits, weight: Traits, *others: Traits) -> bool:
    """Whether steps and offsets need 64 bits; else 32 take less time."""
    (B, T), (V, channels) = ids.shape, embedding.shape
    n_steps, reach = B * T, kernel_size * min(dilation, T)
    width = kernel_size * weight.shape[0] + channels
    spans = (sum((n - 1) * stride for n, stride in zip(x.shape, x.strides, strict=True)) for x in (ids, *others))
    return max(n_steps * max(c_out, kernel_size) + (reach + _TILE) * c_out, _n_runs(n_steps, V) * width, *spans) >= 2**31


def _power_of_two(size: int) -> int:
    """`size`, rounded up to one that a block can have."""
    return max(16, 1 << (size - 1).bit_length())


def _or_none(x: Tensor | None) -> Traits | None:
    return None if x is None else traits(x)


def _stride(x: Traits | None) -> int:
    return 0 if x is None else x.strides[0]
