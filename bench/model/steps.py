"""A training step of a form of the model: its gate, its time, its memory."""

import itertools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure import DEVICE, checked
from bench.model.attempts import Figures, attempted, free
from bench.model.forms import Form, Model
from bench.rivals import Results
from fuzzytok_kernels.tuning import timer

STEPS, WARM_STEPS = 24, 3
GRAPH_MS = 500.0  # of replays of a whole step: at least 20 of a step up to 25 ms
# Relative errors in the L2 norm that no correct step has. The gradients pass six blocks whose every value is rounded to bf16.
LOSS_BOUND, GRADIENT_BOUND = 1e-3, 5e-2


class Batch(NamedTuple):
    """Random bytes (B, T), and the bytes that follow them."""

    ids: Tensor
    targets: Tensor

    @staticmethod
    def draw(B: int, T: int) -> "Batch":
        drawn = torch.randint(256, (B, T + 1), device=DEVICE)
        return Batch(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous())


class Step:
    """A training step without the optimiser, under autocast with parameters in fp32: it leaves its gradients in `.grad`."""

    def __init__(self, form: Form, ours: Model, batch: Batch) -> None:
        self.model, self.batch, self.flips = form.build(ours), batch, form.block is not None
        self.forward: Callable[..., Tensor] = self.model
        if form.options is not None:
            torch._dynamo.reset()  # each model is new to it, and it gives up on the ninth
            self.forward = torch.compile(self.model, fullgraph=True, dynamic=False, **form.options)

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = self.forward(*self.batch)
        loss.backward()
        self.loss = loss.detach()

    def results(self) -> Results:
        """The last step's loss and gradients, copied, by the names and in the order of taps that ours has."""
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters() if parameter.grad is not None}
        return {"loss": self.loss.clone(), **{name: self._taps(gradient).clone() for name, gradient in gradients.items()}}

    def _taps(self, gradient: Tensor) -> Tensor:
        return gradient.flatten(2).flip(2) if self.flips and gradient.dim() > 2 else gradient


def first_results(form: Form, ours: Model, batch: Batch) -> Results:
    """What one step leaves; no more than that stays allocated."""
    step = Step(form, ours, batch)
    step()
    return step.results()


def measured(form: Form, ours: Model, batch: Batch, wanted: Results) -> Figures:
    """Error, times and memory of a step, or why it failed."""
    figures = attempted(lambda: _measured(Step(form, ours, batch), wanted))
    free()
    return figures


def _measured(step: Step, wanted: Results) -> Figures:
    step()
    error = error_of(step.results(), wanted)
    figures = {"error": error, "eager_ms": launched_ms(step), "peak_mib": peak_mib(step)}
    graph = attempted(lambda: {"graph_ms": timer.microseconds([step], GRAPH_MS) / 1e3})
    return figures | ({"graph_failed": graph["failed"]} if "failed" in graph else graph)


def error_of(results: Results, wanted: Results) -> float:
    """The largest relative error of a step's results. WrongResultError if one is too large."""
    return checked(results, wanted, {name: LOSS_BOUND if name == "loss" else GRADIENT_BOUND for name in wanted})


def launched_ms(step: Step) -> float:
    """The median step, one launched after another without waiting, as training does."""
    for _ in range(WARM_STEPS):
        step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(1 + STEPS)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in itertools.pairwise(events))


def peak_mib(step: Step) -> float:
    """What a step, warmed up, allocates at its peak, gradients included, above what is there without them."""
    step()
    step.model.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / (1 << 20)
