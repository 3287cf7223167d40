"""What the ops refuse: the same one-line error from op, fake and meta, before anything is launched."""

from contextlib import nullcontext

import pytest
import torch
from modes import needs_cuda
from oracle import OPS
from torch._subclasses.fake_tensor import FakeTensorMode

import fuzzytok_kernels

FORWARD, INPUT_GRAD, WEIGHT_GRAD = OPS
I32, F16 = torch.int32, torch.float16
RANK, HINT = "expected 3 dimensions (batch, channels, time)", "add a batch dimension with unsqueeze(0)"

# (op, the argument that takes the place of a good one, how the message begins: argument and what was given, what else it says).
# `new(*shape)` is a tensor, float32 unless told; `far(*shape)` is one on another device.
VALUES = [
    (FORWARD, lambda new, far: dict(x=new(4, 9)), "x has shape (4, 9)", RANK, HINT),
    (FORWARD, lambda new, far: dict(x=new(2, 4, 9, 1)), "x has shape (2, 4, 9, 1)", RANK),
    (FORWARD, lambda new, far: dict(x=new(9)), "x has shape (9,)", RANK),
    (FORWARD, lambda new, far: dict(x=new()), "x has shape ()", RANK),
    (FORWARD, lambda new, far: dict(x=new(2, 0, 9)), "x has shape (2, 0, 9)", "at least one channel"),
    (FORWARD, lambda new, far: dict(weight=new(6, 4)), "weight has shape (6, 4)", "(C_out, C_in, K)"),
    (FORWARD, lambda new, far: dict(weight=new(6, 5, 3)), "weight has shape (6, 5, 3)", "C_in", ", 4"),
    (FORWARD, lambda new, far: dict(weight=new(6, 4, 0)), "weight has shape (6, 4, 0)", "at least one", "tap"),
    (FORWARD, lambda new, far: dict(weight=new(0, 4, 3)), "weight has shape (0, 4, 3)", "at least one", "output channel"),
    (FORWARD, lambda new, far: dict(weight=far(6, 4, 3)), "weight is on ", "expected the device of x, "),
    (FORWARD, lambda new, far: dict(bias=new(5)), "bias has shape (5,)", "expected (6,)"),
    (FORWARD, lambda new, far: dict(bias=new(6, 1)), "bias has shape (6, 1)", "expected (6,)"),
    (FORWARD, lambda new, far: dict(bias=far(6)), "bias is on ", "expected the device of x, "),
    (FORWARD, lambda new, far: dict(dilation=0), "dilation is 0", "at least 1"),
    (FORWARD, lambda new, far: dict(dilation=-1), "dilation is -1", "at least 1"),
    (INPUT_GRAD, lambda new, far: dict(grad_y=new(6, 9)), "grad_y has shape (6, 9)", RANK, HINT),
    (INPUT_GRAD, lambda new, far: dict(weight=new(5, 4, 3)), "weight has shape (5, 4, 3)", "C_out", ", 6"),
    (INPUT_GRAD, lambda new, far: dict(weight=new(6, 0, 3)), "weight has shape (6, 0, 3)", "at least one input channel"),
    (INPUT_GRAD, lambda new, far: dict(weight=new(6, 4, 0)), "weight has shape (6, 4, 0)", "tap"),
    (INPUT_GRAD, lambda new, far: dict(weight=far(6, 4, 3)), "weight is on ", "expected the device of grad_y, "),
    (INPUT_GRAD, lambda new, far: dict(dilation=0), "dilation is 0", "at least 1"),
    (WEIGHT_GRAD, lambda new, far: dict(grad_y=new(6, 9)), "grad_y has shape (6, 9)", RANK, HINT),
    (WEIGHT_GRAD, lambda new, far: dict(x=new(4, 9)), "x has shape (4, 9)", RANK, HINT),
    (WEIGHT_GRAD, lambda new, far: dict(x=new(3, 4, 9)), "x has shape (3, 4, 9)", "batch", "grad_y, (2, 6, 9)"),
    (WEIGHT_GRAD, lambda new, far: dict(x=new(2, 4, 8)), "x has shape (2, 4, 8)", "time", "grad_y, (2, 6, 9)"),
    (WEIGHT_GRAD, lambda new, far: dict(x=far(2, 4, 9)), "x is on ", "expected the device of grad_y, "),
    (WEIGHT_GRAD, lambda new, far: dict(kernel_size=0), "kernel_size is 0", "at least 1"),
    (WEIGHT_GRAD, lambda new, far: dict(dilation=0), "dilation is 0", "at least 1"),
]
DTYPES = [
    (FORWARD, lambda new, far: dict(x=new(2, 4, 9, dtype=I32)), "x has dtype torch.int32 on ", "float16, bfloat16, float32"),
    (FORWARD, lambda new, far: dict(x=new(2, 4, 9, dtype=torch.uint8)), "x has dtype torch.uint8 on ", "float16, bfloat16, float32"),
    (FORWARD, lambda new, far: dict(x=new(2, 4, 9, dtype=torch.complex64)), "x has dtype torch.complex64 on ", "float16, bfloat16"),
    (FORWARD, lambda new, far: dict(x=new(2, 4, 9, dtype=torch.float8_e5m2)), "x has dtype torch.float8_e5m2 on ", "float16, bfloat16"),
    (FORWARD, lambda new, far: dict(weight=new(6, 4, 3, dtype=F16)), "weight has dtype torch.float16", "of x, torch.float32", "autocast"),
    (FORWARD, lambda new, far: dict(bias=new(6, dtype=F16)), "bias has dtype torch.float16", "of x, torch.float32", "autocast"),
    (INPUT_GRAD, lambda new, far: dict(grad_y=new(2, 6, 9, dtype=I32)), "grad_y has dtype torch.int32 on ", "float16, bfloat16, float32"),
    (INPUT_GRAD, lambda new, far: dict(weight=new(6, 4, 3, dtype=F16)), "weight has dtype torch.float16", "of grad_y, torch.float32"),
    (WEIGHT_GRAD, lambda new, far: dict(grad_y=new(2, 6, 9, dtype=I32)), "grad_y has dtype torch.int32 on ", "float16, bfloat16, float32"),
    (WEIGHT_GRAD, lambda new, far: dict(x=new(2, 4, 9, dtype=F16)), "x has dtype torch.float16", "of grad_y, torch.float32"),
]
CASES = [(ValueError, *case) for case in VALUES] + [(TypeError, *case) for case in DTYPES]


def _new_on(device: str):
    return lambda *shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype, device=device)


def _good(op: str, new) -> dict:
    """Arguments that the op takes, by name."""
    shapes = {"x": (2, 4, 9), "weight": (6, 4, 3), "bias": (6,), "grad_y": (2, 6, 9)}
    names = [argument.name for argument in OPS[op]._schema.arguments]
    return {name: new(*shapes[name]) if name in shapes else 3 for name in names if name not in ("residual", "cu_seqlens")}


@pytest.mark.parametrize("kind", ["real", "fake", "meta"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}: {case[3].strip()}")
def test_refused(case, kind, device):
    exception, op, changes, *says = case
    here = "meta" if kind == "meta" else device.type
    there = "cpu" if here != "cpu" else "meta" if kind == "real" else "cuda"  # a fake GPU needs none
    with FakeTensorMode() if kind == "fake" else nullcontext():
        arguments = {**_good(op, _new_on(here)), **changes(_new_on(here), _new_on(there))}
        with pytest.raises(exception) as caught:
            OPS[op](**arguments)
    message = str(caught.value)
    assert type(caught.value) is exception
    assert message.startswith(says[0])
    assert all(part in message for part in says)
    assert "\n" not in message


@pytest.mark.parametrize("op", OPS)
def test_good_arguments_pass(op, device):
    """What every case above differs from by one argument."""
    results = OPS[op](**_good(op, _new_on(device.type)))
    assert all((result == 0).all() for result in (results if isinstance(results, tuple) else (results,)))


@pytest.mark.parametrize("kind", ["fake", pytest.param("real", marks=needs_cuda)])
@pytest.mark.parametrize("op", OPS)
def test_fp64_on_a_gpu(op, kind):
    with FakeTensorMode() if kind == "fake" else nullcontext():
        arguments = _good(op, lambda *shape: torch.zeros(shape, dtype=torch.float64, device="cuda"))
        with pytest.raises(TypeError, match=r"has dtype torch\.float64 on cuda; expected one of float16, bfloat16, float32$"):
            OPS[op](**arguments)


def test_the_public_function_refuses_the_same(device):
    new = _new_on(device.type)
    with pytest.raises(ValueError, match=r"x has shape \(4, 9\).*unsqueeze"):
        fuzzytok_kernels.causal_conv1d(new(4, 9).requires_grad_(), new(6, 4, 3))
    with pytest.raises(TypeError, match="positional"):
        fuzzytok_kernels.causal_conv1d(new(2, 4, 9), new(6, 4, 3), None, 2)


def test_mixed_dtypes_under_autocast_only(device):
    arguments = {**_good(FORWARD, _new_on(device.type)), "weight": torch.zeros(6, 4, 3, dtype=F16, device=device)}
    with torch.autocast(device.type, dtype=F16):
        assert OPS[FORWARD](**arguments).dtype == F16
    with pytest.raises(TypeError, match="weight has dtype"):
        OPS[FORWARD](**arguments)
