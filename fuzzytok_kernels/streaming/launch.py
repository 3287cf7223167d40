"""The launchers of the updating ops: the same functions as in `streaming.reference`, on Triton.

The blocks are not tuned: a few steps are all latency, and what shortens that (16 rows and 16 channels a program, a sum for each warp) holds
for all sizes. Many steps at once are the ordinary convolution's, behind a copy of the state.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuzzytok_kernels import launch
from fuzzytok_kernels.checks import CHECKS
from fuzzytok_kernels.descriptors import Traits, traits
from fuzzytok_kernels.kernels.update import embedding_norm_kernel, prepend_kernel, remember_kernel, shift_kernel, update_kernel
from fuzzytok_kernels.layout import laid_out_as, output_strides
from fuzzytok_kernels.program import Kernel, cdiv, may_overlap, named, on, overlapping
from fuzzytok_kernels.reference import GATES
from fuzzytok_kernels.support import conv_switch, facts

_plans = functools.lru_cache(maxsize=4096)  # for each op, as in `launch`

# Rows (steps of batch entries) up to which one kernel does it all. Estimated: by then its programs have read the weights 32 times, 13 MB
# from the L2 at C=256, and the copy and the second kernel that more rows get take no longer.
MOST_ROWS = 512
_ROWS, _STEPS, _GROUPS = 16, 16, 4


class _State(NamedTuple):
    """Where a layer's inputs are kept: `history` steps from `offset` on in a state (slots, C_in, steps) of these strides."""

    slots: int
    strides: tuple[int, ...]
    aligned: bool  # to 16 bytes
    offset: int
    history: int
    circular: bool
    by_slot: bool  # whether positions has one entry a slot, not one a row
    indexed: bool  # whether slots are given


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    dilation: int,
    activation: str,
) -> Tensor:
    """x (B, C_in, L) behind conv_state (slots, C_in, (K-1)*dilation) -> y (B, C, L); conv_state then ends with x."""
    tensors = (x, conv_state, weight, bias, residual, cache_seqlens, conv_state_indices)
    plan = _update_plan(*(None if tensor is None else traits(tensor) for tensor in tensors), dilation, activation, _precision(x))
    return plan(*tensors)


def residual_stack_update(
    x: Tensor,
    history: Tensor,
    positions: Tensor,
    slots: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    activation: str,
) -> Tensor:
    """x (B, C, L) through `x + activation(conv(x))` for each layer -> y (B, C, L); history and positions are updated."""
    layers = tuple(map(traits, weights)), tuple(map(traits, biases)), tuple(dilations)
    given = None if slots is None else traits(slots)
    plan = _stack_plan(traits(x), traits(history), traits(positions), given, *layers, activation, _precision(x))
    return plan(x, history, positions, slots, weights, biases)


def embedding_norm(ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """ids (B, L), embedding (num_ids, C), weight and bias (C,) -> (B, L, C): Eq. 1; NaN for an id that there is not."""
    return _embedding_plan(traits(ids), traits(embedding), traits(weight), traits(bias), eps)(ids, embedding, weight, bias)


# ---- plans


@_plans
def _update_plan(
    x: Traits,
    conv_state: Traits,
    weight: Traits,
    bias: Traits | None,
    residual: Traits | None,
    cache_seqlens: Traits | None,
    conv_state_indices: Traits | None,
    dilation: int,
    activation: str,
    precision: str,
) -> Callable[..., Tensor]:
    CHECKS["causal_conv1d_update"](x, conv_state, weight, bias, residual, cache_seqlens, conv_state_indices, dilation, activation)
    slots, _, history = conv_state.shape
    state = _State(
        slots, conv_state.strides, conv_state.aligned, 0, history, cache_seqlens is not None, False, conv_state_indices is not None
    )
    compute = _layer(x, state, weight, bias, residual, dilation, activation, precision, None)
    write = _remembering(x, state) if state.circular else _shifting(x, state)

    def update(
        x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, positions: Any, slots: Any
    ) -> Tensor:
        y = compute(x, conv_state, weight, bias, residual, positions, slots, None, None)
        write(x, conv_state, positions, slots)
        return y

    return on(x.device, named("causal_conv1d_update", update))


@_plans
def _stack_plan(
    x: Traits,
    history: Traits,
    positions: Traits,
    slots: Traits | None,
    weights: tuple[Traits, ...],
    biases: tuple[Traits, ...],
    dilations: tuple[int, ...],
    activation: str,
    precision: str,
) -> Callable[..., Tensor]:
    CHECKS["residual_stack_update"](x, history, positions, slots, weights, biases, dilations, activation)
    (B, C, L), (stride_n, stride_t, stride_c) = x.shape, history.strides
    whole = _State(history.shape[0], (stride_n, stride_c, stride_t), history.aligned, 0, 0, True, True, slots is not None)
    states, offset = [], 0
    for weight, dilation in zip(weights, dilations, strict=True):
        length = (weight.shape[2] - 1) * dilation
        states.append(whole._replace(offset=offset, history=length))
        offset += length
    inner = x._replace(strides=output_strides(x.strides, C, L), aligned=True)  # of what a layer hands to the next
    inputs = [x, *[inner] * len(weights)]
    short = B * L <= MOST_ROWS
    computes = []
    for i, (state, weight, bias, dilation) in enumerate(zip(states, weights, biases, dilations, strict=True)):
        past = (inputs[i - 1], states[i - 1]) if short and i else None
        computes.append(_layer(inputs[i], state, weight, bias, inputs[i], dilation, activation, precision, past))
    writes = [_remembering(each, state) for each, state in zip(inputs, states[:-1], strict=False)]
    finish = _remembering(inputs[max(len(states) - 1, 0)], states[-1] if states else whole, advance=True)

    def update(
        x: Tensor, history: Tensor, positions: Tensor, slots: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> Tensor:
        past, h = None, x
        # Before any state is written: without memory for all of them, the states are as they were.
        outputs = [x.new_empty_strided((B, C, L), inner.strides) if short else None for _ in weights]
        for i, compute in enumerate(computes):
            y = compute(h, history, weights[i], biases[i], h, positions, slots, past, outputs[i])
            if not short and i < len(writes):
                writes[i](h, history, positions, slots)
            past, h = h, y
        finish(x if past is None else past, history, positions, slots)
        return _of_strides(laid_out_as(x, x.clone()) if past is None else h, inner.strides)

    return on(x.device, named("residual_stack_update", update))


@_plans
def _embedding_plan(ids: Traits, embedding: Traits, weight: Traits, bias: Traits, eps: float) -> Callable[..., Tensor]:
    CHECKS["embedding_norm"](ids, embedding, weight, bias, eps)
    (B, L), (n_ids, channels) = ids.shape, embedding.shape
    block, pdl = _power_of_two(channels), may_overlap(ids.device)
    kernel = Kernel(embedding_norm_kernel, B * L, (pdl, block), num_warps=1 if block <= 512 else 8, **overlapping(pdl))
    numbers = (L, channels, n_ids, eps, *ids.strides, *embedding.strides, *weight.strides, *bias.strides)

    def embed(ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = embedding.new_empty(B, L, channels)
        if out.numel():
            kernel(ids, embedding, weight, bias, out, *numbers)
        return out

    return on(ids.device, named("embedding_norm", embed))


# ---- a layer: y = residual + activation(conv(x behind the state)), the state left as it is


def _layer(
    x: Traits,
    state: _State,
    weight: Traits,
    bias: Traits | None,
    residual: Traits | None,
    dilation: int,
    activation: str,
    precision: str,
    past: tuple[Traits, _State] | None,
) -> Callable[..., Tensor]:
    """`past` is the input of the layer before and its state, which is written along the way. The result writes to `out`, if given."""
    B, _, L = x.shape
    parts = 2 if activation in GATES else 1
    channels = weight.shape[0] // parts
    strides = output_strides(x.strides, channels, L)
    if B * L == 0:
        return lambda x, *others: x.new_empty_strided((B, channels, L), strides)
    if B * L > MOST_ROWS:
        return _long(x, state, dilation, activation, strides)

    (c_out, c_in, K), pdl = weight.shape, may_overlap(x.device)
    block_c_in = min(max(_power_of_two(c_in), 16 * _GROUPS), 512 // x.dtype.itemsize)
    block_c = min(_power_of_two(c_in), 256)
    past_programs = _row_programs(*past) if past else 0
    tiles = cdiv(B * L, _ROWS) * cdiv(channels, 16)
    apart = dilation >= L
    # Behind another layer; 16 bytes at a time, since smaller copies to shared memory go through the L1 (see kernels/update.py).
    wide = state.aligned and weight.aligned and _wide(c_in, *state.strides) and _wide(c_in, *weight.strides)
    early = past is not None and apart and wide
    flags = (bias is not None, residual is not None, state.indexed, state.circular, state.by_slot, past is not None, apart, early, pdl)
    constants = (K, parts, activation, precision, *flags, _ROWS, block_c_in, 16 * parts, _GROUPS, _STEPS, block_c)
    kernel = Kernel(update_kernel, past_programs + tiles, constants, num_warps=_GROUPS, num_stages=3, **overlapping(pdl))
    past_x, past_state = past or (x, state)
    sizes = (B, L, c_in, c_out, state.slots, dilation, state.history, state.offset, past_state.history, past_state.offset, past_programs)
    stride_bias = bias.strides[0] if bias else 0
    strides_in = (*x.strides, *state.strides, *weight.strides, stride_bias, *(residual.strides if residual else (0, 0, 0)))
    numbers = (*sizes, *strides_in, *strides, *past_x.strides)

    def compute(
        x: Tensor, state: Tensor, weight: Tensor, bias: Any, residual: Any, positions: Any, slots: Any, past: Any, out: Tensor | None
    ) -> Tensor:
        y = x.new_empty_strided((B, channels, L), strides) if out is None else out
        kernel(x, state, weight, bias, residual, y, positions, slots, past, *numbers)
        return y

    return compute


def _long(x: Traits, state: _State, dilation: int, activation: str, strides: tuple[int, ...]) -> Callable[..., Tensor]:
    """Many steps: the state in front of x, and the ordinary convolution."""
    B, c_in, L = x.shape
    steps, block = state.history + L, min(_power_of_two(c_in), 256)
    constants = (state.indexed, state.circular, state.by_slot, _STEPS, block)
    prepend = Kernel(prepend_kernel, B * cdiv(steps, _STEPS) * cdiv(c_in, block), constants)
    numbers = (L, c_in, state.slots, state.history, state.offset, *x.strides, *state.strides)
    end = state.slots

    def compute(
        x: Tensor, state: Tensor, weight: Tensor, bias: Any, residual: Any, positions: Any, slots: Any, past: None, out: None
    ) -> Tensor:
        known = x.new_empty(B, steps, c_in)
        prepend(x, state, known, positions, slots, *numbers)
        if activation == "none":
            y = launch.causal_conv1d(known.mT, weight, bias, dilation)
        else:
            y = launch.causal_conv1d_fused(known.mT, weight, bias, None, None, None, dilation, activation)
        y = y[:, :, steps - L :]
        y = y if residual is None else residual + y
        if slots is not None:
            y = y.masked_fill(((slots < 0) | (slots >= end))[:, None, None], 0)
        return _of_strides(laid_out_as(x, y), strides)

    return compute


def _of_strides(y: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`y`, which lies so but for the strides of a single channel or row, with these: they are those of the op's fake."""
    return y if y.stride() == strides else y.as_strided(y.shape, strides)


# ---- keeping the state


def _remembering(x: Traits, state: _State, advance: bool = False) -> Callable[..., None]:
    """Writes the last steps of x to a circular state; to `advance` is to count them in positions too, when all have been written."""
    B, c_in, L = x.shape
    if B * L == 0:
        return lambda *tensors: None
    programs, pdl = _row_programs(x, state), may_overlap(x.device)
    at_once = advance and programs == B
    options: dict[str, Any] = {"num_warps": 4, **overlapping(pdl)}
    blocks = (pdl, _STEPS, min(_power_of_two(c_in), 256))
    kernel = Kernel(remember_kernel, programs, (state.indexed, state.by_slot, at_once, *blocks), **options)
    count = Kernel(remember_kernel, B, (state.indexed, state.by_slot, True, *blocks), **options)
    numbers = (*x.strides, *state.strides)
    sizes, none = (L, c_in, state.slots, state.history, state.offset), (L, c_in, state.slots, 0, 0)

    def remember(x: Tensor, state: Tensor, positions: Tensor, slots: Tensor | None) -> None:
        kernel(x, state, positions, slots, *sizes, *numbers)
        if advance and not at_once:
            count(x, state, positions, slots, *none, *numbers)

    return remember


def _shifting(x: Traits, state: _State) -> Callable[..., None]:
    B, c_in, L = x.shape
    if B * L * state.history == 0:
        return lambda *tensors: None
    block = min(_power_of_two(c_in), 64)
    kernel = Kernel(shift_kernel, B * cdiv(c_in, block), (state.indexed, _STEPS, block))
    numbers = (L, c_in, state.slots, state.history, *x.strides, *state.strides)

    def shift(x: Tensor, state: Tensor, positions: None, slots: Tensor | None) -> None:
        kernel(x, state, slots, *numbers)

    return shift


def _row_programs(x: Traits, state: _State) -> int:
    """How many programs `_remember` wants for x."""
    B, _, L = x.shape
    return B * max(1, cdiv(min(L, state.history), _STEPS))


# ---- the device


def _wide(channels: int, outer: int, inner: int, other: int) -> bool:
    """Whether Triton knows that rows of so many channels, of these strides, can be read 16 bytes at a time: by what 16 divides."""
    return inner == 1 and channels % 16 == outer % 16 == other % 16 == 0


def _precision(x: Tensor) -> str:
    """`input_precision` of the dots, which only fp32 needs; see `launch`."""
    if x.dtype != torch.float32 or not facts(x.device).tf32:
        return "ieee"
    return "tf32" if conv_switch.fp32_precision == "tf32" else "tf32x3"


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
