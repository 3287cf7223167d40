"""The mean over ranks of the gradients of replicated parameters."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fuzzytok_kernels import private

_LAST = 0.2  # of the bytes, at most: of ByteLM's the byte front has 0.11 to 0.2, by its width from 64 on, and with the next block more


def average_gradients(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """From now on a backward leaves in `.grad` of the parameters of `module` the mean over the ranks of `group`.

    The parameters are the same on all ranks. Their gradients are averaged in two messages for each dtype: those of the first parameters,
    which as a rule are ready last, at the end, and all others as soon as they are there. Each of the two is one tensor, of which the
    gradients are views from then on. A gradient that was there before is averaged with what is added to it. Parameters that get none must
    get none on any rank, and a backward that raises must do so on all of them, in the same op.
    """
    averaging = _Averaging(module, group)
    for parameter in averaging.strides:
        parameter.register_post_accumulate_grad_hook(averaging.ready)


class _Averaging:
    """Two messages, of which the first is on its way while the byte front's backward runs: look-ups, which wait for memory.

    So a step of 65,536 bytes a rank on 2 H100s took 2,662 us, and 2,689 with one message at the end (medians of two, in turns).
    No more parts: kernels that share the GPU with NCCL's take longer by as much as is hidden. In one message at the end, a step of 65,536
    bytes a rank on 2 H100s took 3,045 us, in parts of 4 MiB 3,065, in parts of 1 MiB 3,029; launched by the host 9,280, 10,156 and 10,306.
    On 4 it took 1,092 us of 16,384 bytes and 10,488 of 262,144, in parts of 4 MiB 1,066 and 10,687. That was with NCCL's call for many
    tensors where they lie, 77 us of it on 2 GPUs and 130 on 4; bench.links measured 45 and 57 for one such tensor.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None) -> None:
        self.group = group
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # Those of a gradient: the parameter's, unless it has gaps.
        self.strides: dict[Tensor, Any] = {parameter: torch.empty_like(parameter, device="meta").stride() for parameter in parameters}
        # By their order in the module, the same on all ranks, not by that of arrival.
        ends = list(accumulate(parameter.nbytes for parameter in parameters))
        last = sum(end <= _LAST * ends[-1] for end in ends)
        self.parts = parameters[last:], parameters[:last]
        self.backward: int | None = None
        self.missing: set[Tensor] = set()  # of the first part, in this backward
        self.streams: set[Any] = set()
        self.sent: list[tuple[Any, Tensor, list[Tensor], list[Tensor]]] = []

    def ready(self, parameter: Tensor) -> None:
        """Once for each parameter and backward, when its gradient is complete."""
        backward = private.backward_number()
        if backward != self.backward:  # what is left of another one is of one that raised, or in which this one is nested
            self.backward, self.missing, self.streams, self.sent = backward, set(self.parts[0]), set(), []
            private.after_backward(self.average)
        self.streams.add(torch.cuda.current_stream() if parameter.is_cuda else None)
        if parameter in self.missing:
            self.missing.remove(parameter)
            if not self.missing and len(self.streams) == 1:  # at the end, what other streams computed has been waited for
                self.send(self.parts[0])

    def average(self) -> None:
        """At the end of a backward."""
        if self.backward is None:  # the end of one nested in this one has averaged all
            return
        for part in self.parts[bool(self.sent) :]:
            self.send(part)
        for work, whole, parameters, views in self.sent:
            work.wait()
            if not self.has_mean():
                whole /= dist.get_world_size(self.group)
            for parameter, view in zip(parameters, views, strict=True):
                parameter.grad = view
        self.backward, self.sent = None, []

    def send(self, part: Sequence[Tensor]) -> None:
        of_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in part:
            if parameter.grad is not None:
                of_dtype.setdefault(parameter.dtype, []).append(parameter)
        for parameters in of_dtype.values():
            whole, views = self.joined(parameters)
            how = dist.ReduceOp.AVG if self.has_mean() else dist.ReduceOp.SUM
            self.sent.append((dist.all_reduce(whole, how, self.group, async_op=True), whole, parameters, views))

    def has_mean(self) -> bool:
        return dist.get_backend(self.group) == "nccl"  # gloo has none

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
