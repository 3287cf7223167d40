"""How many floating-point operations each op does, for `torch.utils.flop_counter.FlopCounterMode`, which counts F.conv1d's the same way.

Two for each product of Eq. 2, those with the zeros before the start included; none for bias, activation and residual. What a backward
computes anew counts again, as it does for `torch.utils.checkpoint`.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from fuzzytok_kernels import ops
from fuzzytok_kernels.streaming import ops as streaming_ops


def of_conv(x: tuple, weight: tuple) -> int:
    """x (B, C, T), whichever its channels are; weight (C_out, C_in, K)."""
    B, _, T = x
    return 2 * B * T * math.prod(weight)


@register_flop_formula(
    [ops.causal_conv1d.overloadpacket, ops.causal_conv1d_fused.overloadpacket, ops.causal_conv1d_input_grad.overloadpacket]
)
def _sequence_and_weight(x: tuple, weight: tuple, *args: Any, **kwargs: Any) -> int:
    return of_conv(x, weight)


@register_flop_formula(ops.causal_conv1d_activation_grad.overloadpacket)
def _activation_grad(grad_y: tuple, x: tuple, weight: tuple, *args: Any, **kwargs: Any) -> int:
    return of_conv(x, weight)


@register_flop_formula(ops.causal_conv1d_weight_grad.overloadpacket)
def _weight_grad(grad_y: tuple, x: tuple, kernel_size: int, *args: Any, **kwargs: Any) -> int:
    return of_conv(x, (grad_y[1], x[1], kernel_size))


@register_flop_formula(ops.byte_causal_conv1d.overloadpacket)
def _byte_conv(ids: tuple, embedding: tuple, weight: tuple, *args: Any, **kwargs: Any) -> int:
    """The table's: look-ups are none."""
    return 2 * embedding[0] * math.prod(weight)


@register_flop_formula(ops.byte_causal_conv1d_grad.overloadpacket)
def _byte_conv_grad(grad_y: tuple, ids: tuple, embedding: tuple, weight: tuple, *args: Any, **kwargs: Any) -> int:
    """Those of the table, made anew, and of its two gradients; the sums by id are none."""
    return 6 * embedding[0] * math.prod(weight)


@register_flop_formula(streaming_ops.causal_conv1d_update.overloadpacket)
def _update(x: tuple, conv_state: tuple, weight: tuple, *args: Any, **kwargs: Any) -> int:
    return of_conv(x, weight)


@register_flop_formula(streaming_ops.residual_stack_update.overloadpacket)
def _stack_update(
    x: tuple, history: tuple, positions: tuple, slots: tuple | None, weights: Sequence[tuple], *args: Any, **kwargs: Any
) -> int:
    return sum(of_conv(x, weight) for weight in weights)


@register_flop_formula(streaming_ops.embedding_norm.overloadpacket)
def _embedding_norm(*args: Any, **kwargs: Any) -> int:
    return 0
