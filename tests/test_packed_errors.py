"""What packed sequences and initial states refuse: one line, before anything is launched."""

from contextlib import nullcontext

import pytest
import torch
from modes import INTERPRETED, ON_CUDA, needs_cuda, run_python
from torch._subclasses.fake_tensor import FakeTensorMode

from fuzzytok_kernels import causal_conv1d

ops = torch.ops.fuzzytok

REFUSED = [  # what takes the place of good arguments, what the message says, from its beginning
    (TypeError, lambda new, far: dict(cu_seqlens=new(3).long()), "cu_seqlens has dtype torch.int64", "torch.int32"),
    (ValueError, lambda new, far: dict(cu_seqlens=new(1, 3).int()), "cu_seqlens has shape (1, 3)", "(N + 1,)"),
    (ValueError, lambda new, far: dict(cu_seqlens=new(0).int()), "cu_seqlens has shape (0,)", "(N + 1,)"),
    (ValueError, lambda new, far: dict(cu_seqlens=far(3).int()), "cu_seqlens is on ", "expected the device of "),
    (ValueError, lambda new, far: dict(x=new(2, 4, 9), grad_y=new(2, 4, 9), residual=new(2, 4, 9)), "", "(2, 4, 9)", "batch of one"),
]  # fmt: skip
OF_STATES = [
    (ValueError, lambda new, far: dict(initial_state=new(1, 4, 6)), "initial_state has shape (1, 4, 6)", "(2, 4, 6)"),
    (ValueError, lambda new, far: dict(initial_state=new(2, 5, 6)), "initial_state has shape (2, 5, 6)", "(2, 4, 6)"),
    (ValueError, lambda new, far: dict(initial_state=new(2, 4, 5)), "initial_state has shape (2, 4, 5)", "(2, 4, 6)"),
    (ValueError, lambda new, far: dict(initial_state=new(2, 4, 6), cu_seqlens=None), "initial_state has shape (2, 4, 6)", "(1, 4, 6)"),
    (ValueError, lambda new, far: dict(initial_state=far(2, 4, 6)), "initial_state is on ", "expected the device of x, "),
    (TypeError, lambda new, far: dict(initial_state=new(2, 4, 6).half()), "initial_state has dtype torch.float16", "of x, torch.float32"),
]
NAMES = {
    "function": ("x", "weight", "bias", "residual", "initial_state", "cu_seqlens", "dilation", "activation"),
    "causal_conv1d_fused": ("x", "weight", "bias", "residual", "initial_state", "cu_seqlens", "dilation", "activation"),
    "causal_conv1d_activation_grad": ("grad_y", "x", "weight", "bias", "initial_state", "cu_seqlens", "dilation", "activation"),
    "causal_conv1d_input_grad": ("grad_y", "weight", "dilation", "residual", "cu_seqlens"),
    "causal_conv1d_weight_grad": ("grad_y", "x", "kernel_size", "dilation", "cu_seqlens"),
}
CASES = [(name, *case) for name, names in NAMES.items() for case in REFUSED + OF_STATES * ("initial_state" in names)]


def call(name: str, new, **changes) -> None:
    """`name` on good arguments but for `changes`."""
    shapes = {"x": (1, 4, 9), "grad_y": (1, 4, 9), "residual": (1, 4, 9), "weight": (4, 4, 3), "bias": (4,), "initial_state": (2, 4, 6)}
    good = {key: new(*shape) for key, shape in shapes.items()}
    good |= {"dilation": 3, "activation": "relu", "kernel_size": 3, "cu_seqlens": new(3).int()}
    function = causal_conv1d if name == "function" else getattr(ops, name)
    function(**{key: (good | changes)[key] for key in NAMES[name]})


def new_on(device: str):
    return lambda *shape: torch.zeros(shape, device=device)


@pytest.mark.parametrize("kind", ["real", "fake", "meta"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}: {case[3] or case[4]}")
def test_refused(case, kind, device):
    name, exception, changes, *says = case
    here = "meta" if kind == "meta" else device.type
    there = "cpu" if here != "cpu" else "meta" if kind == "real" else "cuda"  # a fake GPU needs none
    with FakeTensorMode() if kind == "fake" else nullcontext(), pytest.raises(exception) as caught:
        call(name, new_on(here), **changes(new_on(here), new_on(there)))
    message = str(caught.value)
    assert message.startswith(says[0])
    assert all(part in message for part in says)
    assert "\n" not in message


BAD_VALUES = {
    "begins with 1; expected 0": [1, 9],
    "falls from 7 to 3 at number 2": [0, 7, 3, 9],
    "ends with 8; expected the time steps of the packed batch, 9": [0, 4, 8],
    "ends with 10": [0, 10],
    "begins with -1": [-1, 9],
    "ends with 0": [0],
    "begins with 9": [9],
}


@pytest.mark.skipif(ON_CUDA, reason="the next test")
@pytest.mark.parametrize("name", [*list(NAMES)[1:], "where gradients are wanted"])
@pytest.mark.parametrize("says", BAD_VALUES)
def test_bad_values_on_the_cpu(says, name):
    changes = dict(cu_seqlens=torch.tensor(BAD_VALUES[says], dtype=torch.int32), initial_state=None)
    if name == "where gradients are wanted":
        name, changes["weight"] = "function", torch.ones(4, 4, 3, requires_grad=True)
    with pytest.raises(ValueError, match=f"^cu_seqlens {says}"):
        call(name, new_on("cpu"), **changes)


@pytest.mark.skipif(
    not INTERPRETED, reason="what a kernel asserts: on a GPU that ends the process, see the next test; the reference has none"
)
@pytest.mark.parametrize("values", [*BAD_VALUES.values(), [0, 9], [0, 0, 9, 9], [0] * 3000 + [9]], ids=lambda values: str(values[:5]))
def test_what_is_asserted(values, monkeypatch):
    from triton.runtime import interpreter

    from fuzzytok_kernels.asserted import assertion
    from fuzzytok_kernels.descriptors import traits

    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))
    cu_seqlens = torch.tensor(values, dtype=torch.int32)
    good = values[0] == 0 and values[-1] == 9 and values == sorted(values)
    with nullcontext() if good else pytest.raises(interpreter.InterpreterError, match="cu_seqlens must"):
        assertion(traits(cu_seqlens), 9)(cu_seqlens)


FORWARDS = {
    "through descriptors": "with tuning.force(path='tma'): causal_conv1d(x, weight, dilation=3, cu_seqlens=cu_seqlens)",
    "through pointers": "with tuning.force(path='pointer'): causal_conv1d(x, weight, dilation=3, cu_seqlens=cu_seqlens)",
    "look-ups": "torch.ops.fuzzytok.byte_causal_conv1d(ids, x[0].T, weight, None, 3, 'gelu', cu_seqlens)",
}


@needs_cuda
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("values", [values for values in BAD_VALUES.values() if values], ids=str)
def test_bad_values_on_a_gpu_are_a_device_side_assertion(values, forward):
    """In a process of its own, whose GPU is lost to it afterwards."""
    run_python(f"""
import torch
from fuzzytok_kernels import causal_conv1d, tuning
x, weight = torch.randn(1, 9, 16, device="cuda").mT, torch.randn(16, 16, 3, device="cuda")
ids, cu_seqlens = torch.zeros(1, 9, dtype=torch.uint8, device="cuda"), torch.tensor({values}, dtype=torch.int32, device="cuda")
{FORWARDS[forward]}
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    assert "assert" in str(error), error
else:
    raise SystemExit("no assertion")
""")
