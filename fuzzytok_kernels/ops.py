"""The ops under `torch.ops.fuzzytok`: schemas, checks, fakes and derivatives. No arithmetic here."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuzzytok_kernels import private, reference
from fuzzytok_kernels.checks import CHECKS
from fuzzytok_kernels.layout import empty_of_bytes, empty_output, empty_weight, laid_out_as
from fuzzytok_kernels.registration import Function, register, select, vmap_folding_first
from fuzzytok_kernels.sequences import heads

STORED_FROM = 2048  # C_in * K, from which on a training step stores the pre-activation of a fused op


# ---- causal_conv1d


def _causal_conv1d_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    CHECKS["causal_conv1d"](x, weight, bias, dilation)
    return empty_output(x, weight.shape[0])


class _CausalConv1d(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        with private.below_autograd():
            return causal_conv1d(x, weight, bias, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, ctx.dilation = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = causal_conv1d_input_grad(grad_y, weight, ctx.dilation)
        if needs_weight or needs_bias:  # one op for both, so that the bias's bits do not hang on what else is wanted
            grad_weight, grad_bias = causal_conv1d_weight_grad(grad_y, x, weight.shape[2], ctx.dilation)
        return grad_x, grad_weight, grad_bias if needs_bias else None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return vmap_folding_first(causal_conv1d, info.batch_size, in_dims, args)


# ---- causal_conv1d_fused


def _causal_conv1d_fused_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dilation: int,
    activation: str,
) -> Tensor:
    CHECKS["causal_conv1d_fused"](x, weight, bias, residual, initial_state, cu_seqlens, dilation, activation)
    return empty_output(x, weight.shape[0] // 2 if activation in reference.GATES else weight.shape[0])


class _CausalConv1dFused(Function):
    """Saves x, weight and bias alone, with the initial state and the boundaries: the backward computes the pre-activation anew, and
    multiplies while it is in registers."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        with private.below_autograd():
            return causal_conv1d_fused(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, bias, residual, initial_state, cu_seqlens, ctx.dilation, ctx.activation = inputs
        ctx.x_is_residual = x is residual
        ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple:
        x, weight, bias, state, cu_seqlens = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual, needs_state, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = grad_state = None
        grad_p = grad_y
        if ctx.activation != "none" and (needs_x or needs_weight or needs_bias or needs_state):
            grad_p = causal_conv1d_activation_grad(grad_y, x, weight, bias, state, cu_seqlens, ctx.dilation, ctx.activation)
        if needs_x:  # the block's own residual is added where it costs a read: autograd's sum would be a pass of three
            grad_x = causal_conv1d_input_grad(grad_p, weight, ctx.dilation, grad_y if ctx.x_is_residual else None, cu_seqlens)
        if needs_weight or needs_bias:
            grad_weight, grad_bias = causal_conv1d_weight_grad(grad_p, x, weight.shape[2], ctx.dilation, cu_seqlens)
        if state is not None and (needs_weight or needs_state):
            grad_state, more = _state_grads(grad_p, weight, state, cu_seqlens, ctx.dilation)
            grad_weight = None if grad_weight is None else (grad_weight + more).to(weight.dtype)
        grad_residual = grad_y if needs_residual and not ctx.x_is_residual else None
        return grad_x, grad_weight, grad_bias if needs_bias else None, grad_residual, grad_state, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return vmap_folding_first(causal_conv1d_fused, info.batch_size, in_dims, args)


def _state_grads(grad_p: Tensor, weight: Tensor, state: Tensor, cu_seqlens: Tensor | None, dilation: int) -> tuple[Tensor, Tensor]:
    """The gradient of the state, and what it adds to that of the weight: those of a batch of the states, with zeros behind each."""
    history = state.shape[2]
    grad_heads = heads(grad_p, history, cu_seqlens)  # (N, C_out, 2 * history)
    grad_state = causal_conv1d_input_grad(grad_heads, weight, dilation)[:, :, :history]
    wide = torch.promote_types(state.dtype, torch.float32)  # a sum is to be rounded, not its terms
    return grad_state, causal_conv1d_weight_grad(grad_heads.to(wide), F.pad(state.to(wide), (0, history)), weight.shape[2], dilation)[0]


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, dilation: int
) -> Tensor:
    """The pre-activation."""
    if initial_state is None and cu_seqlens is None:
        return causal_conv1d(x, weight, bias, dilation)
    return causal_conv1d_fused(x, weight, bias, None, initial_state, cu_seqlens, dilation, "none")


def _fused_in_steps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dilation: int,
    activation: str,
) -> Tensor:
    CHECKS["causal_conv1d_fused"](x, weight, bias, residual, initial_state, cu_seqlens, dilation, activation)
    p = _convolved(x, weight, bias, initial_state, cu_seqlens, dilation)
    return laid_out_as(x, reference.activated(p, residual, activation))


def stores_pre_activation(weight: Tensor, activation: str) -> bool:
    """Whether to compute it again in the backward would cost more."""
    return activation != "none" and weight.dim() == 3 and weight.shape[1] * weight.shape[2] >= STORED_FROM


def _fused_derived(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    stored = stores_pre_activation(weight, others[-1])
    return _fused_in_steps(x, weight, *others) if stored else private.apply_of(_CausalConv1dFused)(x, weight, *others)


def _fused_transformed(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *others: Any) -> Tensor:
    """In steps, the first of which is this op doing no more."""
    *_, activation = others
    alone = activation == "none" and residual is None
    return (_CausalConv1dFused.apply if alone else _fused_in_steps)(x, weight, bias, residual, *others)


# ---- causal_conv1d_activation_grad


def _causal_conv1d_activation_grad_fake(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dilation: int,
    activation: str,
) -> Tensor:
    CHECKS["causal_conv1d_activation_grad"](grad_y, x, weight, bias, initial_state, cu_seqlens, dilation, activation)
    return empty_output(x, weight.shape[0])


def _activation_grad_in_steps(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dilation: int,
    activation: str,
) -> Tensor:
    CHECKS["causal_conv1d_activation_grad"](grad_y, x, weight, bias, initial_state, cu_seqlens, dilation, activation)
    p = _convolved(x, weight, bias, initial_state, cu_seqlens, dilation)
    return laid_out_as(x, reference.activation_grad(grad_y, p, activation))


# ---- causal_conv1d_input_grad


def _causal_conv1d_input_grad_fake(
    grad_y: Tensor, weight: Tensor, dilation: int = 1, residual: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    CHECKS["causal_conv1d_input_grad"](grad_y, weight, dilation, residual, cu_seqlens)
    return empty_output(grad_y, weight.shape[1])


class _CausalConv1dInputGrad(Function):
    @staticmethod
    def forward(grad_y: Tensor, weight: Tensor, dilation: int, residual: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        with private.below_autograd():
            return causal_conv1d_input_grad(grad_y, weight, dilation, residual, cu_seqlens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        grad_y, weight, ctx.dilation, _, cu_seqlens = inputs
        ctx.save_for_backward(grad_y, weight, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad_grad_x: Tensor) -> tuple:
        grad_y, weight, cu_seqlens = ctx.saved_tensors
        needs_grad_y, needs_weight, _, needs_residual, _ = ctx.needs_input_grad
        double_grad_y = double_weight = None
        if needs_grad_y:
            double_grad_y = _convolved(grad_grad_x, weight, None, None, cu_seqlens, ctx.dilation)
        if needs_weight:
            double_weight, _ = causal_conv1d_weight_grad(grad_y, grad_grad_x, weight.shape[2], ctx.dilation, cu_seqlens)
        return double_grad_y, double_weight, None, grad_grad_x if needs_residual else None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return vmap_folding_first(causal_conv1d_input_grad, info.batch_size, in_dims, args)


# ---- causal_conv1d_weight_grad


def _causal_conv1d_weight_grad_fake(
    grad_y: Tensor, x: Tensor, kernel_size: int, dilation: int = 1, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    CHECKS["causal_conv1d_weight_grad"](grad_y, x, kernel_size, dilation, cu_seqlens)
    return empty_weight(x, grad_y.shape[1], x.shape[1], kernel_size), x.new_empty(grad_y.shape[1])


class _CausalConv1dWeightGrad(Function):
    @staticmethod
    def forward(grad_y: Tensor, x: Tensor, kernel_size: int, dilation: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        with private.below_autograd():
            return causal_conv1d_weight_grad(grad_y, x, kernel_size, dilation, cu_seqlens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        grad_y, x, _, ctx.dilation, cu_seqlens = inputs
        ctx.save_for_backward(grad_y, x, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad_grad_weight: Tensor, grad_grad_bias: Tensor) -> tuple:
        grad_y, x, cu_seqlens = ctx.saved_tensors
        needs_grad_y, needs_x, *_ = ctx.needs_input_grad
        double_grad_y = double_x = None
        if needs_grad_y:
            double_grad_y = _convolved(x, grad_grad_weight, grad_grad_bias, None, cu_seqlens, ctx.dilation)
        if needs_x:
            double_x = causal_conv1d_input_grad(grad_y, grad_grad_weight, ctx.dilation, None, cu_seqlens)
        return double_grad_y, double_x, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        slices = [causal_conv1d_weight_grad(*select(args, in_dims, i)) for i in range(info.batch_size)]
        grad_weights, grad_biases = zip(*slices, strict=True)
        return (torch.stack(grad_weights), torch.stack(grad_biases)), (0, 0)


# ---- byte_causal_conv1d


def _byte_causal_conv1d_fake(
    ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, activation: str, cu_seqlens: Tensor | None = None
) -> Tensor:
    CHECKS["byte_causal_conv1d"](ids, embedding, weight, bias, dilation, activation, cu_seqlens)
    return empty_of_bytes(embedding, ids)


class _ByteCausalConv1d(Function):
    """Saves its arguments alone: a product over the ids makes the table anew, and look-ups the pre-activation."""

    @staticmethod
    def forward(ids: Tensor, *others: Any) -> Tensor:
        with private.below_autograd():
            return byte_causal_conv1d(ids, *others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.dilation, ctx.activation, cu_seqlens = inputs
        ctx.save_for_backward(*tensors, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple:
        *tensors, cu_seqlens = ctx.saved_tensors
        grads = byte_causal_conv1d_grad(grad_y, *tensors, ctx.dilation, ctx.activation, cu_seqlens)
        wanted = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[1:4], strict=True))
        return None, *wanted, None, None, None


def _byte_causal_conv1d_in_steps(ids: Tensor, embedding: Tensor, weight: Tensor, *others: Any) -> Tensor:
    CHECKS["byte_causal_conv1d"](ids, embedding, weight, *others)
    return reference.looked_up(ids, embedding, weight, *others)


# ---- byte_causal_conv1d_grad


def _byte_causal_conv1d_grad_fake(
    grad_y: Tensor, ids: Tensor, embedding: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    CHECKS["byte_causal_conv1d_grad"](grad_y, ids, embedding, weight, *others)
    grad_embedding = embedding.new_empty(embedding.shape)
    return grad_embedding, empty_weight(embedding, *weight.shape), embedding.new_empty(weight.shape[0])


def _byte_causal_conv1d_grad_in_steps(
    grad_y: Tensor, ids: Tensor, embedding: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    CHECKS["byte_causal_conv1d_grad"](grad_y, ids, embedding, weight, *others)
    return reference.looked_up_grads(grad_y, ids, embedding, weight, *others)


# ---- all of them


causal_conv1d = register(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, int dilation=1) -> Tensor",
    _causal_conv1d_fake, private.apply_of(_CausalConv1d), _CausalConv1d.apply, autocast=True,
)  # fmt: skip
causal_conv1d_fused = register(
    "causal_conv1d_fused(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? initial_state, Tensor? cu_seqlens, "
    "int dilation, str activation) -> Tensor",
    _causal_conv1d_fused_fake, _fused_derived, _fused_transformed, autocast=True,
)  # fmt: skip
causal_conv1d_activation_grad = register(
    "causal_conv1d_activation_grad(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, "
    "int dilation, str activation) -> Tensor",
    _causal_conv1d_activation_grad_fake, _activation_grad_in_steps, _activation_grad_in_steps,
)  # fmt: skip
causal_conv1d_input_grad = register(
    "causal_conv1d_input_grad(Tensor grad_y, Tensor weight, int dilation=1, Tensor? residual=None, Tensor? cu_seqlens=None) -> Tensor",
    _causal_conv1d_input_grad_fake, private.apply_of(_CausalConv1dInputGrad), _CausalConv1dInputGrad.apply,
)  # fmt: skip
causal_conv1d_weight_grad = register(
    "causal_conv1d_weight_grad(Tensor grad_y, Tensor x, int kernel_size, int dilation=1, Tensor? cu_seqlens=None) -> (Tensor, Tensor)",
    _causal_conv1d_weight_grad_fake, private.apply_of(_CausalConv1dWeightGrad), _CausalConv1dWeightGrad.apply,
)  # fmt: skip
byte_causal_conv1d = register(
    "byte_causal_conv1d(Tensor ids, Tensor embedding, Tensor weight, Tensor? bias, int dilation, str activation, Tensor? cu_seqlens=None)"
    " -> Tensor",
    _byte_causal_conv1d_fake, private.apply_of(_ByteCausalConv1d), _byte_causal_conv1d_in_steps, autocast=True,
)  # fmt: skip
byte_causal_conv1d_grad = register(
    "byte_causal_conv1d_grad(Tensor grad_y, Tensor ids, Tensor embedding, Tensor weight, Tensor? bias, int dilation, str activation,"
    " Tensor? cu_seqlens=None) -> (Tensor, Tensor, Tensor)",
    _byte_causal_conv1d_grad_fake, _byte_causal_conv1d_grad_in_steps, _byte_causal_conv1d_grad_in_steps,
)  # fmt: skip
