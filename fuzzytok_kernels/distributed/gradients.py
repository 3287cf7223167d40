"""The mean over ranks of the gradients of replicated parameters, while the backward that makes them goes on."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fuzzytok_kernels import private


def average_gradients(module: nn.Module, group: dist.ProcessGroup | None = None, unit_bytes: int = 4 << 20) -> None:
    """From now on a backward leaves in `.grad` of the parameters of `module` the mean over the ranks of `group`.

    The parameters, the same on all ranks, are taken from the last to the first, `unit_bytes` or more at a time: once a unit has its
    gradients, they are on their way, each from where it lies, in one call. DDP copies each into a bucket first, a kernel a parameter.
    A gradient that was there before is averaged with what is added to it. Parameters that get none must get none on any rank.

    Raises:
        ValueError: a unit_bytes below 1.
    """
    if unit_bytes < 1:
        raise ValueError(f"unit_bytes is {unit_bytes}; expected at least 1")
    averaging = _Averaging(module, group, unit_bytes)
    for parameter in averaging.unit_of:
        parameter.register_post_accumulate_grad_hook(averaging.ready)


class _Averaging:
    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None, unit_bytes: int) -> None:
        self.group: Any = group or dist.group.WORLD
        self.units = list(_units([parameter for parameter in module.parameters() if parameter.requires_grad], unit_bytes))
        self.unit_of: dict[Tensor, int] = {parameter: number for number, unit in enumerate(self.units) for parameter in unit}
        self.missing: list[int] = []  # parameters of each unit without a gradient yet; empty between backwards
        self.sent: list[tuple[dist.Work | None, list[Tensor]]] = []
        self.op = dist.ReduceOp.AVG if dist.get_backend(group) == "nccl" else dist.ReduceOp.SUM  # gloo has no mean

    def ready(self, parameter: Tensor) -> None:
        if not self.missing:
            self.missing = [len(unit) for unit in self.units]
            private.after_backward(self.finish)
        self.missing[self.unit_of[parameter]] -= 1
        while len(self.sent) < len(self.units) and not self.missing[len(self.sent)]:
            self.send()  # in the order of the units, which is that of all ranks

    def send(self) -> None:
        gradients = [parameter.grad for parameter in self.units[len(self.sent)] if parameter.grad is not None]
        work = private.all_reduce_together(gradients, self.op, self.group) if gradients else None
        self.sent.append((work, gradients))

    def finish(self) -> None:
        while len(self.sent) < len(self.units):
            self.send()
        for work, gradients in self.sent:
            if work is not None:
                work.wait()  # on a GPU its stream waits, not the host
            if self.op == dist.ReduceOp.SUM:
                for gradient in gradients:
                    gradient /= dist.get_world_size(self.group)
        self.missing, self.sent = [], []


def _units(parameters: list[nn.Parameter], unit_bytes: int) -> Iterable[list[nn.Parameter]]:
    """From the last parameter to the first, of one dtype each."""
    unit: list[nn.Parameter] = []
    for parameter in reversed(parameters):
        if unit and (sum(other.nbytes for other in unit) >= unit_bytes or parameter.dtype != unit[0].dtype):
            yield unit
            unit = []
        unit.append(parameter)
    if unit:
        yield unit
