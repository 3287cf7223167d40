"""The check of a case of cases.py: the error rule of oracle.py, metadata, guard zones, and how far a NaN gets."""

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import guards
import torch
import torch.nn.functional as F
from cases import CONFIGS, DTYPES, SUBJECTS, Case, Tensors
from modes import KERNELS_RUN, ON_CUDA
from oracle import poisoned
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fuzzytok_kernels import reference
from fuzzytok_kernels.reference import GATES
from fuzzytok_kernels.streaming import reference as streaming

_NORMS = (float("inf"), 2.0)


def check(case: Case) -> None:
    """Raise AssertionError unless the op gives what the reference in fp64 does, and touches nothing else."""
    from fuzzytok_kernels import tuning

    new = Tensors(case)
    args = SUBJECTS[case.op].arguments(case, new)
    config = CONFIGS[case.config]
    with precision(case.dtype), tuning.force(**config) if config else nullcontext():
        got = _run(case.op, args)
        new.inputs.check()
        _check_kinds(case, args, got)
        _check_values(case, args, got)
        # PyTorch's bf16 convolution on a CPU (oneDNN's) carries NaN one step back where there is one channel.
        wanted = case.spoilt is not None and case.B and case.T and SUBJECTS[case.op].reach
        if wanted and (KERNELS_RUN or case.dtype != "bf16"):
            _check_reach(case, args)


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """PyTorch's switch, by its old name: it refuses to read that once the new one has been set."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _run(op: str, args: tuple) -> tuple[Tensor, ...]:
    """The results, once they are the same bits through the dispatcher as on guarded memory."""
    if not KERNELS_RUN:
        with poisoned():
            return call(_op(op), op, args)
    with guards.Allocations() as allocations:
        got = call(_function(SUBJECTS[op].launch, op), op, args)
    if any(value.numel() and value.is_floating_point() for value in got):
        allocations.check()
    if ON_CUDA:
        _check_the_op_itself(op, args, got)
    return got


def _check_the_op_itself(op: str, args: tuple, got: tuple[Tensor, ...]) -> None:
    for one, other in zip(call(_op(op), op, args), got, strict=True):
        assert one.stride() == other.stride() and torch.equal(_bits(one), _bits(other)), "the op itself gave other bits or strides"


def call(function: Callable, op: str, args: tuple) -> tuple[Tensor, ...]:
    """What `function` returns, and behind it what it writes in place, for which it gets copies."""
    written = [i for i, argument in enumerate(_op(op)._schema.arguments) if argument.alias_info and argument.alias_info.is_write]
    args = tuple(_copy(arg) if i in written else arg for i, arg in enumerate(args))
    return *_tuple(function(*args)), *(args[i] for i in written)


def _copy(x: Tensor) -> Tensor:
    """In fresh memory, which may be guarded, and with the strides of x."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _function(module: str, op: str) -> Callable:
    return getattr(importlib.import_module(module), op)


def _check_kinds(case: Case, args: tuple, got: tuple[Tensor, ...]) -> None:
    with FakeTensorMode() as mode:
        fakes: dict[int, Any] = {}
        for arg in args:
            fakes.setdefault(id(arg), _each(arg, mode.from_tensor))
        wanted = _tuple(_op(case.op)(*(fakes[id(arg)] for arg in args)))
    for ours, fake in zip(got, wanted, strict=False):  # what was written in place comes behind
        kinds = [(tuple(value.shape), value.stride(), value.dtype) for value in (ours, fake)]
        assert kinds[0] == kinds[1], f"{kinds[0]}, where its fake has {kinds[1]}"


# ---- values


def _check_values(case: Case, args: tuple, got: tuple[Tensor, ...]) -> None:
    """At most twice the error that PyTorch makes in this dtype, beside what the accumulator's rounding can do.

    Under TF32 PyTorch's error is that of operands rounded to it: cuDNN rounds for some shapes only.
    """

    def expected(args: tuple) -> tuple[Tensor, ...]:
        return call(_function(SUBJECTS[case.op].reference, case.op), case.op, args)

    wide = _mapped(args, Tensor.double)
    want = expected(wide)
    if case.dtype == "tf32" and case.op == "residual_stack_update":
        torchs = (*_stack_of_rounded(case, args), want[2])
    else:
        torchs = expected(_rounded(case.op, args) if case.dtype == "tf32" else args)
    if case.op == "causal_conv1d_update":  # a state gets copies, and no products
        torchs = (torchs[0], *want[1:])
    slacks = _slack(case, wide, want)
    sizes = [
        _norms(some)
        for some in ([a - b for a, b in zip(got, want, strict=True)], [a - b for a, b in zip(torchs, want, strict=True)], slacks)
    ]
    for number, norms in enumerate(zip(*sizes, strict=True)):
        for norm, error, own, slack in zip(_NORMS, *norms, strict=True):
            allowed = 2 * own + slack
            assert error <= allowed, f"result {number}: {norm}-norm of the error {error:.3g}, allowed {allowed:.3g}"


def _slack(case: Case, wide: tuple, want: tuple[Tensor, ...]) -> list[Tensor]:
    """What an accumulator may do: eight units of its precision and one for every eight terms, of the sum of the terms' sizes.

    Tensor cores cut off where others round, so that errors do not cancel. Behind an activation: how far that much moves the result.
    """
    terms = case.B * case.T if case.op == "causal_conv1d_weight_grad" else case.K * max(case.c_in, case.c_out)
    unit = torch.finfo(torch.float64 if case.dtype == "fp64" else torch.float32).eps * (8 + terms / 8)
    named = dict(zip(_names(case.op), wide, strict=True))
    if "embedding" in named:  # what the look-ups stand for
        named["x"] = named["residual"] = F.embedding(named["ids"].long(), named["embedding"]).mT
    if case.op == "embedding_norm":
        return [unit * _norm_terms(named)]
    if case.op == "residual_stack_update":
        return _slack_of_layers(case, named, unit)
    if "activation" not in named:
        return [unit * value for value in call(_function(SUBJECTS[case.op].reference, case.op), case.op, _mapped(wide, Tensor.abs))]
    base = case.op if "conv_state" in named else "causal_conv1d_fused"  # which without an activation gives what is before it
    plain = [{"activation": "none", "residual": None}.get(name, named.get(name)) for name in _names(base)]
    p, *written = call(_function(SUBJECTS[base].reference, base), base, tuple(plain))
    moved = unit * call(_function(SUBJECTS[base].reference, base), base, _mapped(plain, Tensor.abs))[0]
    if "embedding" in named and DTYPES[case.dtype].itemsize == 2:
        moved = moved + torch.finfo(DTYPES[case.dtype]).eps / 2 * _table_terms(case, named)
    exact = _bent(named, p)
    slack = unit * exact.abs() + _swing(case, lambda p: _bent(named, p), p, moved)
    if case.op == "byte_causal_conv1d_grad":
        return _slack_of_sums(case, named, exact, slack)
    return [slack, *map(torch.zeros_like, written)]


def _table_terms(case: Case, named: dict[str, Any]) -> Tensor:
    """How large what the look-ups of a step find is: they are rounded, as PyTorch rounds the convolution that they stand for."""
    table = reference._table(named["embedding"], named["weight"]).abs()
    sources = reference._sources(named["ids"], case.K, case.d, named["cu_seqlens"])
    return reference._looked_up_sum(table, sources, None if named["bias"] is None else named["bias"].abs()).mT


def _swing(case: Case, bent: Callable[[Tensor], Tensor], p: Tensor, moved: Tensor) -> Tensor:
    """How far `bent(p)` moves, at most, if p does by as much as `moved` either way; of a gate each half for itself."""
    halves = 2 if case.activation in GATES else 1
    exact, most = bent(p), torch.zeros((), dtype=p.dtype, device=p.device)
    for signs in itertools.product((1.0, -1.0), repeat=halves):
        sign = torch.tensor(signs, dtype=p.dtype, device=p.device).repeat_interleave(p.shape[1] // halves)[:, None]
        most = torch.maximum(most, (bent(p + sign * moved) - exact).abs())
    return most


def _slack_of_layers(case: Case, named: dict[str, Any], unit: float) -> list[Tensor]:
    """Of a stack: what one layer's result may be off by goes through the next. Between two it is rounded, in TF32 once more."""
    x, history = named["x"], named["history"]
    between = torch.finfo(DTYPES[case.dtype]).eps / 2
    off, off_history = torch.zeros_like(x), torch.zeros_like(history)
    for number, (convolved, weight, bias) in enumerate(zip(_layers(case, named), named["weights"], named["biases"], strict=True)):
        p = convolved(x, history.clone(), weight, bias)
        sizes = convolved(x.abs(), history.abs(), weight.abs(), bias.abs())
        moved = (unit + (2**-11 if number and case.dtype == "tf32" else 0)) * sizes + convolved(off, off_history, weight.abs(), None)
        x = reference.activated(p, x, case.activation)
        off = off + (unit + between) * x.abs() + _swing(case, reference.ACTIVATIONS[case.activation], p, moved)
    return [off - between * x.abs(), off_history, torch.zeros_like(named["positions"])]


def _layers(case: Case, named: dict[str, Any]) -> Iterator[Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]]:
    """Of each layer of a stack its convolution of x behind its part of the states, which x is then written to."""
    index, begin = named["slots"], 0
    seen = named["positions"] if index is None else named["positions"][index]
    for d in named["dilations"]:
        here = slice(begin, begin := begin + (case.K - 1) * d)

        def convolved(x: Tensor, states: Tensor, weight: Tensor, bias: Tensor | None, here: slice = here, d: int = d) -> Tensor:
            return streaming.causal_conv1d_update(x, states[:, here].mT, weight, bias, None, seen, index, d, "none")

        yield convolved


def _stack_of_rounded(case: Case, args: tuple) -> tuple[Tensor, ...]:
    """A stack whose products read `_rounded` numbers; what is added to them, as a residual, and what the states keep is not rounded."""
    named, rounded = (dict(zip(_names(case.op), each, strict=True)) for each in (_mapped(args, Tensor.double), _rounded(case.op, args)))
    x, history, read = named["x"], named["history"].clone(), rounded["x"]
    for convolved, weight, bias in zip(_layers(case, named), rounded["weights"], named["biases"], strict=True):
        p = convolved(read, rounded["history"].clone(), weight, bias)
        convolved(x, history, weight, bias)
        x = read = reference.activated(p, x, case.activation)
    return x, history


def _slack_of_sums(case: Case, named: dict[str, Any], grad_p: Tensor, slack: Tensor) -> list[Tensor]:
    """The gradients of the look-ups: sums of grad_p and grad_y over all steps of an id. In 16 bits PyTorch rounds every step's."""
    unit = torch.finfo(torch.float64 if case.dtype == "fp64" else torch.float32).eps * (8 + case.B * case.T / 8)
    unit += torch.finfo(DTYPES[case.dtype]).eps / 2 if DTYPES[case.dtype].itemsize == 2 else 0
    sources = reference._sources(named["ids"], case.K, case.d, named["cu_seqlens"])
    sizes = named["ids"], named["embedding"].abs(), named["weight"].abs(), sources
    moved, terms = slack + unit * grad_p.abs(), unit * named["grad_y"].abs()
    return list(reference.summed_by_id(moved, terms, *sizes))


def _norm_terms(named: dict[str, Any]) -> Tensor:
    """How large what a LayerNorm adds up is: the difference from the mean is that of two rounded numbers, and scaled."""
    e = named["x"].mT
    centred = e - e.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + named["eps"]).rsqrt()
    return 2 * e.abs().amax(-1, keepdim=True) * scale * (1 + scale * centred.abs()) * named["weight"].abs() + named["bias"].abs()


def _bent(named: dict[str, Any], p: Tensor) -> Tensor:
    if "grad_y" in named:
        return reference.activation_grad(named["grad_y"], p, named["activation"])
    return reference.activated(p, named["residual"], named["activation"])


def _rounded(op: str, args: tuple) -> tuple:
    """In fp64, what the products read rounded to the nearest TF32; a bias, a residual and a grad_y that only scales stay as they are."""
    products = {"x", "weight", "initial_state", "conv_state", "embedding", "history", "weights"} | (
        {"grad_y"} if "activation" not in _names(op) else set()
    )
    rounded = [_each(arg, _nearest_tf32) if name in products else arg for name, arg in zip(_names(op), args, strict=True)]
    return _mapped(rounded, Tensor.double)


def _nearest_tf32(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def _bits(x: Tensor) -> Tensor:
    """As integers, so that a NaN equals itself."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def _norms(values: list[Tensor]) -> list[list[float]]:
    """Of each value each of _NORMS."""
    return torch.stack([_norm(value.double(), norm) for value in values for norm in _NORMS]).reshape(-1, len(_NORMS)).tolist()


def _norm(value: Tensor, norm: float) -> Tensor:
    return torch.linalg.vector_norm(value, norm) if value.numel() else value.new_zeros(())


# ---- how far a NaN gets


def _check_reach(case: Case, args: tuple) -> None:
    """NaN or infinity at one step changes no bit of what that step does not reach; NaN arrives at all that it does.

    But for the derivative of ReLU, which at NaN is 1, as PyTorch has it.
    """
    subject = SUBJECTS[case.op]
    given = args[_names(case.op).index(subject.spoilt)]
    clean = given.clone(memory_format=torch.preserve_format)
    spoilt, t, c = clean.clone(), case.seed % case.T, case.seed % clean.shape[1]
    spoilt[0, c, t] = case.spoilt

    def run_with(x: Tensor) -> tuple[Tensor, ...]:
        return _run(case.op, tuple(x if arg is given else arg for arg in args))

    nan_arrives = case.spoilt != case.spoilt and (case.op, case.activation) != ("causal_conv1d_activation_grad", "relu")
    for before, after, (may, must) in zip(run_with(clean), run_with(spoilt), subject.reach(case, t, c), strict=True):
        where = f"{case.spoilt} at step {t} of channel {c}"
        assert torch.equal(torch.where(may, 0, before), torch.where(may, 0, after)), f"{where} reached more than it may"
        assert not nan_arrives or torch.where(must, after, torch.nan).isnan().all(), f"{where} was lost"


# ---- small things


def _op(name: str) -> Any:
    return getattr(torch.ops.fuzzytok, name).default


def _names(op: str) -> list[str]:
    return [argument.name for argument in _op(op)._schema.arguments]


def _mapped(args: Any, function: Callable[[Tensor], Tensor]) -> tuple:
    return tuple(_each(arg, lambda x: function(x) if x.is_floating_point() else x) for arg in args)


def _each(arg: Any, function: Callable[[Tensor], Any]) -> Any:
    """`function` of a tensor, of each in a list, and nothing of what else an op is given."""
    if isinstance(arg, list):
        return [_each(part, function) for part in arg]
    return function(arg) if isinstance(arg, Tensor) else arg


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
