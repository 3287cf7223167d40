"""What the package uses of PyTorch that PyTorch does not promise to keep, all in one place.

tests/test_private.py says of each what breaks without it. Triton's is in `private_triton`, which imports Triton.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd import forward_ad

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

_PLAIN = {
    (torch._C.DispatchKeySet(of_device) | torch._C.DispatchKeySet(of_autograd)).raw_repr()
    for of_device, of_autograd in (
        (torch._C.DispatchKey.CPU, torch._C.DispatchKey.AutogradCPU),
        (torch._C.DispatchKey.CUDA, torch._C.DispatchKey.AutogradCUDA),
    )
}

# Inside, ops skip autograd and its marks of views and of changes in place.
below_autograd: Callable[[], AbstractContextManager] = torch._C._AutoDispatchBelowADInplaceOrView

# Inside, ops skip autograd alone, so that what they change in place is counted.
below_derivatives: Callable[[], AbstractContextManager] = torch._C._AutoDispatchBelowAutograd


def without_autocast() -> AbstractContextManager:
    """Inside, ops keep the dtypes that they are given."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)


def are_plain(keys: Any) -> bool:
    """Whether the keys that the dispatcher hands a kernel of autograd are that and a device's alone: no mode, subclass or transform."""
    return keys.raw_repr() in _PLAIN


def in_forward_mode() -> bool:
    """Whether a level of dual numbers is open, so that a tensor which requires no gradient may have a tangent."""
    return forward_ad._current_level >= 0


def apply_of(function: type[torch.autograd.Function]) -> Callable:
    """`function.apply` for a call outside torch.func, past its `inspect.signature`, which takes longer than the rest of it."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def defaults_of(op: Any) -> tuple:
    """The default of each argument of an overload of an op, None where it has none."""
    return tuple(argument.default_value for argument in op._schema.arguments)


def written_by(op: Any) -> list[int]:
    """The arguments that an overload of an op writes in place, by their places."""
    aliases = [argument.alias_info for argument in op._schema.arguments]
    return [index for index, alias in enumerate(aliases) if alias is not None and alias.is_write]


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of `module` runs more than its forward."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


# Of the backward that calls a hook: a number that no other one has.
backward_number: Callable[[], int] = torch._C._current_graph_task_id


def after_backward(callback: Callable[[], None]) -> None:
    """Within a backward: has `callback` called at its end, on the streams of its caller."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]
