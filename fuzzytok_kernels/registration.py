"""How an op joins `torch.ops.fuzzytok`: its implementation, autograd, autocast and vmap, in the same way for all.

Each op has one `autograd.Function` (with `setup_context` and `vmap`) registered for both the Autograd and the functorch key: with
`torch.library.register_autograd` forward-mode AD is silently zero and `torch.func.grad` raises (seen on torch 2.13).
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuzzytok_kernels import private
from fuzzytok_kernels.checks import CHECKS, check_boundaries
from fuzzytok_kernels.support import runs_triton

_library = torch.library.Library("fuzzytok", "DEF")


class Function(torch.autograd.Function):
    """The forward of each dispatches below ADInplaceOrView, not Autograd alone: else a result that the reference made by a view would be
    one for autograd too, and `nn.ReLU(inplace=True)` behind it would raise."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(
            "the fuzzytok ops have no forward-mode derivative; use reverse mode (backward, torch.func.grad, torch.func.vjp)"
        )


@functools.cache
def implementation(name: str, device: torch.device, rooms: str = "fuzzytok_kernels") -> Callable:
    """What computes an op on `device`: its Triton launcher, which checks when it makes a plan, or the reference behind a check.

    Both are in modules of `rooms`. Values of `cu_seqlens` are checked here where that waits for no GPU; there a kernel asserts them.
    """
    compute = getattr(importlib.import_module(f"{rooms}.reference"), name)
    if runs_triton(device):
        room = "byte_launch" if name.startswith("byte_") else "launch"
        compute = getattr(importlib.import_module(f"{rooms}.{room}"), name)
        if device.type == "cuda":
            return compute
    check = CHECKS[name]
    names = list(inspect.signature(check).parameters)
    packed = names.index("cu_seqlens") if "cu_seqlens" in names else len(names)

    def checked(*args: Any) -> Any:
        check(*args)
        for cu_seqlens in (arg for arg in args[packed : packed + 1] if arg is not None):
            check_boundaries(cu_seqlens, args[0].shape[-1])
        return compute(*args)

    return checked


def select(args: tuple, dims: tuple, index: int) -> list:
    return [arg if dim is None else arg.select(dim, index) for arg, dim in zip(args, dims, strict=True)]


def vmap_folding_first(op: Callable, size: int, in_dims: tuple, args: tuple) -> tuple[Tensor, int]:
    """vmap over the first argument alone is a larger batch, if no other has one; else it is one call a slice."""
    if in_dims[0] is not None and all(dim is None for dim in in_dims[1:]) and not any(isinstance(arg, Tensor) for arg in args[3:]):
        first = args[0].movedim(in_dims[0], 0)
        return op(first.flatten(0, 1), *args[1:]).unflatten(0, first.shape[:2]), 0
    return torch.stack([op(*select(args, in_dims, i)) for i in range(size)]), 0


def _below_autograd(op: Callable, compute: Callable, derive: Callable, defaults: tuple) -> Callable:
    """The Autograd kernel of an op: `derive`, or the op itself where nothing could want a derivative (saves some 8 us a call).

    Where the dispatcher would find `compute` next it is called as it is: a second dispatch takes as long as a third of a launch.
    """

    def autograd(keys: Any, *args: Any) -> Any:
        wanted = torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        if wanted or private.in_forward_mode():
            return derive(*args, *defaults[len(args) :])
        with private.below_autograd():
            return (compute if private.are_plain(keys) else op)(*args)

    return autograd


def cast_for_autocast(args: tuple) -> tuple:
    """`args` as F.conv1d's rule has them under autocast: in its dtype, but for fp64. A tensor given twice stays one."""
    dtype = torch.get_autocast_dtype(args[0].device.type)
    casts: dict[int, Tensor] = {}

    def cast(arg: Any) -> Any:
        if not isinstance(arg, Tensor) or not arg.is_floating_point() or arg.dtype == torch.float64:
            return arg
        if id(arg) not in casts:
            casts[id(arg)] = arg.to(dtype)
        return casts[id(arg)]

    return tuple(map(cast, args))


def _autocast(op: Callable, casts: bool) -> Callable:
    """A forward follows the autocast dtype, a gradient keeps its own, and nothing inside is cast again."""

    def autocast(*args: Any) -> Any:
        with private.without_autocast():
            return op(*cast_for_autocast(args)) if casts else op(*args)

    return autocast


def _functorch(apply: Callable, defaults: tuple, casts: bool) -> Callable:
    """The kernel under torch.func's transforms. Its key comes before autocast's, and the function has to save what was cast."""

    def front(*args: Any) -> Any:
        args = (*args, *defaults[len(args) :])
        device = args[0].device.type
        if casts and device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
            args = cast_for_autocast(args)
        return apply(*args)

    return front


def register(schema: str, fake: Callable, derived: Callable, transformed: Callable, autocast: bool = False) -> Any:
    """Define an op with its fake and every kernel: `derived` where a derivative may be wanted, `transformed` under torch.func.

    Either is an autograd.Function, or does what the op does in steps that have derivatives of their own.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    op = getattr(torch.ops.fuzzytok, name).default

    def compute(first: Tensor, *args: Any) -> Any:
        return implementation(name, first.device)(first, *args)

    for key in ("CPU", "CUDA"):
        _library.impl(name, compute, key)
    torch.library.register_fake(f"fuzzytok::{name}", fake, lib=_library)
    defaults = private.defaults_of(op)  # the dispatcher strips arguments that equal theirs
    _library.impl(name, _below_autograd(op, compute, derived, defaults), "Autograd", with_keyset=True)
    _library.impl(name, _functorch(transformed, defaults, autocast), "FuncTorchDynamicLayerFrontMode")
    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(name, _autocast(op, autocast), key)
    return op
