"""The mean over ranks of the gradients of replicated parameters."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fuzzytok_kernels import private


def average_gradients(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """From now on a backward leaves in `.grad` of the parameters of `module` the mean over the ranks of `group`.

    The parameters are the same on all ranks. At the end of the backward all gradients of a dtype are on their way in one call, each from
    where it lies; DDP copies each into a bucket first, a kernel a parameter. A gradient that was there before is averaged with what is
    added to it. Parameters that get none must get none on any rank.
    """
    averaging = _Averaging(module, group)
    for parameter in averaging.parameters:
        parameter.register_post_accumulate_grad_hook(averaging.ready)


class _Averaging:
    """At the end, and not in parts during the backward: kernels that share the GPU with NCCL's take longer by as much as is hidden.

    A step of 65,536 bytes a rank on 2 H100s took 3,045 us so, 3,065 in parts of 4 MiB and 3,029 in parts of 1 MiB; of 16,384 bytes 1,049
    and 1,045 (4 MiB), of 262,144 bytes 10,591 and 10,542. Launched by the host it took 9,280, 10,156 and 10,306 us.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None) -> None:
        self.group: Any = group or dist.group.WORLD
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.due = False
        self.op = dist.ReduceOp.AVG if dist.get_backend(group) == "nccl" else dist.ReduceOp.SUM  # gloo has no mean

    def ready(self, parameter: Tensor) -> None:
        self.due = True
        private.after_backward(self.average)  # each of them, for a backward that raised has left `due` behind and called nothing

    def average(self) -> None:
        if not self.due:
            return
        self.due = False
        of_dtype: dict[Any, list[Tensor]] = {}
        for parameter in self.parameters:
            if parameter.grad is not None:
                of_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
        works = [private.all_reduce_together(gradients, self.op, self.group) for gradients in of_dtype.values()]
        for work, gradients in zip(works, of_dtype.values(), strict=True):
            work.wait()  # on a GPU its stream waits, not the host
            if self.op == dist.ReduceOp.SUM:
                for gradient in gradients:
                    gradient /= dist.get_world_size(self.group)
