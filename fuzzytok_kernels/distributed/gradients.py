"""The mean over ranks of the gradients of replicated parameters."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fuzzytok_kernels import private


def average_gradients(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """From now on a backward leaves in `.grad` of the parameters of `module` the mean over the ranks of `group`.

    The parameters are the same on all ranks. At its end all gradients of a dtype are copied into one tensor, which is averaged, and of
    which they are views from then on. A gradient that was there before is averaged with what is added to it. Parameters that get none
    must get none on any rank.
    """
    averaging = _Averaging(module, group)
    for parameter in averaging.strides:
        parameter.register_post_accumulate_grad_hook(averaging.ready)


class _Averaging:
    """At the end, not in parts during the backward: kernels that share the GPU with NCCL's take longer by as much as is hidden.

    A step of 65,536 bytes a rank on 2 H100s took 3,045 us so, 3,065 in parts of 4 MiB, 3,029 in parts of 1 MiB; launched by the host
    9,280, 10,156 and 10,306. On 4 it took 1,092 us of 16,384 bytes and 10,488 of 262,144, in parts of 4 MiB 1,066 and 10,687. That was with
    NCCL's call for many tensors where they lie, 77 us of it on 2 GPUs and 130 on 4; bench.links measured 45 and 57 for one such tensor.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None) -> None:
        self.group = group
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # Those of a gradient: the parameter's, unless it has gaps.
        self.strides: dict[Tensor, Any] = {parameter: torch.empty_like(parameter, device="meta").stride() for parameter in parameters}
        self.due = False

    def ready(self, parameter: Tensor) -> None:
        self.due = True
        private.after_backward(self.average)  # each of them, for a backward that raised has left `due` behind and called nothing

    def average(self) -> None:
        if not self.due:
            return
        self.due = False
        of_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self.strides:
            if parameter.grad is not None:
                of_dtype.setdefault(parameter.dtype, []).append(parameter)
        for parameters in of_dtype.values():
            whole, views = self.joined(parameters)
            if dist.get_backend(self.group) == "nccl":
                dist.all_reduce(whole, dist.ReduceOp.AVG, self.group)
            else:  # gloo has no mean
                dist.all_reduce(whole, group=self.group)
                whole /= dist.get_world_size(self.group)
            for parameter, view in zip(parameters, views, strict=True):
                parameter.grad = view

    def joined(self, parameters: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The gradients in one tensor, and as views of it: 6.3 us of ByteLM's on an H100, where `_foreach_copy_` took 8.4."""
        flat = [_flat(parameter.grad, self.strides[parameter]) for parameter in parameters if parameter.grad is not None]
        whole = torch.cat(flat)
        parts = zip(parameters, whole.split([part.numel() for part in flat]), strict=True)
        return whole, [part.as_strided(parameter.shape, self.strides[parameter]) for parameter, part in parts]


def _flat(gradient: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Its elements in the order of `strides`, which have no gaps; a view where it lies so."""
    if gradient.stride() != strides:
        gradient = gradient.new_empty_strided(gradient.shape, strides).copy_(gradient)
    return gradient.as_strided((gradient.numel(),), (1,))
