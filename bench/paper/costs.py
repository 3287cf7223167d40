"""What training a model costs on a GPU: peak memory at the paper's two shapes, and the speed of the step beside that of the model alone."""

import functools
import gc
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from bench.model.attempts import attempted, free
from bench.paper.config import Run
from bench.paper.models import LanguageModel
from bench.paper.step import Step, autocast
from fuzzytok_kernels.tuning import timer

SHAPES = ((16, 1024), (32, 2048))  # the paper's B x T, in bytes
_TIMED = 50
_GRAPH_MS = 300.0


def memory(run: Run, bytes_per_id: float, device: torch.device) -> dict[str, Any]:
    """Peak MiB of everything that training allocates at each shape, weights and optimiser included, in windows of equal bytes."""
    figures = {}
    for B, T in SHAPES:
        figures[f"{B}x{T}"] = attempted(functools.partial(_peak_mib, run, B, round(T / bytes_per_id), device))
        free()
    return figures


def _peak_mib(run: Run, batch: int, length: int, device: torch.device) -> float:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step, starts, rate = _random_step(run, batch, length, device)
    step(starts, rate)  # the optimiser's state comes into being
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step(starts, rate)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / (1 << 20)


def speed(run: Run, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a training step as the run takes it, and of its forward and backward alone."""
    figures: dict[str, Any] = {}
    for name, measure in (("step_ms", _step_ms), ("model_ms", _model_ms)):
        figures[name] = attempted(functools.partial(measure, run, device))
        free()
    return figures


def compiled_ms(run: Run, device: torch.device) -> Any:
    """Milliseconds of the step compiled by PyTorch, or why it has none."""
    milliseconds = attempted(functools.partial(_compiled_ms, run, device))
    free()
    return milliseconds


def _step_ms(run: Run, device: torch.device) -> float:
    step, starts, rate = _random_step(run, run.settings.batch, run.length, device)
    step.capture()
    return _launched_ms(step, starts, rate)


def _compiled_ms(run: Run, device: torch.device) -> float:
    step, starts, rate = _random_step(run, run.settings.batch, run.length, device)
    torch._dynamo.reset()
    step.forward = torch.compile(step.model.loss, dynamic=False)
    step.capture()
    if step.not_captured:
        raise RuntimeError(step.not_captured)
    return _launched_ms(step, starts, rate)


def _model_ms(run: Run, device: torch.device) -> float:
    """As `bench.model` times it: forward and backward of the windows in a CUDA graph, with no optimiser and no data to fetch."""
    step, _, _ = _random_step(run, run.settings.batch, run.length, device)
    ids = torch.randint(run.size.vocabulary, (run.settings.batch, run.length + 1), device=device)

    def once() -> None:
        step.model.zero_grad(set_to_none=True)
        with autocast(device):
            loss = step.model.loss(ids)
        loss.backward()

    return timer.microseconds([once], _GRAPH_MS) / 1e3


def _launched_ms(step: Step, starts: Tensor, rate: Tensor) -> float:
    """The median of steps that are waited for one by one."""
    times = []
    for number in range(5 + _TIMED):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step(starts, rate)
        torch.cuda.synchronize()
        if number >= 5:
            times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def _random_step(run: Run, batch: int, length: int, device: torch.device) -> tuple[Step, Tensor, Tensor]:
    torch.manual_seed(0)
    model = LanguageModel(run.size).to(device)
    stream = torch.randint(run.size.vocabulary, (batch * length + 1,), device=device).short()
    step = Step(model, stream, length, run.settings._replace(batch=batch))
    return step, length * torch.arange(batch, device=device), torch.full((), 1e-4, device=device)
