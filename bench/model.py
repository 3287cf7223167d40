"""`python -m bench.model [--only block,...]`: the fused block, and a model of such blocks, against PyTorch's; prints the table of bars."""

import argparse
import copy
import gc
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuzzytok_kernels
from bench import pictures
from bench.bars import Bar, _judged
from bench.grid import ELEMENT_SIZES, Shape, least_bytes
from bench.measure import CALLS, DEVICE, Call
from bench.report import _table
from bench.results import FOLDER, slug
from bench.rivals import Conv1dPad, Conv2dPad, Conv2dTrim, Inputs, Ours, Results, Rival, draw
from fuzzytok_kernels import CausalConv1d, FuzzyTokenizer, ResidualCausalBlock, reference
from fuzzytok_kernels.tuning import timer
from fuzzytok_kernels.tuning.gpu import versions

BLOCK = Shape(32, 2048, 256, 256, 3, 4)
BATCHES = ((32, 2048), (16, 1024))
DILATIONS = (1, 2, 4)
DEPTHS = (2, 4, 8, 12, 16, 24)
RULE_CHANNELS = (256, 512, 1024)
FORWARD_BARS = {"relu": 1.15, "silu": 1.25, "gelu_tanh": 1.25, "gelu": 1.45}
ROUNDS, STEPS, WARM_STEPS = 25, 24, 3
GRAPH_MS = 500.0  # of replays of a whole step: at least 20 of a step up to 25 ms
PAPER_SAVED = 0.381  # of video memory, against PyTorch's Conv1D at B=16, T=1024

# Relative errors in the L2 norm that no correct result has. A model's gradients pass six blocks whose every value is rounded to bf16.
BLOCK_BOUND, LOSS_BOUND, GRADIENT_BOUND = 1e-2, 1e-3, 5e-2
SEARCHED = {"mode": "max-autotune-no-cudagraphs"}
Figures = dict[str, Any]  # what JSON can hold


class WrongResultError(Exception):
    """A result that no rounding explains: no speed is worth printing beside it."""


# ---- the block, as the rivals of `bench.rivals` are


class OurBlock(Ours):
    """`x + activation(conv(x))` as users call it."""

    def __init__(self, shape: Shape, activation: str = "gelu") -> None:
        super().__init__(shape)
        self.activation = activation

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fuzzytok_kernels.causal_conv1d(x, weight, bias, dilation=self.shape.d, activation=self.activation, residual=x)


class Recomputed(OurBlock):
    """Its backward computes the pre-activation anew, whatever the rule in `functional.py` says."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.fuzzytok.causal_conv1d_fused(x, weight, bias, x, self.shape.d, self.activation)


class Stored(OurBlock):
    """Its backward reads the pre-activation back."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.activated(torch.ops.fuzzytok.causal_conv1d(x, weight, bias, self.shape.d), x, self.activation)


class Exact(OurBlock):
    """What all others are checked against: the reference, on inputs in fp64."""

    def adapt(self, inputs: Inputs, op: str) -> Inputs:
        return Inputs(*(value.double() for value in inputs))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.activated(reference.causal_conv1d(x, weight, bias, self.shape.d), x, self.activation)


class ExactPlain(Exact):
    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.causal_conv1d(x, weight, bias, self.shape.d)


class Conv1dBlock(Conv1dPad):
    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x + F.gelu(super().convolve(x, weight, bias))


class Conv2dTrimBlock(Conv2dTrim):
    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x + F.gelu(super().convolve(x, weight, bias))


class Conv2dPadBlock(Conv2dPad):
    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x + F.gelu(super().convolve(x, weight, bias))


class CompiledBlock(Rival):
    """torch.compile of another."""

    def __init__(self, form: Rival, **options: Any) -> None:
        super().__init__(form.shape)
        self.form = form
        self.compiled: Callable[..., Any] = torch.compile(form.convolve, fullgraph=True, dynamic=False, **options)

    def adapt(self, inputs: Inputs, op: str) -> Inputs:
        return self.form.adapt(inputs, op)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.compiled(x, weight, bias)

    def logical(self, results: Results, inputs: Inputs) -> Results:
        return self.form.logical(results, inputs)


def prepared(rival: Rival, op: str, data: Sequence[Inputs], wanted: Results) -> list[Call]:
    """Calls of `rival` that rotate over `data`, compiled by now, and the first's results checked."""
    calls = [Call(rival, op, inputs) for inputs in data]
    calls[0]()
    check(rival.logical(calls[0].results, calls[0].inputs), wanted, dict.fromkeys(wanted, BLOCK_BOUND))
    return calls * -(-CALLS // len(calls))


def check(results: Results, wanted: Results, bounds: dict[str, float]) -> float:
    """The largest relative error in the L2 norm. WrongResultError if one is above its bound, or NaN."""
    errors = {name: float((results[name].double() - exact.double()).norm() / exact.double().norm()) for name, exact in wanted.items()}
    wrong = {name: error for name, error in errors.items() if not error <= bounds[name]}
    if wrong:
        raise WrongResultError(f"relative errors {wrong}; at most {bounds} is right")
    return max(errors.values())


def in_turns(calls: dict[str, list[Call]]) -> dict[str, float]:
    """The median microseconds of a call of each. Their graphs are replayed in turns, so that a drifting clock favours none."""
    graphs = {name: timer.capture(each) for name, each in calls.items()}
    rounds = [{name: timer.replay(graph) for name, graph in graphs.items()} for _ in range(1 + ROUNDS)]
    return {name: statistics.median(times[name] for times in rounds[1:]) * 1e3 / len(calls[name]) for name in calls}


def _data(shape: Shape) -> list[Inputs]:
    torch.manual_seed(0)
    copies = timer.copies(least_bytes("forward", shape, ELEMENT_SIZES["bf16"]))
    return [draw(shape, torch.bfloat16, "last", DEVICE) for _ in range(copies)]


def _preparation(rival: Rival, exact: Rival, op: str, data: Sequence[Inputs]) -> Callable[[], list[Call]]:
    return lambda: prepared(rival, op, data, _results(exact, op, data[0]))


def _timed(preparations: dict[str, Callable[[], list[Call]]]) -> Figures:
    """Microseconds of each, and how many times the first's they are; or why it failed."""
    tried = {name: attempted(prepare) for name, prepare in preparations.items()}
    times = in_turns({name: calls for name, calls in tried.items() if isinstance(calls, list)})
    first = times.get(next(iter(tried)))
    return {name: {"us": times[name], "ratio": first and times[name] / first} if name in times else tried[name] for name in tried}


def _results(rival: Rival, op: str, inputs: Inputs) -> Results:
    call = Call(rival, op, inputs)
    call()
    return call.results


@torch.no_grad()
def measure_block() -> Figures:
    """Forward of the plain op and of the block, with gates beside a plain op of twice the channels."""
    groups = {BLOCK: tuple(FORWARD_BARS), BLOCK._replace(c_out=2 * BLOCK.c_out): reference.GATES}
    figures: Figures = {}
    for shape, activations in groups.items():
        rivals: dict[str, tuple[Rival, Rival]] = {f"plain, {shape.c_out} output channels": (Ours(shape), ExactPlain(shape))}
        rivals |= {activation: (OurBlock(shape, activation), Exact(shape, activation)) for activation in activations}
        data = _data(shape)
        figures |= _timed({name: _preparation(*pair, "forward", data) for name, pair in rivals.items()})
    return figures


def measure_backward() -> Figures:
    """Forward and backward of a block with exact GELU, ours and PyTorch's compiled."""
    data, exact = _data(BLOCK), Exact(BLOCK)
    rivals: dict[str, Rival] = {
        "ours": OurBlock(BLOCK),
        "F.conv1d + F.pad, compiled": CompiledBlock(Conv1dBlock(BLOCK)),
        "conv2d channels_last, trimmed, compiled, max-autotune": CompiledBlock(Conv2dTrimBlock(BLOCK), **SEARCHED),
        "conv2d channels_last + F.pad, compiled, max-autotune": CompiledBlock(Conv2dPadBlock(BLOCK), **SEARCHED),
    }
    return _timed({name: _preparation(rival, exact, "forward_backward", data) for name, rival in rivals.items()})


def measure_rule() -> Figures:
    """Forward and backward with the pre-activation recomputed and stored, by channels."""
    figures: Figures = {}
    for channels in RULE_CHANNELS:
        shape = BLOCK._replace(c_in=channels, c_out=channels)
        data = _data(shape)  # and one against the other: the reference in fp64 would take seconds here
        rivals: dict[str, Rival] = {"recomputed": Recomputed(shape), "stored": Stored(shape)}
        figures[str(channels * shape.K)] = _timed(
            {name: _preparation(rival, Stored(shape), "forward_backward", data) for name, rival in rivals.items()}
        )
        free()
    return figures


# ---- the model


class Model(nn.Module):
    """Bytes to the loss of a next-byte head: embedding, LayerNorm, residual blocks, linear."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        dilations = tuple(itertools.islice(itertools.cycle(DILATIONS), depth))
        self.tokenizer = FuzzyTokenizer(dim, BLOCK.K, dilations)
        self.head = nn.Linear(dim, 256)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids and targets (B, T) -> the mean cross-entropy."""
        return F.cross_entropy(self.head(self.tokenizer(ids)).flatten(0, 1), targets.flatten())


class Conv1dResidual(nn.Module):
    """PyTorch's block as people write it. `stream` is the dtype of what flows from block to block, None to leave that to autocast."""

    def __init__(self, conv: CausalConv1d, stream: torch.dtype | None = None) -> None:
        super().__init__()
        self.conv, self.stream = conv.to_conv1d(), stream
        self.history = (conv.kernel_size - 1) * conv.dilation

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, T) -> (B, C, T)."""
        h = x if self.stream is None else x.to(self.stream)
        return h + F.gelu(self.conv(F.pad(h, (self.history, 0))))


class Conv2dResidual(nn.Module):
    """PyTorch's block in cuDNN's fastest form: an image of height 1, channels_last, padded by cuDNN and trimmed."""

    def __init__(self, conv: CausalConv1d, stream: torch.dtype | None = None) -> None:
        super().__init__()
        taps, self.stream = conv.to_conv1d(), stream
        history = (conv.kernel_size - 1) * conv.dilation
        sizes = (conv.in_channels, conv.out_channels, (1, conv.kernel_size))
        self.conv = nn.Conv2d(*sizes, dilation=(1, conv.dilation), padding=(0, history))
        self.conv.weight = nn.Parameter(taps.weight.detach().unsqueeze(2).contiguous(memory_format=torch.channels_last))
        self.conv.bias = taps.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, T) -> (B, C, T)."""
        h = x if self.stream is None else x.to(self.stream)
        return h + F.gelu(self.conv(h.unsqueeze(2))[..., : x.shape[2]]).squeeze(2)


class Form(NamedTuple):
    """One way to run the model."""

    label: str
    block: Callable[..., nn.Module] | None = None  # from a CausalConv1d; None leaves ours in place
    options: dict[str, Any] | None = None  # of torch.compile; None runs it eagerly
    stream: torch.dtype | None = torch.bfloat16  # ours follows the dtype of autocast; a stream in fp32 moves twice the bytes

    def build(self, ours: Model) -> Model:
        """A model with copies of the parameters of `ours`."""
        model = copy.deepcopy(ours)
        if self.block:
            blocks: Iterable[Any] = model.tokenizer.blocks
            model.tokenizer.blocks = nn.Sequential(*(self.block(block.conv, self.stream) for block in blocks))
        return model


OURS = ("ours", "ours_compiled")
EAGER_CONV1D = ("conv1d", "conv1d_bf16")
COMPILED = ("conv1d_compiled", "conv2d_searched")
PYTORCH = (*EAGER_CONV1D, "conv2d", *COMPILED)
FORMS = {
    "ours": Form("ours"),
    "ours_compiled": Form("ours, compiled", options={}),
    "conv1d": Form("F.conv1d + F.pad", Conv1dResidual, stream=None),
    "conv1d_bf16": Form("F.conv1d + F.pad, stream in bf16", Conv1dResidual),
    "conv1d_compiled": Form("F.conv1d + F.pad, stream in bf16, compiled", Conv1dResidual, {}),
    "conv2d": Form("conv2d channels_last, trimmed, stream in bf16", Conv2dResidual),
    "conv2d_searched": Form("conv2d channels_last, trimmed, stream in bf16, compiled, max-autotune", Conv2dResidual, SEARCHED),
}
# The mode chooses kernels, not what is saved: the default one spares minutes of search where memory alone is measured.
DEPTH_FORMS = {
    **{name: FORMS[name] for name in ("conv1d_bf16", "conv1d_compiled", "conv2d")},
    "conv2d_compiled": Form("conv2d channels_last, trimmed, stream in bf16, compiled", Conv2dResidual, {}),
}


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


def bounds(results: Results) -> dict[str, float]:
    """How far each of a step's results may be from another form's."""
    return {name: LOSS_BOUND if name == "loss" else GRADIENT_BOUND for name in results}


def step_ms(step: Step) -> float:
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


def measure_model() -> Figures:
    """Speed and memory of a training step of each form, by batch."""
    torch.manual_seed(0)
    ours = Model(BLOCK.c_in, 2 * len(DILATIONS)).to(DEVICE)
    figures: Figures = {}
    for B, T in BATCHES:
        batch = Batch.draw(B, T)
        first = Step(FORMS["ours"], ours, batch)
        first()
        wanted = first.results()
        del first
        figures[f"{B}x{T}"] = {name: _form(form, ours, batch, wanted) for name, form in FORMS.items()}
    return figures


def _form(form: Form, ours: Model, batch: Batch, wanted: Results) -> Figures:
    def measured() -> Figures:
        step = Step(form, ours, batch)
        step()
        error = check(step.results(), wanted, bounds(wanted))
        figures = {"error": error, "eager_ms": step_ms(step), "peak_mib": peak_mib(step)}
        graph = attempted(lambda: {"graph_ms": timer.microseconds([step], GRAPH_MS) / 1e3})
        return figures | ({"graph_failed": graph["failed"]} if "failed" in graph else graph)

    figures = attempted(measured)
    free()
    return figures


def measure_depth() -> Figures:
    """Peak memory over depth: ours, and that form of PyTorch's which needs least at 8 blocks."""
    batch, middle = Batch.draw(BLOCK.B, BLOCK.T), 8
    forms = {name: _peak(form, middle, batch) for name, form in DEPTH_FORMS.items()}
    best = min((name for name in forms if "mib" in forms[name]), key=lambda name: forms[name]["mib"])
    peaks = {}
    for depth in DEPTHS:
        theirs = forms[best] if depth == middle else _peak(DEPTH_FORMS[best], depth, batch)
        peaks[str(depth)] = {"ours": _peak(FORMS["ours"], depth, batch), "best": theirs}
    return {"best": DEPTH_FORMS[best].label, f"at_{middle}": forms, "peaks": peaks}


def _peak(form: Form, depth: int, batch: Batch) -> Figures:
    torch.manual_seed(0)
    figures = attempted(lambda: {"mib": peak_mib(Step(form, Model(BLOCK.c_in, depth).to(DEVICE), batch))})
    free()
    return figures


def measure_saved() -> Figures:
    """How many tensors of the input's size one block keeps."""
    x = draw(BLOCK, torch.bfloat16, "last", DEVICE).x.requires_grad_()
    ours = ResidualCausalBlock(BLOCK.c_in, BLOCK.K, BLOCK.d).to(DEVICE, torch.bfloat16)
    return {"ours": saved_tensors(ours, x), "F.conv1d + F.pad": saved_tensors(Conv1dResidual(ours.conv), x)}


def saved_tensors(block: nn.Module, x: Tensor) -> int:
    """How many tensors as large as x `block` keeps for its backward; those that share their memory count once."""
    storages = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() >= x.numel():
            storages.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = block(x)  # alive until the count is made, so that no address is used twice
    return len(storages) if y.requires_grad else 0


# ---- a run


def attempted(make: Callable[[], Any]) -> Any:
    """What `make` returns, or {"failed": why}: a rival that does not compile costs its own row. A wrong result costs the run."""
    try:
        return make()
    except WrongResultError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        return {"failed": f"{type(error).__name__}: {first[:120]}"}


def free() -> None:
    """Give back what the last measurement compiled and allocated."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


MEASURES: dict[str, Callable[[], Figures]] = {
    "block": measure_block,
    "backward": measure_backward,
    "model": measure_model,
    "depth": measure_depth,
    "saved": measure_saved,
    "rule": measure_rule,
}


def kernels(sections: Iterable[str]) -> Iterator[tuple[Rival, str]]:
    """Calls that reach the Triton kernels which take longest to compile, so that processes can do it side by side."""
    if "block" in sections:
        yield Ours(BLOCK), "forward"
        yield from ((OurBlock(BLOCK, activation), "forward") for activation in FORWARD_BARS)
        gated = BLOCK._replace(c_out=2 * BLOCK.c_out)
        yield Ours(gated), "forward"
        yield from ((OurBlock(gated, activation), "forward") for activation in reference.GATES)
    if {"backward", "model", "depth"} & set(sections):
        yield OurBlock(BLOCK), "forward_backward"
    if "model" in sections:
        yield from ((OurBlock(BLOCK._replace(B=B, T=T)), "forward_backward") for B, T in BATCHES[1:])
    if "rule" in sections:
        for channels in RULE_CHANNELS:
            shape = BLOCK._replace(c_in=channels, c_out=channels)
            yield from ((kind(shape), "forward_backward") for kind in (Recomputed, Stored))


def compile_kernels(sections: Iterable[str]) -> None:
    """Leave the kernels of `sections` in Triton's cache on disk."""
    calls = list(kernels(sections))
    workers = min(8, len(calls), os.cpu_count() or 1)
    if workers < 2:
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            list(pool.map(_run_once, *zip(*calls, strict=True)))
        except BrokenProcessPool:
            print("a compiling process died; the sections compile for themselves", file=sys.stderr)


def _run_once(rival: Rival, op: str) -> None:
    try:
        _results(rival, op, draw(rival.shape, torch.bfloat16, "last", DEVICE))
        torch.cuda.synchronize()
    except Exception:  # the section itself will say so
        return


def measure(sections: Sequence[str]) -> Figures:
    """The figures of `sections`, with what they depend on."""
    seconds: dict[str, float] = {}
    figures: dict[str, Figures] = {}
    steps: dict[str, Callable[[], Any]] = {"compiling": lambda: compile_kernels(sections), **{name: MEASURES[name] for name in sections}}
    for name, step in steps.items():
        begin = time.perf_counter()
        figures[name] = attempted(step)
        free()
        seconds[name] = time.perf_counter() - begin
        print(f"{name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)
    del figures["compiling"]
    return {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "versions": versions(),
        "seconds": seconds,
        "sections": figures,
    }


# ---- bars


def judge(sections: Figures) -> list[Bar]:
    """The bars of the sections that were measured."""
    sections = {name: each for name, each in sections.items() if "failed" not in each}
    bars: list[Bar] = []
    if block := sections.get("block"):
        bars += [_bar(f"block forward / plain op, {name}", block[name].get("ratio"), "<=", limit) for name, limit in FORWARD_BARS.items()]
    if backward := sections.get("backward"):
        best = min((row["ratio"] for name, row in backward.items() if name != "ours" and row.get("ratio")), default=None)
        bars.append(_bar("block forward + backward, times faster than the best compiled", best, ">=", 2.2))
    if model := sections.get("model"):
        bars += _model_bars(model)
    if saved := sections.get("saved"):
        bars.append(_bar("tensors of the input's size that a block saves", saved["ours"], "<=", 1))
    return bars


def _model_bars(model: Figures) -> Iterator[Bar]:
    large, small = (model[f"{B}x{T}"] for B, T in BATCHES)
    for figure, how in (("graph_ms", "CUDA graph against CUDA graph"), ("eager_ms", "launched against launched")):
        yield _bar(f"model step, times faster than the best compiled, {how}", *_times(large, COMPILED, figure), ">=", 1.8)
        yield _bar(f"model step, times faster than eager F.conv1d, {how}", *_times(large, EAGER_CONV1D, figure), ">=", 5.0)
    yield _bar("model step, peak memory / the best PyTorch form's", *_share(large, PYTORCH), "<=", 0.70)
    for rivals, which in ((PYTORCH, "the best PyTorch form"), (EAGER_CONV1D, "eager F.conv1d")):
        share, where = _share(small, rivals)
        saved = "not measured" if share is None else f"{1 - share:.1%}{where}"
        yield Bar(f"B=16 T=1024, memory saved against {which}", f"the paper claims {PAPER_SAVED:.1%}", saved, "")


def _times(rows: Figures, rivals: Sequence[str], figure: str) -> tuple[float | None, str]:
    share, where = _share(rows, rivals, figure)
    return share and 1 / share, where


def _share(rows: Figures, rivals: Sequence[str], figure: str = "peak_mib") -> tuple[float | None, str]:
    """The least of ours over the least of `rivals`, and which these are."""
    least = [
        min((name for name in names if figure in rows[name]), key=lambda name: rows[name][figure], default=None) for names in (OURS, rivals)
    ]
    ours, rival = least
    if ours is None or rival is None:
        return None, ""
    return rows[ours][figure] / rows[rival][figure], f" ({FORMS[ours].label}; {FORMS[rival].label})"


def _bar(what: str, value: float | None, *rest: Any) -> Bar:
    """`rest`: where the value is from, if that needs saying, then the sign and the limit."""
    *where, sign, limit = rest
    return _judged(what, {"": value}, value, "".join(where), sign, limit)


# ---- the report

_METHOD = f"""\
bf16, channels-last. Block: {BLOCK}, on inputs that rotate over more data than the L2 holds, as captured graphs replayed in turns; the
forward under no_grad. Every form was first checked: a block against the reference in fp64 (relative L2 error at most {BLOCK_BOUND}), and at
each batch a model's loss and each of its gradients against ours (at most {LOSS_BOUND} and {GRADIENT_BOUND}); one wrong result, and nothing
is printed. The model is an embedding, LayerNorm, six blocks of 256 channels with exact GELU, a linear head and cross-entropy; a step is
forward and backward under autocast, with parameters in fp32 and no optimiser. "Launched": the median of {STEPS} steps, launched one after
another; "graph": the median replay of the step as a CUDA graph; tokens/s by the better.
Peak MiB are what a step allocates above the weights, gradients included.
Under autocast, PyTorch's blocks as people write them hand fp32 to each other; those with their stream in bf16 do as ours does."""


def render(figures: Figures) -> str:
    """The figures as markdown."""
    stored = ", ".join(f"{name} {version}" for name, version in figures["versions"].items() if version)
    sections = figures["sections"]
    parts = [f"# The fused block and a model of it on {figures['gpu']}", f"{figures['date']}; {stored}.", _METHOD]
    parts.append("## The bars\n\n" + _table(("what", "bar", "measured", "verdict"), judge(sections)))
    parts += [f"{name}: {each['failed']}" if "failed" in each else _TABLES[name](each) for name, each in sections.items()]
    return "\n\n".join(parts) + "\n"


def _times_table(title: str, header: str, figures: Figures) -> str:
    lines = [(name, *_cells(row, ("us", ".1f"), ("ratio", ".3f"))) for name, row in figures.items()]
    return f"## {title}\n\n" + _table(("what", "us", header), lines)


def _model_table(figures: Figures) -> str:
    header = ("form", "largest error", "ms launched", "ms graph", "Mtok/s", "peak MiB", "ms graph / ours", "peak / ours")
    parts = []
    for batch, rows in figures.items():
        B, T = map(int, batch.split("x"))
        lines = [(FORMS[name].label, *_model_cells(row, rows["ours"], B * T)) for name, row in rows.items()]
        parts.append(f"## Training step, B={B} T={T}\n\n" + _table(header, lines))
    return "\n\n".join(parts)


def _model_cells(row: Figures, ours: Figures, tokens: int) -> Iterator[str]:
    formats = (("error", ".1e"), ("eager_ms", ".2f"), ("graph_ms", ".2f"))
    yield from _cells(row, *formats)
    fastest = min((row[name] for name in ("eager_ms", "graph_ms") if name in row), default=None)
    yield f"{tokens / fastest / 1e3:.1f}" if fastest else ""
    yield from _cells(row, ("peak_mib", ".0f"))
    for name in ("graph_ms", "peak_mib"):
        yield f"{row[name] / ours[name]:.2f}" if name in row and name in ours else ""


def _depth_table(figures: Figures) -> str:
    title = "## Peak MiB over depth, B=32 T=2048\n\n"
    lines = []
    for depth, row in figures["peaks"].items():
        ours, best = (row[name].get("mib") for name in ("ours", "best"))
        lines.append(
            (
                depth,
                *_cells(row["ours"], ("mib", ".0f")),
                *_cells(row["best"], ("mib", ".0f")),
                f"{ours / best:.2f}" if ours and best else "",
            )
        )
    table = _table(("blocks", "ours", figures["best"], "ratio"), lines)
    return title + table + "\n\n![memory over depth](model_memory.png)"


def _saved_table(figures: Figures) -> str:
    return "## Tensors of the input's size that one block saves\n\n" + _table(
        ("block", "tensors"), [(name, str(count)) for name, count in figures.items()]
    )


def _rule_table(figures: Figures) -> str:
    lines = [(size, *(cell for row in rows.values() for cell in _cells(row, ("us", ".1f")))) for size, rows in figures.items()]
    title = f"## The pre-activation recomputed or stored: forward + backward of a block, {BLOCK.tokens:,} tokens\n\n"
    return title + _table(("C_in * K", "us recomputed", "us stored"), lines)


def _cells(row: Figures, *formats: tuple[str, str]) -> Iterator[str]:
    """One cell a figure; the first that is missing says why, if that is known."""
    reasons = iter([reason for key in ("failed", "graph_failed") if (reason := row.get(key))])
    for name, form in formats:
        yield next(reasons, "") if row.get(name) is None else format(row[name], form)


_TABLES: dict[str, Callable[[Figures], str]] = {
    "block": lambda figures: _times_table("Block forward", "/ plain op", figures),
    "backward": lambda figures: _times_table("Block forward + backward, exact GELU", "/ ours", figures),
    "model": _model_table,
    "depth": _depth_table,
    "saved": _saved_table,
    "rule": _rule_table,
}


def picture(figures: Figures, gpu: str, path: Path) -> None:
    """Memory over depth."""
    import matplotlib

    matplotlib.use("Agg")
    figure, axes = pictures._axes(f"Peak memory of a training step above its weights: B={BLOCK.B}, T={BLOCK.T}, C={BLOCK.c_in} on {gpu}")
    for name, label, colour, marker in (("ours", "ours", "#0b6e4f", "o"), ("best", figures["best"], "#3b5b92", "^")):
        points = [(int(depth), row[name]["mib"]) for depth, row in figures["peaks"].items() if "mib" in row[name]]
        axes.plot(*zip(*points, strict=True), f"{marker}-", color=colour, label=label)
    axes.set(xlabel="residual blocks", ylabel="MiB", ylim=(0, None), xticks=DEPTHS)
    pictures._save(figure, axes, path, legend="upper left")


def write(figures: Figures, folder: Path) -> str:
    """Write model.json, model.md and the picture, of the measured sections, into `folder`. Returns the markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    text = render(figures)
    (folder / "model.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "model.md").write_text(text, encoding="utf-8")
    depth = figures["sections"].get("depth", {})
    if "peaks" in depth:
        picture(depth, figures["gpu"], folder / "model_memory.png")
    return text


def _sections(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - set(MEASURES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: expected some of {','.join(MEASURES)}")
    return [name for name in MEASURES if name in chosen]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(prog="bench.model", description=__doc__)
    parser.add_argument("--only", type=_sections, default=list(MEASURES), help=f"some of {','.join(MEASURES)}; all if not given")
    sections = parser.parse_args(arguments).only
    if not torch.cuda.is_available():
        raise SystemExit("bench.model: speed and memory are measured on a GPU, and there is none")
    try:
        figures = measure(sections)
    except WrongResultError as error:
        raise SystemExit(f"bench.model: no speeds, since a result is wrong: {error}") from error
    print(write(figures, FOLDER / slug()))


if __name__ == "__main__":
    main()
