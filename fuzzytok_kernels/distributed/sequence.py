"""Sequence parallel: time is sharded over ranks, of which each needs the history on its left and no more."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuzzytok_kernels import ops, reference
from fuzzytok_kernels.checks import CHECKS, check_boundaries
from fuzzytok_kernels.distributed.exchange import TimeShards, add_returned, joined, return_gradient, send_history
from fuzzytok_kernels.layout import laid_out_as
from fuzzytok_kernels.registration import cast_for_autocast


@torch.compiler.disable  # messages are no part of a graph
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    lengths: tuple[int, ...] | None = None,
    dilation: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`fuzzytok_kernels.causal_conv1d` where each rank of `group` holds consecutive steps of x, in the order of the ranks.

    While the (K - 1) * dilation steps before this rank's first are on their way from the left, all of its outputs are computed without
    them, and then its first ones again. The backward sends the gradient of those steps to the left while it computes the others. They may
    come from several ranks. Weight and bias gradients are of this rank's outputs: sum them over the ranks (as FSDP and DDP do).

    Args:
        x: (B, C_in, T), this rank's steps; weight, bias, dilation, activation: the same on all ranks.
        group: of the ranks; None is all.
        lengths: T of every rank, or None where all have this one's.
        residual: (B, C, T), this rank's steps.
        cu_seqlens: (N + 1,) int32, the boundaries of the sequences of the whole, on all ranks alike; one may lie in several. B is 1.

    Returns:
        (B, C, T), this rank's steps, as `fuzzytok_kernels.causal_conv1d` on the whole computes them.

    Raises:
        ValueError, TypeError: what `fuzzytok_kernels.causal_conv1d` refuses, or lengths that are not the group's.
    """
    activation = "none" if activation is None else activation
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias, residual = cast_for_autocast((x, weight, bias, residual))
    CHECKS["causal_conv1d_fused"](x, weight, bias, residual, None, cu_seqlens, dilation, activation)
    shards = TimeShards.of(x.shape[-1], group, lengths)
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        check_boundaries(cu_seqlens, sum(shards.lengths))
    if ops.stores_pre_activation(weight, activation):
        p = _Conv.apply(x, weight, bias, None, cu_seqlens, dilation, "none", shards)
        return laid_out_as(x, reference.activated(p, residual, activation))
    return _Conv.apply(x, weight, bias, residual, cu_seqlens, dilation, activation, shards)


@torch.compiler.disable
def with_history(x: Tensor, history: int, shards: TimeShards) -> Tensor:
    """x (..., T), this rank's steps, behind the `history` before them: (..., before(history) + T). Differentiable."""
    return _WithHistory.apply(x, history, shards)


class _WithHistory(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, history: int, shards: TimeShards) -> Tensor:
        ctx.history, ctx.shards = history, shards
        return joined(send_history(x, history, shards).wait(), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        before = ctx.shards.before(ctx.history)
        returned = return_gradient(grad[..., :before], ctx.history, ctx.shards)
        grad_x = grad[..., before:].clone()
        add_returned(grad_x, returned, ctx.history, ctx.shards)
        return grad_x, None, None


@torch.compiler.disable
def without_history(y: Tensor, before: int, dim: int) -> Tensor:
    """y without its first `before` steps along `dim`; a view."""
    return _WithoutHistory.apply(y, before, dim) if before else y


class _WithoutHistory(torch.autograd.Function):
    """As `Tensor.narrow`, whose gradient is set to zero all over before it is written: a pass more.

    A copy behind zeros, not `torch.cat` with them: of 65,536 steps of 256 channels in bf16 on an H100 26 us, where cat took 85.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, before: int, dim: int) -> Tensor:
        ctx.before, ctx.dim = before, dim
        return y.narrow(dim, before, y.shape[dim] - before)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        dim, before, T = ctx.dim, ctx.before, grad.shape[ctx.dim]
        shape = (*grad.shape[:dim], before + T, *grad.shape[dim + 1 :])
        order = sorted(range(grad.dim()), key=grad.stride, reverse=True)  # in memory, which the kernels read as it is
        whole = torch.empty_permuted(shape, order, dtype=grad.dtype, device=grad.device)
        whole.narrow(dim, 0, before).zero_()
        whole.narrow(dim, before, T).copy_(grad)
        return whole, None, None


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        cu_seqlens: Tensor | None,
        dilation: int,
        activation: str,
        shards: TimeShards,
    ) -> Tensor:
        T, history = x.shape[2], (weight.shape[2] - 1) * dilation
        exchange = send_history(x, history, shards)
        own = shards.boundaries(cu_seqlens, 0, T)
        y = ops.causal_conv1d_fused(x, weight, bias, residual, None, own, dilation, activation)
        # (B, C_in, before + first): what the first outputs see. They are computed anew, and those of `before` are another rank's.
        head, before = joined(exchange.wait(), x[..., :history]), shards.before(history)
        first = head.shape[2] - before
        around = shards.boundaries(cu_seqlens, before, first)
        if before:
            extra = None if residual is None else F.pad(residual[..., :first], (before, 0))
            anew = ops.causal_conv1d_fused(head, weight, bias, extra, None, around, dilation, activation)
            y[..., :first] = anew[..., before:]
        ctx.save_for_backward(x, weight, bias, head, own, around)
        ctx.x_is_residual = x is residual
        ctx.dilation, ctx.activation, ctx.shards, ctx.history = dilation, activation, shards, history
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple:
        x, weight, bias, head, own, around = ctx.saved_tensors
        K, dilation, history, shards = weight.shape[2], ctx.dilation, ctx.history, ctx.shards
        needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        before = shards.before(history)
        first = head.shape[2] - before

        def before_activation(grad_y: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
            if ctx.activation == "none":
                return grad_y
            return ops.causal_conv1d_activation_grad(grad_y, x, weight, bias, None, cu_seqlens, dilation, ctx.activation)

        grad_x = grad_weight = grad_bias = None
        grad_past = head[..., :0]
        if before:
            grad_head = before_activation(F.pad(grad_y[..., :first], (before, 0)), head, around)  # (B, C_out, before + first)
            if needs_x:
                grad_past = ops.causal_conv1d_input_grad(grad_head, weight, dilation, None, around)[..., :before]
        if needs_x:
            returned = return_gradient(grad_past, history, shards)
        grad_p = before_activation(grad_y, x, own)
        if before and grad_p is not grad_y:
            grad_p[..., :first] = grad_head[..., before:]
        if needs_weight or needs_bias:
            grad_weight, grad_bias = ops.causal_conv1d_weight_grad(grad_p, x, K, dilation, own)
            if before:
                wide = torch.promote_types(x.dtype, torch.float32)  # a sum is to be rounded, not its terms
                past = F.pad(head[..., :before], (0, first))
                more, _ = ops.causal_conv1d_weight_grad(grad_head.to(wide), past.to(wide), K, dilation, around)
                grad_weight = (grad_weight + more).to(weight.dtype)
        if needs_x:
            grad_x = ops.causal_conv1d_input_grad(grad_p, weight, dilation, grad_y if ctx.x_is_residual else None, own)
            add_returned(grad_x, returned, history, shards)
        grad_residual = grad_y if needs_residual and not ctx.x_is_residual else None
        return grad_x, grad_weight, grad_bias if needs_bias else None, grad_residual, None, None, None, None
