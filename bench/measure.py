"""One row: its data, its check against the reference in fp64, its rounds, and what is stored of it."""

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.grid import ELEMENT_SIZES, Case, flops, least_bytes
from bench.rivals import RIVALS, Inputs, Results, Rival, draw
from bench.roofline import Ceilings
from fuzzytok_kernels import reference, tuning
from fuzzytok_kernels.support import conv_switch
from fuzzytok_kernels.tuning import timer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CALLS = 32 if DEVICE == "cuda" else 4  # in a round, at least
HOST_ROUNDS = 1000 if DEVICE == "cuda" else 20
BUDGET_MS = 80.0  # of rounds a row: with 20, rows of one config and one size differed by up to 17 %
# A rival so slow that CALLS of it take longer has fewer in its graph: F.conv1d with K=7 takes 4.5 ms forward alone.
LONGEST_ROUND_MS = 400.0 if DEVICE == "cuda" else math.inf
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
# Relative errors in the L2 norm that no correct result has: a few roundings of the dtype; for strict fp32, less than TF32 has.
_BOUNDS = {"bf16": 1e-2, "fp16": 2e-3, "tf32": 2e-3, "fp32": 1e-4}


class WrongResultError(ValueError):
    """A result that no rounding explains: no speed is worth printing beside it."""


class Data:
    """Copies of random inputs, and samples of what the first copy's results should be."""

    def __init__(self, case: Case, count: int) -> None:
        self.shape, self.dtype = case.shape, case.dtype
        self.copies = [draw(case.shape, _DTYPES[case.dtype], case.layout, DEVICE) for _ in range(count)]

    @staticmethod
    def copies_of(case: Case) -> int:
        """How many copies the calls must rotate over for none to find its data in the L2."""
        if DEVICE == "cpu":
            return 2
        return max(2, -(-timer.COLD_BYTES // least_bytes("forward", case.shape, ELEMENT_SIZES[case.dtype])))

    def error(self, results: Results) -> float:
        """The largest relative error of `results`, the first copy's. WrongResultError if it is too large."""
        samples = {name: self._sample(name, value) for name, value in results.items()}
        return checked(samples, {name: self._wanted[name] for name in results}, dict.fromkeys(results, _BOUNDS[self.dtype]))

    @functools.cached_property
    def _wanted(self) -> Results:
        (x, weight, bias, grad_y), d, (batch, ins, outs) = self.copies[0], self.shape.d, self._samples
        y = reference.causal_conv1d(x[batch].double(), weight[outs].double(), bias[outs].double(), d)
        grad_x = reference.causal_conv1d_input_grad(grad_y[batch].double(), weight[:, ins].double(), d)
        grad_weight, grad_bias = reference.causal_conv1d_weight_grad(grad_y[:, outs].double(), x[:, ins].double(), self.shape.K, d)
        return {"y": y, "grad_x": grad_x, "grad_weight": grad_weight, "grad_bias": grad_bias}

    @property
    def _samples(self) -> tuple[Tensor, Tensor, Tensor]:
        """The batch entries, input channels and output channels that are checked: from the first to the last."""
        sizes = ((self.shape.B, 2), (self.shape.c_in, 16), (self.shape.c_out, 16))
        return tuple(torch.linspace(0, size - 1, min(size, most), device=DEVICE).long() for size, most in sizes)  # type: ignore[return-value]

    def _sample(self, name: str, value: Tensor) -> Tensor:
        batch, ins, outs = self._samples
        return {
            "y": lambda: value[batch][:, outs],
            "grad_x": lambda: value[batch][:, ins],
            "grad_weight": lambda: value[outs][:, ins],
            "grad_bias": lambda: value[outs],
        }[name]()


def checked(results: Results, wanted: Results, bounds: dict[str, float]) -> float:
    """The largest relative error in the L2 norm. WrongResultError if one is above its bound, or NaN."""
    errors = {name: float((results[name].double() - right.double()).norm() / right.double().norm()) for name, right in wanted.items()}
    wrong = {name: f"{error:.1e}, at most {bounds[name]}" for name, error in errors.items() if not error <= bounds[name]}
    if wrong:
        raise WrongResultError(f"relative errors {wrong}")
    return max(errors.values())


class Call:
    """One call of a rival on one copy. It keeps its results, so that no two copies' outputs share memory."""

    def __init__(self, rival: Rival, op: str, inputs: Inputs) -> None:
        self.inputs = rival.adapt(inputs, op)
        if op == "forward_backward":
            x, weight, bias = (value if value.requires_grad else value.detach().requires_grad_() for value in self.inputs[:3])
            self.inputs = Inputs(x, weight, bias, self.inputs.grad_y)
        self.op: Callable[[Inputs], Results] = getattr(rival, op)
        self.results: Results = {}

    def __call__(self) -> None:
        self.results = self.op(self.inputs)


def rotation(copies: list[Call]) -> list[Call]:
    """All copies in turn, at least CALLS."""
    return copies * -(-CALLS // len(copies))


class Calls:
    """The calls of one row."""

    def __init__(self, case: Case, data: Data) -> None:
        self.data = data
        self.rival = RIVALS[case.rival](case.shape)
        self.copies = [Call(self.rival, case.op, inputs) for inputs in data.copies]

    @functools.cached_property
    def all(self) -> list[Call]:
        """Those of a round, in order."""
        calls = rotation(self.copies)
        return calls[: int(max(1, min(len(calls), LONGEST_ROUND_MS / _milliseconds(self.copies[0]))))]

    def configs(self) -> dict[str, dict[str, Any]]:
        """Run once; the configs that our kernels ran with, by op. Empty for rivals, and where the reference computes."""
        with tuning.record_problems() as problems:
            self.copies[0]()
        device = 0 if DEVICE == "cuda" else -1
        return {problem.op: tuning.get_config(device, problem)._asdict() for problem in sorted(problems)}

    def error(self) -> float:
        """The error of what the first copy's last call left."""
        first = self.copies[0]
        return self.data.error(self.rival.logical(first.results, first.inputs))


def _milliseconds(call: Call) -> float:
    """Of a second call, after one that compiles and chooses."""
    for _ in range(2):
        begin = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


class Round:
    """All calls once and a synchronisation: one replay of a captured graph on a GPU, a loop on the CPU. Keeps the times."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        self.graph = timer.capture(self.calls) if DEVICE == "cuda" else None
        self.milliseconds: list[float] = []

    def __call__(self) -> None:
        self.milliseconds.append(timer.replay(self.graph) if self.graph else self._loop())

    def microseconds(self) -> float:
        """The median of a call."""
        return statistics.median(self.milliseconds) * 1e3 / len(self.calls)

    def _loop(self) -> float:
        begin = time.perf_counter()
        for call in self.calls:
            call()
        return (time.perf_counter() - begin) * 1e3


@functools.cache
def host_medians(cases: tuple[Case, ...]) -> dict[str, float]:
    """By rival, the microseconds in which an eager call returns, the device idle at its start and never waited for.

    In turns: row after row on an H100's host, `CausalConv1d` seemed to return 12 % sooner than the op that it calls.
    """
    calls = {case.rival: Calls(case, Data(case, 1)).copies[0] for case in cases}
    times: dict[str, list[float]] = {rival: [] for rival in calls}
    for _ in range(HOST_ROUNDS):
        for rival, call in calls.items():
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            times[rival].append((time.perf_counter() - begin) * 1e6)
    return {rival: statistics.median(values) for rival, values in times.items()}


@contextlib.contextmanager
def switches(case: Case) -> Iterator[None]:
    """PyTorch's switches as the row has them; those of fp32 are touched in its own rows only, since the older names then raise."""
    precision = conv_switch.fp32_precision
    torch.backends.cudnn.benchmark = RIVALS[case.rival].searched
    if case.dtype in ("tf32", "fp32"):
        conv_switch.fp32_precision = "tf32" if case.dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False
        if case.dtype in ("tf32", "fp32"):
            conv_switch.fp32_precision = precision


def extra_info(case: Case, microseconds: float, ceilings: Ceilings | None, beside: float | None = None) -> dict[str, Any]:
    """What a row says of itself; `beside` are the microseconds of its companion."""
    work, moved = flops(case.op, case.shape), least_bytes(case.op, case.shape, ELEMENT_SIZES[case.dtype])
    floor = max(work / ceilings.flops, moved / ceilings.bandwidth) * 1e6 if ceilings and case.dtype in ("bf16", "fp16") else None
    return {
        "section": case.section,
        "op": case.op,
        "rival": case.rival,
        "shape": str(case.shape),
        "dtype": case.dtype,
        "layout": case.layout,
        "microseconds": microseconds,
        "beside": beside,
        "tokens_per_s": case.shape.tokens / microseconds * 1e6,
        "tflops": work / microseconds / 1e6,
        "gb_per_s": moved / microseconds / 1e3,
        "roofline_share": floor / microseconds if floor else None,
    }
