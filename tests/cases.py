"""Random problems of every op, each checked against the reference in fp64: what test_fuzz.py and fuzz.py draw.

An op joins by a line in SUBJECTS. A case has two halves: its template decides which kernel is compiled, its sizes do not (they keep the
template's divisibility), so that a GPU can run thousands of cases of a few hundred kernels.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import guards
import torch
from hypothesis import strategies as st
from modes import DEVICE, INTERPRETED, KERNELS_RUN, ON_CUDA
from oracle import LAYOUTS, WEIGHT_LAYOUTS, poisoned
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fuzzytok_kernels import reference
from fuzzytok_kernels.reference import ACTIVATIONS, GATES

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_CONTIGUOUS = "channels-first"

# ---- what is drawn

# Sizes by what Triton compiles apart: 1, multiples of 16, and others; a product of two sizes never joins another group than it must.
GROUPS: dict[str, Callable[[int], int]] = {
    "one": lambda n: 1,
    "odd": lambda n: 2 * n + 3,
    "twice odd": lambda n: 4 * n + 2,
    "8s": lambda n: 16 * n + 8,
    "16s": lambda n: 16 * n + 16,
}
CONFIGS: tuple[dict[str, Any], ...] = (
    {},  # what the look-up says
    dict(path="pointer", BLOCK_T=16, BLOCK_C_IN=16, BLOCK_C_OUT=32, num_warps=4, num_stages=2, programs_per_sm=1),
    dict(path="pointer", BLOCK_T=32, BLOCK_C_IN=32, BLOCK_C_OUT=16, num_warps=2, num_stages=3, programs_per_sm=8, TAPS=3),
    dict(path="pointer", BLOCK_T=64, BLOCK_C_IN=16, BLOCK_C_OUT=64, num_warps=4, num_stages=3, programs_per_sm=2, TAPS=2),
    dict(path="tma", BLOCK_T=64, BLOCK_C_IN=32, BLOCK_C_OUT=32, num_warps=4, num_stages=2, programs_per_sm=8, TAPS=3),
    dict(path="tma", BLOCK_T=32, BLOCK_C_IN=16, BLOCK_C_OUT=64, num_warps=4, num_stages=3, programs_per_sm=1),
    dict(path="tma", BLOCK_T=128, BLOCK_C_IN=64, BLOCK_C_OUT=64, num_warps=8, num_stages=3, programs_per_sm=2, TAPS=2),
)
_ON_CPU = ("fp32", "fp16") if INTERPRETED else ("fp64", "fp32", "fp16", "bf16")
_LARGEST = 40 if ON_CUDA else 4  # the n of GROUPS
_COMMON: dict[str, tuple] = {
    "dtype": ("fp16", "bf16", "fp32", "tf32") if ON_CUDA else _ON_CPU,
    "layout": tuple(LAYOUTS),
    "others": ("channels-first", "channels-last", *LAYOUTS),
    "weight": ("contiguous", *WEIGHT_LAYOUTS),
    "bias": ("contiguous", "every second", "none"),
    "activation": ("none",),
    "residual": ("none",),
    "K": (1, 2, 3, 3, 4, 7),
    "c_in": tuple(GROUPS),
    "channels": tuple(GROUPS),
    "T": tuple(GROUPS),
    "config": tuple(range(KERNELS_RUN and not ON_CUDA, len(CONFIGS))) if KERNELS_RUN else (0,),
}


class Case(NamedTuple):
    """One problem of one op, with the seed of its values."""

    op: str
    dtype: str
    layout: str  # of the op's first tensor
    others: str  # of its other sequences
    weight: str
    bias: str
    activation: str
    residual: str
    K: int
    config: int  # of CONFIGS
    c_in: int
    channels: int  # of y; a gate's weight has twice as many
    T: int
    B: int
    d: int
    spoilt: float | None  # NaN or infinity for one step of one row, to see how far it reaches
    seed: int

    def __str__(self) -> str:
        """What `fuzz.py --case` takes."""
        return json.dumps(self._asdict())

    @property
    def c_out(self) -> int:
        return 2 * self.channels if self.activation in GATES else self.channels


def from_text(text: str) -> Case:
    """The case that was printed as `text`."""
    return Case(**json.loads(text))


def choices(op: str) -> dict[str, tuple]:
    """What each field of a template of `op` may be."""
    return {"op": (op,), **_COMMON, **SUBJECTS[op].choices}


def sizes(template: dict[str, Any]) -> st.SearchStrategy[Case]:
    """The cases of a template."""
    n = st.integers(0, _LARGEST)
    fixed = {name: st.just(value) for name, value in template.items()}
    drawn = {name: n.map(GROUPS[template[name]]) for name in ("c_in", "channels", "T")}
    return st.builds(
        Case,
        **{**fixed, **drawn},
        B=st.integers(0, 4),
        d=st.one_of(st.integers(1, 9), st.sampled_from((64, 640, 2**31 - 1, 2**40))),
        spoilt=st.sampled_from((None, None, float("nan"), float("inf"))),
        seed=st.integers(0, 2**16),
    )


def any_case(op: str) -> st.SearchStrategy[Case]:
    """Any case of `op`."""
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in choices(op).items()}).flatmap(sizes)


# ---- the ops


class Tensors:
    """Makes the tensors of a case, between guard zones."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(case.seed)
        self.case, self.inputs = case, guards.Inputs()

    def sequence(self, name: str, channels: int, layout: str) -> Tensor:
        return self._new(name, (self.case.B, channels, self.case.T), LAYOUTS[layout])

    def weight(self) -> Tensor:
        case = self.case
        layout = WEIGHT_LAYOUTS.get(case.weight, LAYOUTS[_CONTIGUOUS])
        return self._new("weight", (case.c_out, case.c_in, case.K), layout, (case.c_in * case.K) ** -0.5)

    def bias(self) -> Tensor | None:
        step = {"contiguous": 1, "every second": 2, "none": 0}[self.case.bias]
        return self._new("bias", (self.case.c_out,), lambda n: ((step,), 0)) if step else None

    def residual(self, x: Tensor, channels: int) -> Tensor | None:
        if self.case.residual == "x itself" and x.shape[1] == channels:
            return x
        return None if self.case.residual == "none" else self.sequence("residual", channels, self.case.others)

    def _new(self, name: str, shape: tuple[int, ...], layout: Callable[..., tuple], scale: float = 1.0) -> Tensor:
        strides, offset = layout(*shape)
        base = [1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True)]
        values = (torch.randn(base, device=DEVICE) * scale).to(DTYPES[self.case.dtype])
        return self.inputs.place(name, values, shape, strides, offset)


def _forward(case: Case, new: Tensors) -> tuple:
    return new.sequence("x", case.c_in, case.layout), new.weight(), new.bias(), case.d


def _fused(case: Case, new: Tensors) -> tuple:
    x, weight, bias, d = _forward(case, new)
    return x, weight, bias, new.residual(x, case.channels), d, case.activation


def _activation_grad(case: Case, new: Tensors) -> tuple:
    grad_y = new.sequence("grad_y", case.channels, case.layout)
    x = new.sequence("x", case.c_in, case.others)
    return grad_y, x, new.weight(), new.bias(), case.d, case.activation


def _input_grad(case: Case, new: Tensors) -> tuple:
    grad_y = new.sequence("grad_y", case.c_out, case.layout)
    return grad_y, new.weight(), case.d, new.residual(grad_y, case.c_in)


def _weight_grad(case: Case, new: Tensors) -> tuple:
    return new.sequence("grad_y", case.c_out, case.layout), new.sequence("x", case.c_in, case.others), case.K, case.d


Reach = list[tuple[Tensor, Tensor]]  # for each result a mask of what a spoilt value may reach, and one of what NaN must


def _later(case: Case, t: int, c: int) -> Reach:
    return _steps(case, range(t, case.T, case.d))


def _earlier(case: Case, t: int, c: int) -> Reach:
    return _steps(case, range(t, -1, -case.d))


def _steps(case: Case, steps: range) -> Reach:
    reached = torch.zeros(case.B, 1, case.T, dtype=torch.bool, device=DEVICE)
    reached[0, :, list(steps[: case.K])] = True
    return [(reached, reached)]


def _its_channel(case: Case, t: int, c: int) -> Reach:
    """Every tap: a block of time goes on behind T, where grad_y counts as 0, and 0 times NaN is NaN."""
    channel = torch.arange(case.c_in, device=DEVICE)[:, None] == c
    nothing = torch.zeros(1, dtype=torch.bool, device=DEVICE)
    return [(channel, channel & (torch.arange(case.K, device=DEVICE) == 0)), (nothing, nothing)]


class Subject(NamedTuple):
    """What the fuzzer knows of an op."""

    arguments: Callable[[Case, Tensors], tuple]
    choices: dict[str, tuple]  # in place of _COMMON's
    spoilt: int  # which argument is spoilt, at one step and channel of its first row
    reach: Callable[[Case, int, int], Reach]  # and how far that step and channel reach
    bent: int | None = None  # where the activation stands among the arguments, for an op that is not linear


_BENT = tuple(name for name in ACTIVATIONS if name != "none")
SUBJECTS = {
    "causal_conv1d": Subject(_forward, {}, 0, _later),
    "causal_conv1d_fused": Subject(
        _fused, {"activation": tuple(ACTIVATIONS), "residual": ("another", "x itself", "none")}, 0, _later, bent=5
    ),
    "causal_conv1d_activation_grad": Subject(_activation_grad, {"activation": _BENT}, 1, _later, bent=5),
    "causal_conv1d_input_grad": Subject(_input_grad, {"bias": ("none",), "residual": ("none", "another", "x itself")}, 0, _earlier),
    "causal_conv1d_weight_grad": Subject(_weight_grad, {"bias": ("none",), "weight": ("contiguous",)}, 1, _its_channel),
}


# ---- the check


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
        if case.spoilt is not None and case.B and case.T and (KERNELS_RUN or case.dtype != "bf16"):
            _check_reach(case, args)


def _run(op: str, args: tuple) -> tuple[Tensor, ...]:
    """The results, once they are the same bits through the dispatcher as on guarded memory."""
    through_torch = getattr(torch.ops.fuzzytok, op).default
    if not KERNELS_RUN:
        with poisoned():
            return _tuple(through_torch(*args))
    from fuzzytok_kernels import launch

    with guards.Allocations() as allocations:
        got = _tuple(getattr(launch, op)(*args))
    if any(value.numel() for value in got):
        allocations.check()
    if ON_CUDA:
        _assert_same_bits(_tuple(through_torch(*args)), got, "the op itself")
    return got


def _check_kinds(case: Case, args: tuple, got: tuple[Tensor, ...]) -> None:
    with FakeTensorMode() as mode:
        fakes: dict[int, Any] = {}
        for arg in args:
            fakes.setdefault(id(arg), mode.from_tensor(arg) if isinstance(arg, Tensor) else arg)
        wanted = _tuple(getattr(torch.ops.fuzzytok, case.op).default(*(fakes[id(arg)] for arg in args)))
    for ours, fake in zip(got, wanted, strict=True):
        kinds = [(tuple(value.shape), value.stride(), value.dtype) for value in (ours, fake)]
        assert kinds[0] == kinds[1], f"{kinds[0]}, where its fake has {kinds[1]}"


def _check_values(case: Case, args: tuple, got: tuple[Tensor, ...]) -> None:
    """At most twice the error that PyTorch makes in this dtype, beside what the accumulator's rounding can do.

    Under TF32 PyTorch's error is that of operands rounded to it: cuDNN rounds for some shapes only.
    """
    op = getattr(reference, case.op)
    wide = _mapped(args, Tensor.double)
    want = _tuple(op(*wide))
    torchs = _tuple(op(*_rounded(case, args)) if case.dtype == "tf32" else op(*args))
    for number, (ours, exact, own, slack) in enumerate(zip(got, want, torchs, _slack(case, wide, want), strict=True)):
        for norm in (float("inf"), 2.0):
            error, allowed = _norm(ours - exact, norm), 2 * _norm(own - exact, norm) + _norm(slack, norm)
            assert error <= allowed, f"result {number}: {norm}-norm of the error {error:.3g}, allowed {allowed:.3g}"


def _slack(case: Case, wide: tuple, want: tuple[Tensor, ...]) -> list[Tensor]:
    """What an accumulator may do: eight units of its precision and one for every eight terms, of the sum of the terms' sizes.

    Tensor cores cut off where others round, so that errors do not cancel. Behind an activation: how far that much moves the result.
    """
    subject, op = SUBJECTS[case.op], getattr(reference, case.op)
    terms = case.B * case.T if case.op == "causal_conv1d_weight_grad" else case.K * max(case.c_in, case.c_out)
    unit = torch.finfo(torch.float64 if case.dtype == "fp64" else torch.float32).eps * (8 + terms / 8)
    if subject.bent is None:
        return [unit * value for value in _tuple(op(*_mapped(wide, Tensor.abs)))]
    x, weight, bias = (wide[i] for i in range(subject.spoilt, subject.spoilt + 3))
    p = reference.causal_conv1d(x, weight, bias, case.d)
    moved = unit * reference.causal_conv1d(*_mapped((x, weight, bias), Tensor.abs), case.d)
    halves = 2 if case.activation in GATES else 1
    slack = unit * want[0].abs()
    for signs in itertools.product((1.0, -1.0), repeat=halves):
        sign = torch.tensor(signs, dtype=p.dtype, device=p.device).repeat_interleave(p.shape[1] // halves)[:, None]
        slack = torch.maximum(slack, unit * want[0].abs() + (_bent(case, wide, p + sign * moved) - want[0]).abs())
    return [slack]


def _bent(case: Case, wide: tuple, p: Tensor) -> Tensor:
    if case.op == "causal_conv1d_fused":
        return reference.activated(p, wide[3], case.activation)
    return reference.activation_grad(wide[0], p, case.activation)


def _check_reach(case: Case, args: tuple) -> None:
    """NaN or infinity at one step changes no bit of what that step does not reach; NaN arrives at all that it does.

    But for the derivative of ReLU, which at NaN is 1, as PyTorch has it.
    """
    subject = SUBJECTS[case.op]
    clean = args[subject.spoilt].clone(memory_format=torch.preserve_format)
    spoilt, t, c = clean.clone(), case.seed % case.T, case.seed % clean.shape[1]
    spoilt[0, c, t] = case.spoilt

    def run_with(x: Tensor) -> tuple[Tensor, ...]:
        return _run(case.op, tuple(x if arg is args[subject.spoilt] else arg for arg in args))

    nan_arrives = case.spoilt != case.spoilt and (case.op, case.activation) != ("causal_conv1d_activation_grad", "relu")
    for before, after, (may, must) in zip(run_with(clean), run_with(spoilt), subject.reach(case, t, c), strict=True):
        where = f"{case.spoilt} at step {t} of channel {c}"
        assert torch.equal(torch.where(may, 0, before), torch.where(may, 0, after)), f"{where} reached more than it may"
        assert not nan_arrives or torch.where(must, after, torch.nan).isnan().all(), f"{where} was lost"


# ---- small things


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """PyTorch's switch, by its old name: it refuses to read that once the new one has been set."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _rounded(case: Case, args: tuple) -> tuple:
    """In fp64, what the products read rounded to the nearest TF32; a bias, a residual and a grad_y that only scales stay as they are."""
    first = 1 if case.op == "causal_conv1d_activation_grad" else 0
    return _mapped((*args[:first], *_mapped(args[first : first + 2], _nearest_tf32), *args[first + 2 :]), Tensor.double)


def _nearest_tf32(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def _mapped(args: tuple, function: Callable[[Tensor], Tensor]) -> tuple:
    return tuple(function(arg) if isinstance(arg, Tensor) else arg for arg in args)


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _norm(value: Tensor, norm: float) -> float:
    return torch.linalg.vector_norm(value.double(), norm).item() if value.numel() else 0.0


def _assert_same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...], what: str) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.stride() == other.stride() and torch.equal(one, other), f"{what} gave other bits or strides"
