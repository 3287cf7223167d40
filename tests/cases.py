"""Random problems of every op: what test_fuzz.py and fuzz.py draw, and verdicts.py checks.

An op joins by a line in SUBJECTS. A case has two halves: its template decides
which kernel is compiled, its sizes do not (they keep the template's divisibility), so that a GPU can run thousands of cases of a few
hundred kernels.
"""

import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import guards
import torch
from hypothesis import strategies as st
from modes import DEVICE, INTERPRETED, KERNELS_RUN, ON_CUDA
from oracle import LAYOUTS, WEIGHT_LAYOUTS
from torch import Tensor

from fuzzytok_kernels.reference import ACTIVATIONS, GATES
from fuzzytok_kernels.tuning.space import PACKED

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
    dict(path="tma", BLOCK_T=128, BLOCK_C_IN=64, BLOCK_C_OUT=64, num_warps=8, num_stages=2, programs_per_sm=2, TAPS=2),
    PACKED._replace(num_stages=2)._asdict(),  # three of the weight-grad in fp32 do not fit
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
    "packed": (False,),
    "state": (False,),
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
    packed: bool  # whether the row is several sequences, end to end
    state: bool  # whether each sequence has an initial state; of an update, whether states are circular, in slots of another order
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
    def boundaries(self) -> list[int]:
        """Of the sequences that lie end to end: up to five, some of them empty."""
        inner = random.Random(self.seed)
        return sorted([0, self.T, *(inner.randint(0, self.T) for _ in range(inner.randrange(5)))])

    def sequence_of(self, t: int) -> range:
        """The steps of the sequence that has step t."""
        ends = [0, self.T] if not self.packed else self.boundaries
        return range(max(end for end in ends if end <= t), min(end for end in ends if end > t))

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
        B=st.just(1) if template["packed"] else st.sampled_from((1, 2, 3, 4) * 3 + (0,)),
        d=st.integers(1, 9)
        if template["state"] or "update" in template["op"]
        else st.one_of(st.integers(1, 9), st.sampled_from((64, 640, 2**31 - 1, 2**40))),
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

    def conv_state(self, shape: tuple[int, int, int]) -> Tensor:
        """Written in place, so that no two of its elements may share memory."""
        return self._new("conv_state", shape, LAYOUTS["channels-last" if self.case.others.startswith("channels-last") else _CONTIGUOUS])

    def matrix(self, name: str, rows: int, columns: int) -> Tensor:
        return self._new(name, (rows, columns), lambda rows, columns: ((columns, 1), 0))

    def weight(self, c_in: int | None = None) -> Tensor:
        case = self.case if c_in is None else self.case._replace(c_in=c_in)
        layout = WEIGHT_LAYOUTS.get(case.weight, LAYOUTS[_CONTIGUOUS])
        return self._new("weight", (case.c_out, case.c_in, case.K), layout, (case.c_in * case.K) ** -0.5)

    def bias(self) -> Tensor | None:
        step = {"contiguous": 1, "every second": 2, "none": 0}[self.case.bias]
        return self._new("bias", (self.case.c_out,), lambda n: ((step,), 0)) if step else None

    def residual(self, x: Tensor, channels: int) -> Tensor | None:
        if self.case.residual == "x itself" and x.shape[1] == channels:
            return x
        return None if self.case.residual == "none" else self.sequence("residual", channels, self.case.others)

    def sequences(self) -> tuple[Tensor | None, Tensor | None]:
        """initial_state and cu_seqlens."""
        case = self.case
        rows = len(case.boundaries) - 1 if case.packed else case.B
        shape = rows, case.c_in, (case.K - 1) * case.d
        return self._new("initial_state", shape, LAYOUTS[case.others]) if case.state else None, self.cu_seqlens()

    def cu_seqlens(self) -> Tensor | None:
        return torch.tensor(self.case.boundaries, dtype=torch.int32, device=DEVICE) if self.case.packed else None

    def _new(self, name: str, shape: tuple[int, ...], layout: Callable[..., tuple], scale: float = 1.0) -> Tensor:
        strides, offset = layout(*shape)
        base = [1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True)]
        values = (torch.randn(base, device=DEVICE) * scale).to(DTYPES[self.case.dtype])
        return self.inputs.place(name, values, shape, strides, offset)


def _forward(case: Case, new: Tensors) -> tuple:
    return new.sequence("x", case.c_in, case.layout), new.weight(), new.bias(), case.d


def _fused(case: Case, new: Tensors) -> tuple:
    x, weight, bias, d = _forward(case, new)
    return x, weight, bias, new.residual(x, case.channels), *new.sequences(), d, case.activation


def _update(case: Case, new: Tensors) -> tuple:
    """Rows in slots of another order, each some number of steps into its stream; or row by row, the oldest step first."""
    x, weight, bias, d = _forward(case, new)
    slots = case.B + 2 if case.state else case.B
    conv_state = new.conv_state((slots, case.c_in, (case.K - 1) * d))
    cache_seqlens = torch.randint(0, 50, (case.B,), device=DEVICE) if case.state else None
    indices = torch.randperm(slots, device=DEVICE)[: case.B] if case.state else None
    return x, conv_state, weight, bias, new.residual(x, case.channels), cache_seqlens, indices, d, case.activation


def _bytes(case: Case, new: Tensors) -> tuple:
    """The config, which none is stored for, says which of its two dtypes the ids have."""
    dtype = (torch.uint8, torch.int64)[case.config % 2]
    ids = torch.randint(256, (case.B, case.T), device=DEVICE).to(dtype)
    embedding, weight = new.matrix("embedding", 256, case.channels), new.weight(case.channels)
    return ids, embedding, weight, new.bias(), case.d, case.activation, new.cu_seqlens()


def _byte_grad(case: Case, new: Tensors) -> tuple:
    return new.sequence("grad_y", case.channels, case.layout), *_bytes(case, new)


def _stack(case: Case, new: Tensors) -> tuple:
    """Two layers, the second of twice the dilation; `state` as of an update."""
    x, dilations = new.sequence("x", case.channels, case.layout), [case.d, 2 * case.d]
    slots = case.B + 2 if case.state else case.B
    history = new.conv_state((slots, case.channels, (case.K - 1) * sum(dilations))).mT.contiguous()
    indices = torch.randperm(slots, device=DEVICE)[: case.B] if case.state else None
    layers = [new.weight(case.channels) for _ in dilations], [new.bias() for _ in dilations]
    return x, history, torch.randint(0, 50, (slots,), device=DEVICE), indices, *layers, dilations, case.activation


def _embedding_norm(case: Case, new: Tensors) -> tuple:
    ids = torch.randint(256, (case.B, case.T), device=DEVICE)
    scale, shift = (new.matrix(name, 1, case.channels)[0] for name in ("weight", "bias"))
    return ids, new.matrix("embedding", 256, case.channels), scale, shift, 1e-5


def _activation_grad(case: Case, new: Tensors) -> tuple:
    grad_y = new.sequence("grad_y", case.channels, case.layout)
    x = new.sequence("x", case.c_in, case.others)
    return grad_y, x, new.weight(), new.bias(), *new.sequences(), case.d, case.activation


def _input_grad(case: Case, new: Tensors) -> tuple:
    grad_y = new.sequence("grad_y", case.c_out, case.layout)
    return grad_y, new.weight(), case.d, new.residual(grad_y, case.c_in), new.cu_seqlens()


def _weight_grad(case: Case, new: Tensors) -> tuple:
    grad_y, x = new.sequence("grad_y", case.c_out, case.layout), new.sequence("x", case.c_in, case.others)
    return grad_y, x, case.K, case.d, new.cu_seqlens()


Reach = list[tuple[Tensor, Tensor]]  # for each result a mask of what a spoilt value may reach, and one of what NaN must


def _later(case: Case, t: int, c: int) -> Reach:
    return _steps(case, range(t, case.sequence_of(t).stop, case.d))


def _earlier(case: Case, t: int, c: int) -> Reach:
    return _steps(case, range(t, case.sequence_of(t).start - 1, -case.d))


def _later_and_kept(case: Case, t: int, c: int) -> Reach:
    """That channel of the states, too; which row's slot is the first one's, the case does not say."""
    channel = torch.arange(case.c_in, device=DEVICE)[:, None] == c
    return [*_later(case, t, c), (channel, torch.zeros_like(channel))]


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
    """What the fuzzer knows of an op, beside its schema: which argument has which name."""

    arguments: Callable[[Case, Tensors], tuple]
    choices: dict[str, tuple]  # in place of _COMMON's
    spoilt: str | None = None  # which argument is spoilt, at one step and channel of its first row
    reach: Callable[[Case, int, int], Reach] | None = None  # and how far that step and channel reach
    launch: str = "fuzzytok_kernels.launch"  # the modules that have the op's functions
    reference: str = "fuzzytok_kernels.reference"


_BENT = tuple(name for name in ACTIVATIONS if name != "none")
_SEQUENCES = {"packed": (False, False, True), "state": (False, False, True)}
SUBJECTS = {
    "causal_conv1d": Subject(_forward, {}, "x", _later),
    "causal_conv1d_fused": Subject(
        _fused, {"activation": tuple(ACTIVATIONS), "residual": ("another", "x itself", "none"), **_SEQUENCES}, "x", _later
    ),
    "causal_conv1d_activation_grad": Subject(_activation_grad, {"activation": _BENT, **_SEQUENCES}, "x", _later),
    "causal_conv1d_input_grad": Subject(
        _input_grad, {"bias": ("none",), "residual": ("none", "another", "x itself"), "packed": (False, True)}, "grad_y", _earlier
    ),
    "causal_conv1d_update": Subject(
        _update,
        {"activation": tuple(ACTIVATIONS), "residual": ("another", "x itself", "none"), "state": (False, True)},
        "x",
        _later_and_kept,
        launch="fuzzytok_kernels.streaming.launch",
        reference="fuzzytok_kernels.streaming.reference",
    ),
    "byte_causal_conv1d": Subject(
        _bytes, {"activation": tuple(ACTIVATIONS), "packed": (False, True)}, launch="fuzzytok_kernels.byte_launch"
    ),
    "byte_causal_conv1d_grad": Subject(
        _byte_grad, {"activation": tuple(ACTIVATIONS), "packed": (False, True)}, launch="fuzzytok_kernels.byte_launch"
    ),
    "embedding_norm": Subject(
        _embedding_norm,
        {},
        launch="fuzzytok_kernels.streaming.launch",
        reference="fuzzytok_kernels.streaming.reference",
    ),
    "causal_conv1d_weight_grad": Subject(
        _weight_grad, {"bias": ("none",), "weight": ("contiguous",), "packed": (False, True)}, "x", _its_channel
    ),
    "residual_stack_update": Subject(
        _stack,
        {"bias": ("contiguous",), "activation": tuple(ACTIVATIONS), "state": (False, True)},
        launch="fuzzytok_kernels.streaming.launch",
        reference="fuzzytok_kernels.streaming.reference",
    ),
}
