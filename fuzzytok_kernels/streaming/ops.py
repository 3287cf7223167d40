"""The updating ops under `torch.ops.fuzzytok`: schemas, checks, fakes and autocast. They have no derivative, and say so."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from fuzzytok_kernels import private, reference
from fuzzytok_kernels.checks import CHECKS
from fuzzytok_kernels.layout import empty_output
from fuzzytok_kernels.registration import implementation

_library = torch.library.Library("fuzzytok", "FRAGMENT")


def _causal_conv1d_update_fake(x: Tensor, conv_state: Tensor, weight: Tensor, *others: Any) -> Tensor:
    CHECKS["causal_conv1d_update"](x, conv_state, weight, *others)
    return empty_output(x, weight.shape[0] // 2 if others[-1] in reference.GATES else weight.shape[0])


def _residual_stack_update_fake(x: Tensor, *others: Any) -> Tensor:
    CHECKS["residual_stack_update"](x, *others)
    return empty_output(x, x.shape[1])


def _embedding_norm_fake(ids: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    CHECKS["embedding_norm"](ids, embedding, weight, bias, eps)
    return embedding.new_empty(*ids.shape, embedding.shape[1])


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    flat = [part for arg in args for part in (arg if isinstance(arg, list | tuple) else [arg])]
    return [part for part in flat if isinstance(part, Tensor)]


def _without_derivative(op: Callable, name: str, instead: str) -> Callable:
    """The Autograd kernel: refuses where a derivative could be wanted."""

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(args)):
            raise RuntimeError(
                f"{name} has no derivative, and an argument requires one; call it under torch.no_grad(), or train with {instead}"
            )
        if private.in_forward_mode() and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in _tensors(args)):
            raise NotImplementedError(f"{name} has no derivative, and an argument has a tangent; train with {instead}")
        with private.below_derivatives():
            return op(*args)

    return autograd


def _counting(op: Callable, written: Sequence[int]) -> Callable:
    """The ADInplaceOrView kernel: what is written in place is known to have changed by all who saved it for a backward."""

    def count(*args: Any) -> Any:
        with private.below_autograd():
            result = op(*args)
        increment_version([args[index] for index in written])
        return result

    return count


def _autocast(op: Callable, written: Sequence[int]) -> Callable:
    """What is read follows the autocast dtype; what is written cannot, and the check says so if it has another."""

    def cast(arg: Any) -> Any:
        if isinstance(arg, list | tuple):
            return [cast(part) for part in arg]
        if not isinstance(arg, Tensor) or not arg.is_floating_point() or arg.dtype == torch.float64:
            return arg
        return arg.to(torch.get_autocast_dtype(arg.device.type))

    def autocast(*args: Any) -> Any:
        with private.without_autocast():
            return op(*(arg if index in written else cast(arg) for index, arg in enumerate(args)))

    return autocast


def _register(schema: str, fake: Callable, instead: str) -> Any:
    """Define an op with its fake and its kernels; those that write a tensor (`!` in the schema) follow autocast."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    op = getattr(torch.ops.fuzzytok, name).default
    written = private.written_by(op)
    for key in ("CPU", "CUDA"):
        _library.impl(name, lambda first, *args: implementation(name, first.device, __package__)(first, *args), key)
    torch.library.register_fake(f"fuzzytok::{name}", fake, lib=_library)
    _library.impl(name, _without_derivative(op, name, instead), "Autograd")
    if written:
        _library.impl(name, _counting(op, written), "ADInplaceOrView")
        for key in ("AutocastCPU", "AutocastCUDA"):
            _library.impl(name, _autocast(op, written), key)
    return op


causal_conv1d_update = _register(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor? residual, Tensor? cache_seqlens, "
    "Tensor? conv_state_indices, int dilation, str activation) -> Tensor",
    _causal_conv1d_update_fake, "causal_conv1d",
)  # fmt: skip
residual_stack_update = _register(
    "residual_stack_update(Tensor x, Tensor(a!) history, Tensor(b!) positions, Tensor? slots, Tensor[] weights, Tensor[] biases, "
    "int[] dilations, str activation) -> Tensor",
    _residual_stack_update_fake, "ResidualCausalBlock",
)  # fmt: skip
embedding_norm = _register(
    "embedding_norm(Tensor ids, Tensor embedding, Tensor weight, Tensor bias, float eps) -> Tensor",
    _embedding_norm_fake, "torch.nn.functional.embedding and layer_norm",
)  # fmt: skip
