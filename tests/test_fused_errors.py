"""What the fused convolution and its gradient ops refuse, and in which words."""

from contextlib import nullcontext

import pytest
import torch
from fused_oracle import ACTIVATION_GRAD_OP, FUSED_OP, INPUT_GRAD
from torch._subclasses.fake_tensor import FakeTensorMode

from fuzzytok_kernels import causal_conv1d

NAMES = "'relu', 'silu', 'gelu', 'gelu_tanh', 'glu', 'tanh_sigmoid'"
SHARED = [  # of the function and its op: what takes the place of good arguments, what the message says, from its beginning
    (ValueError, lambda new, far: dict(activation="tanh"), "activation is 'tanh'; expected one of ", NAMES),
    (ValueError, lambda new, far: dict(activation="glu", weight=new(5, 4, 3), bias=new(5)), "weight has shape (5, 4, 3)", "'glu'", "even"),
    (ValueError, lambda new, far: dict(activation="tanh_sigmoid", weight=new(3, 4, 3), bias=new(3)), "weight has shape (3, 4, 3)", "even"),
    (
        ValueError,
        lambda new, far: dict(activation="tanh_sigmoid", weight=new(3, 4, 3), bias=None, residual=None),
        "weight has shape (3, ",
        "even",
    ),
    (ValueError, lambda new, far: dict(activation="glu"), "residual has shape (2, 6, 9)", "(2, 3, 9)"),
    (ValueError, lambda new, far: dict(residual=new(2, 6, 8)), "residual has shape (2, 6, 8)", "(2, 6, 9)"),
    (ValueError, lambda new, far: dict(residual=new(1, 6, 9)), "residual has shape (1, 6, 9)", "(2, 6, 9)"),
    (ValueError, lambda new, far: dict(residual=new(2, 6, 1)), "residual has shape (2, 6, 1)", "(2, 6, 9)"),
    (ValueError, lambda new, far: dict(residual=new(6, 9)), "residual has shape (6, 9)", "(2, 6, 9)"),
    (ValueError, lambda new, far: dict(residual=far(2, 6, 9)), "residual is on ", "expected the device of x, "),
    (TypeError, lambda new, far: dict(residual=new(2, 6, 9).half()), "residual has dtype torch.float16", "of x, torch.float32", "autocast"),
]
OF_ACTIVATION_GRAD = [
    (ValueError, lambda new, far: dict(activation="none"), "activation is 'none'"),
    (ValueError, lambda new, far: dict(activation="tanh"), "activation is 'tanh'; expected one of "),
    (ValueError, lambda new, far: dict(activation="glu"), "grad_y has shape (2, 6, 9)", "(2, 3, 9)"),
    (ValueError, lambda new, far: dict(grad_y=new(2, 6, 8)), "grad_y has shape (2, 6, 8)", "(2, 6, 9)"),
    (ValueError, lambda new, far: dict(grad_y=far(2, 6, 9)), "grad_y is on "),
    (TypeError, lambda new, far: dict(grad_y=new(2, 6, 9).half()), "grad_y has dtype torch.float16"),
]
OF_INPUT_GRAD = [
    (ValueError, lambda new, far: dict(residual=new(2, 6, 9)), "residual has shape (2, 6, 9)", "(2, 4, 9)"),
    (ValueError, lambda new, far: dict(residual=new(1, 4, 9)), "residual has shape (1, 4, 9)", "(2, 4, 9)"),
    (ValueError, lambda new, far: dict(residual=far(2, 4, 9)), "residual is on ", "expected the device of grad_y, "),
    (TypeError, lambda new, far: dict(residual=new(2, 4, 9).half()), "residual has dtype torch.float16", "of grad_y"),
]
WAYS = {  # of the function, the number of taps, and who wants a gradient
    "function": (causal_conv1d, 3, False),
    "function, recomputing": (causal_conv1d, 3, True),
    "function, storing": (causal_conv1d, 512, True),
}
CASES = [(FUSED_OP, 3, False, *case) for case in SHARED]
CASES += [(*way, *case) for way in WAYS.values() for case in SHARED]
CASES += [(ACTIVATION_GRAD_OP, 3, False, *case) for case in OF_ACTIVATION_GRAD] + [(INPUT_GRAD, 3, False, *case) for case in OF_INPUT_GRAD]


def _id(case: tuple) -> str:
    function, K, wanted, _, _, says, *_ = case
    way = {value: name for name, value in WAYS.items()}.get((function, K, wanted))
    return f"{way or function._schema.name.removeprefix('fuzzytok::causal_conv1d_')}: {says.strip()}"


def good_arguments(function, new, K: int = 3) -> dict:
    """Arguments that `function` takes, by name."""
    shapes = {"x": (2, 4, 9), "weight": (6, 4, K), "bias": (6,), "residual": (2, 6, 9), "grad_y": (2, 6, 9)}
    if function is INPUT_GRAD:
        shapes["residual"] = (2, 4, 9)
    names = ["x", "weight", "bias", "residual", "dilation", "activation"]
    names = names if function is causal_conv1d else [argument.name for argument in function._schema.arguments]
    return {name: new(*shapes[name]) if name in shapes else {"dilation": 3, "activation": "relu"}.get(name) for name in names}


def _new_on(device: str):
    return lambda *shape: torch.zeros(shape, device=device)


@pytest.mark.parametrize("kind", ["real", "fake", "meta"])
@pytest.mark.parametrize("case", CASES, ids=_id)
def test_refused(case, kind, device):
    """The same one line from op, function, fake and meta, whoever wants a gradient."""
    function, K, wanted, exception, changes, *says = case
    here = "meta" if kind == "meta" else device.type
    there = "cpu" if here != "cpu" else "meta" if kind == "real" else "cuda"  # a fake GPU needs none
    with FakeTensorMode() if kind == "fake" else nullcontext():
        arguments = {**good_arguments(function, _new_on(here), K), **changes(_new_on(here), _new_on(there))}
        if K != 3 and arguments["weight"].shape[2] != K:
            arguments["weight"] = arguments["weight"].repeat(1, 1, K)[:, :, :K]
            says[0] = says[0].replace(", 3)", f", {K})")
        if wanted:
            arguments["weight"].requires_grad_()
        with pytest.raises(exception) as caught:
            function(**arguments)
    message = str(caught.value)
    assert type(caught.value) is exception
    assert message.startswith(says[0])
    assert all(part in message for part in says)
    assert "\n" not in message


@pytest.mark.parametrize(
    "function", [causal_conv1d, FUSED_OP, ACTIVATION_GRAD_OP, INPUT_GRAD], ids=["function", "fused", "act", "input_grad"]
)
def test_good_arguments_pass(function, device):
    """What every case above differs from."""
    assert (function(**good_arguments(function, _new_on(device.type))) == 0).all()
