"""The fused convolution, `residual + activation(conv(x))`, and its two gradients: values, derivatives, what is saved, what is refused."""

from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from modes import HALF, interpreter_cannot
from oracle import LAYOUTS, Problem, assert_same_bits, conv1d, naive, poisoned, randn
from oracle import Inputs as PlainInputs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from fuzzytok_kernels import ResidualCausalBlock, causal_conv1d, reference

FUSED_OP = torch.ops.fuzzytok.causal_conv1d_fused.default
ACTIVATION_GRAD_OP = torch.ops.fuzzytok.causal_conv1d_activation_grad.default
INPUT_GRAD = torch.ops.fuzzytok.causal_conv1d_input_grad.default
WEIGHT_GRAD = torch.ops.fuzzytok.causal_conv1d_weight_grad.default


def FUSED(x, weight, bias, residual, dilation, activation) -> Tensor:
    """The op without an initial state and packed sequences, of which test_packed.py is."""
    return FUSED_OP(x, weight, bias, residual, None, None, dilation, activation)


def ACTIVATION_GRAD(grad_y, x, weight, bias, dilation, activation) -> Tensor:
    return ACTIVATION_GRAD_OP(grad_y, x, weight, bias, None, None, dilation, activation)


ACTIVATIONS = {  # as people write them, of p (B, C_out, T)
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda p: F.gelu(p, approximate="tanh"),
    "glu": lambda p: F.glu(p, 1),
    "tanh_sigmoid": lambda p: torch.tanh(p[:, : p.shape[1] // 2]) * torch.sigmoid(p[:, p.shape[1] // 2 :]),
}
GATES = ("glu", "tanh_sigmoid")
BOTH = ["channels-first", "channels-last"]
RESIDUALS = ["x itself", "another", "none"]

# c_out counts the channels of y: a gate's convolution makes twice as many.
SHAPES = {
    "one block": Problem(B=2, c_in=16, c_out=16, T=32, K=3, d=2),
    "one step": Problem(B=3, c_in=16, c_out=24, T=1, K=3, d=4),
    "T below the history": Problem(B=2, c_in=16, c_out=24, T=5, K=3, d=4),
    "primes": Problem(B=2, c_in=7, c_out=13, T=29, K=3, d=5),
    "one channel": Problem(B=2, c_in=1, c_out=1, T=19, K=3, d=3),
    "5 channels to 6": Problem(B=2, c_in=5, c_out=6, T=21, K=2, d=7),
    "24 to two unaligned halves": Problem(B=1, c_in=16, c_out=12, T=33, K=2, d=1),
}
LARGE = Problem(B=1, c_in=16, c_out=136, T=133, K=2, d=4)  # several blocks of time and of channels
MIDDLE = Problem(B=2, c_in=16, c_out=16, T=19, K=3, d=4)
SQUARE = Problem(B=2, c_in=8, c_out=8, T=11, K=3, d=2)
RECOMPUTED = Problem(B=2, c_in=16, c_out=16, T=67, K=3, d=2)  # enough sums that PyTorch's largest error is not small by luck
TINY = Problem(B=2, c_in=2, c_out=2, T=4, K=2, d=2)
RECOMPUTED, STORED = (Problem(B=2, c_in=32, c_out=32, T=9, K=K, d=1) for K in (63, 64))  # C_in * K below 2,048, and at it

each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
of_each_kind = pytest.mark.parametrize("activation", ["gelu", "glu"])
each_layout = pytest.mark.parametrize("layout", BOTH)
stored_too = pytest.mark.parametrize(
    "problem",
    [RECOMPUTED, pytest.param(STORED, marks=interpreter_cannot("the plain op and PyTorch's functions, which the plain run covers"))],
    ids=["recomputed", "stored"],
)
each_residual = pytest.mark.parametrize("residual", RESIDUALS)


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    grad_y: Tensor
    dilation: int
    activation: str

    @property
    def forward(self) -> tuple:
        return *self[:4], self.dilation, self.activation

    @property
    def backward(self) -> tuple:
        return self.grad_y, *self[:3], self.dilation, self.activation

    def map(self, function) -> "Inputs":
        return Inputs(*(function(value) if isinstance(value, Tensor) else value for value in self))


def make_inputs(problem: Problem, activation: str, dtype, device, x="channels-first", extra=None, residual="another", scale=1.0) -> Inputs:
    """`extra` is the layout of the residual and of grad_y, that of x unless told."""
    B, c_in, channels, T, K, dilation = problem
    c_out = 2 * channels if activation in GATES else channels
    layout = LAYOUTS[extra or x]
    values = randn((B, c_in, T), dtype, device, LAYOUTS[x], scale)
    others = {"x itself": values, "another": randn((B, channels, T), dtype, device, layout), "none": None}
    return Inputs(
        x=values,
        weight=randn((c_out, c_in, K), dtype, device, scale=(c_in * K) ** -0.5),
        bias=torch.randn(c_out, device=device).to(dtype),
        residual=others[residual],
        grad_y=randn((B, channels, T), dtype, device, layout),
        dilation=dilation,
        activation=activation,
    )


def composed(x, weight, bias, residual, dilation, activation, conv=conv1d) -> Tensor:
    """The block as people write it today."""
    p = conv(x, weight, bias, dilation)
    y = ACTIVATIONS[activation](p) if activation in ACTIVATIONS else p
    return y if residual is None else residual + y


def composed_grad(grad_y, x, weight, bias, dilation, activation, conv=conv1d) -> Tensor:
    p = conv(x, weight, bias, dilation).detach().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS[activation](p), p, grad_y)[0]


def composed_input_grad(grad_y, weight, dilation, residual) -> Tensor:
    x = residual.detach().clone().requires_grad_()
    return torch.autograd.grad(conv1d(x, weight, None, dilation), x, grad_y)[0] + residual


def public(x, weight, bias, residual, dilation, activation) -> Tensor:
    return causal_conv1d(x, weight, bias, dilation=dilation, activation=activation, residual=residual)


def double(args: tuple) -> tuple:
    return tuple(arg.double() if isinstance(arg, Tensor) else arg for arg in args)


def assert_accurate(op, args: tuple, compose) -> Tensor:
    """What `op` returns on poisoned memory, once it passes the error rule against `compose` in the same dtype. `args` stay as they are."""
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    with poisoned():
        got = op(*args)
    assert all(torch.equal(arg, copy) for arg, copy in zip(args, before, strict=True) if isinstance(arg, Tensor)), "an argument was written"
    assert_within_the_rule({"result": got}, {"result": compose(*double(args))}, {"result": compose(*args)})
    return got


def assert_within_the_rule(got: dict, want: dict, torchs: dict) -> None:
    """The error rule of oracle.py: at most twice PyTorch's error and eight units of the accumulator's precision.

    In fp64 `want` is PyTorch's own result, so that its error counts as none and both sides' rounding as ours: 64 units there.
    """
    for name, value in want.items():
        dtype = torchs[name].dtype
        assert (got[name].shape, got[name].dtype) == (value.shape, dtype), name
        precision = 64 * torch.finfo(dtype).eps if dtype == torch.float64 else 8 * torch.finfo(torch.float32).eps
        for norm in (float("inf"), 2):
            error, torch_error, size = (_norm(v, norm) for v in (got[name].double() - value, torchs[name].double() - value, value))
            assert error <= 2 * torch_error + precision * size, f"{name}: {norm}-norm {error:.3g}, PyTorch's {torch_error:.3g}"


def _norm(value: Tensor, norm: float) -> float:
    return torch.linalg.vector_norm(value.double(), norm).item() if value.numel() else 0.0


def run(function, inputs: Inputs, residual: str = "another") -> dict[str, Tensor]:
    """`function(x, weight, bias, residual, dilation, activation)` and its gradients by autograd, one result per name."""
    names = ["x", "weight", "bias"] + ["residual"] * (residual == "another")
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in names}
    other = leaves.get("residual", leaves["x"] if residual == "x itself" else None)
    y = function(leaves["x"], leaves["weight"], leaves["bias"], other, inputs.dilation, inputs.activation)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.grad_y.to(y.dtype))
    return {"y": y.detach(), **{f"grad_{name}": value for name, value in zip(names, gradients, strict=True)}}


# ---- values: the error rule


@each_activation
@pytest.mark.parametrize("problem", SHAPES.values(), ids=SHAPES.keys())
def test_reference_is_the_composition(problem, activation, device):
    inputs = make_inputs(problem, activation, torch.float64, device)

    def by_taps(x, weight, bias, dilation):
        return naive(PlainInputs(x, weight, bias, x, dilation))

    close = dict(rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(reference.causal_conv1d_fused(*schema_order(inputs.forward)), composed(*inputs.forward, by_taps), **close)
    torch.testing.assert_close(
        reference.causal_conv1d_activation_grad(*schema_order(inputs.backward)), composed_grad(*inputs.backward, by_taps), **close
    )


@each_layout
@each_activation
def test_activations(activation, layout, dtype, device, path):
    inputs = make_inputs(SQUARE._replace(c_out=16), activation, dtype, device, x=layout)
    assert_accurate(FUSED, inputs.forward, composed)
    assert_accurate(ACTIVATION_GRAD, inputs.backward, composed_grad)


@each_layout
@of_each_kind
@pytest.mark.parametrize("problem", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(problem, activation, layout, dtype, device, path):
    inputs = make_inputs(problem, activation, dtype, device, x=layout)
    assert_accurate(FUSED, inputs.forward, composed)
    assert_accurate(ACTIVATION_GRAD, inputs.backward, composed_grad)


@each_layout
@of_each_kind
def test_several_blocks(activation, layout, dtype, device, path):
    inputs = make_inputs(LARGE, activation, dtype, device, x=layout)
    assert_accurate(FUSED, inputs.forward, composed)
    assert_accurate(ACTIVATION_GRAD, inputs.backward, composed_grad)


@each_layout
@pytest.mark.parametrize("problem", SHAPES.values(), ids=SHAPES.keys())
def test_shapes_without_an_activation(problem, layout, dtype, device, path):
    """The residual alone, and that of the input-grad."""
    inputs = make_inputs(problem, "none", dtype, device, x=layout)
    assert_accurate(FUSED, inputs.forward, composed)
    residual = randn(tuple(inputs.x.shape), dtype, device, LAYOUTS[layout])
    assert_accurate(INPUT_GRAD, (inputs.grad_y, inputs.weight, inputs.dilation, residual), composed_input_grad)


@pytest.mark.parametrize("bias", [True, False])
@each_activation
def test_without_a_residual(activation, bias, dtype, device, path):
    inputs = make_inputs(MIDDLE, activation, dtype, device, residual="none")
    inputs = inputs if bias else inputs._replace(bias=None)
    assert_accurate(FUSED, inputs.forward, composed)
    assert_accurate(ACTIVATION_GRAD, inputs.backward, composed_grad)


EXTRAS = [
    "channels-first", "channels-last", "channels-first, one element off", "channels-last, one element off",
    "channels-first, slice in time", "channels-last, slice of channels",
    "channels-last, every second channel", "one row for the batch", "one step for all", "one channel for all", "one value for all",
]  # fmt: skip
ODD_X = ["channels-last, one element off", "channels-last, slice of channels", "batch last", "one value for all"]


@of_each_kind
@pytest.mark.parametrize(("x", "extra"), [(x, extra) for x in BOTH for extra in EXTRAS] + [(x, x) for x in ODD_X])
def test_layouts(x, extra, activation, dtype_of_each_size, device, path):
    """Those of the residual, of grad_y and of x; the output's is as the rule has it, whatever those of the others."""
    inputs = make_inputs(MIDDLE._replace(T=7), activation, dtype_of_each_size, device, x, extra)
    results = [assert_accurate(FUSED, inputs.forward, composed), assert_accurate(ACTIVATION_GRAD, inputs.backward, composed_grad)]
    if activation == "gelu":
        args = inputs.x, inputs.weight.mT.contiguous().mT, inputs.dilation, inputs.residual  # a square weight: x is as good a gradient
        results.append(assert_accurate(INPUT_GRAD, args, composed_input_grad))
    for result in results:
        assert result.stride() == layout_rule(inputs.x, result.shape[1])


def layout_rule(x: Tensor, channels: int) -> tuple:
    T = x.shape[2]
    return (T * channels, 1, channels) if x.stride(1) == 1 and x.stride(2) != 1 else (channels * T, T, 1)


@stored_too
@of_each_kind
@pytest.mark.parametrize("extra", [*BOTH, "none"])
@each_layout
def test_layout_where_gradients_are_wanted(layout, extra, activation, problem, device):
    """The same whether the pre-activation is recomputed or stored, and as where none are wanted."""
    others = dict(residual="none") if extra == "none" else dict(extra=extra)
    inputs = make_inputs(problem, activation, torch.float32, device, layout, **others)
    assert public(*inputs.forward).stride() == layout_rule(inputs.x, problem.c_out)
    assert public(inputs.x, inputs.weight.detach().requires_grad_(), *inputs.forward[2:]).stride() == layout_rule(inputs.x, problem.c_out)


@each_activation
def test_far_from_zero(activation, strict_dtype, device, path):
    """Where exponentials overflow: saturated, never NaN. On integers, so that neither convolution errs: a gate would magnify it."""
    inputs = make_inputs(MIDDLE, activation, strict_dtype, device, scale=1000.0)
    inputs = inputs._replace(x=inputs.x.round(), weight=(4 * inputs.weight).round(), bias=inputs.bias.round())
    assert_accurate(FUSED, inputs.forward, composed)
    assert_accurate(ACTIVATION_GRAD, inputs.backward, composed_grad)


@pytest.mark.parametrize("shape", [(2, 16, 0), (0, 16, 0), (0, 16, 5)], ids=str)
@of_each_kind
@each_layout
def test_nothing_to_compute(layout, activation, shape, dtype, device, path):
    inputs = make_inputs(SQUARE._replace(B=shape[0], T=shape[2], c_in=16, c_out=16), activation, dtype, device, layout)
    assert FUSED(*inputs.forward).shape == shape
    assert ACTIVATION_GRAD(*inputs.backward).shape == (shape[0], len(inputs.bias), shape[2])
    results = run(public, inputs)
    assert [results[name].shape for name in ("y", "grad_x", "grad_residual")] == [shape] * 3
    assert not any(results[name].any() for name in ("grad_weight", "grad_bias"))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's word on NaN, in the interpreter
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "none"])
@each_layout
def test_nan_stays_where_it_is(layout, activation, device, path):
    """NaN at time t reaches no output before t, nor another row, and none at t hides it; the input-grad mirrors it."""
    inputs = make_inputs(MIDDLE, activation, torch.float32, device, layout)
    before = FUSED(*inputs.forward)
    for t in (1, 18):
        x = inputs.x.clone()
        x[0, :, t] = float("nan")
        y = FUSED(x, *inputs.forward[1:])
        assert torch.equal(y[0, :, :t], before[0, :, :t])
        assert torch.equal(y[1], before[1])
        assert y[0, :, t].isnan().all()
        grad_p = torch.zeros_like(before).repeat(1, inputs.weight.shape[0] // before.shape[1], 1)
        grad_p[0, :, t] = float("nan")
        grad_x = INPUT_GRAD(grad_p, inputs.weight, inputs.dilation, inputs.x)
        assert torch.equal(grad_x[0, :, t + 1 :], inputs.x[0, :, t + 1 :])
        assert torch.equal(grad_x[1], inputs.x[1])


# ---- derivatives


@stored_too
@each_residual
@each_activation
def test_gradients(activation, residual, problem, dtype, device, path):
    """Of x, weight, bias and residual, by the error rule; the same bits every time."""
    inputs = make_inputs(problem, activation, dtype, device, "channels-last", residual=residual)
    got = run(public, inputs, residual)
    assert_same_bits(run(public, inputs, residual), got)
    assert_within_the_rule(got, run(composed, inputs.map(Tensor.double), residual), run(composed, inputs, residual))


@each_residual
@of_each_kind
def test_backward_is_the_three_gradient_ops(activation, residual, dtype, device, path):
    inputs = make_inputs(SQUARE, activation, dtype, device, residual=residual)
    got = run(FUSED, inputs, residual)
    grad_p = ACTIVATION_GRAD(*inputs.backward)
    grad_x = INPUT_GRAD(grad_p, inputs.weight, inputs.dilation, inputs.grad_y if residual == "x itself" else None)
    grad_weight, grad_bias = WEIGHT_GRAD(grad_p, inputs.x, 3, inputs.dilation)
    assert_same_bits(got, {"y": FUSED(*inputs.forward), "grad_x": grad_x, "grad_weight": grad_weight, "grad_bias": grad_bias})
    assert residual != "another" or torch.equal(got["grad_residual"], inputs.grad_y)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("activation", ["gelu", "none"])
def test_only_the_wanted_gradient(activation, wanted, device, path):
    inputs = make_inputs(SQUARE, activation, torch.float32, device)
    leaf = getattr(inputs, wanted).detach().clone().requires_grad_()
    FUSED(*inputs._replace(**{wanted: leaf}).forward).backward(inputs.grad_y)
    assert torch.equal(leaf.grad, run(FUSED, inputs)[f"grad_{wanted}"])


@interpreter_cannot("fp64, which the kernels lack")
@each_residual
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "none"])
def test_gradcheck_and_gradgradcheck(activation, residual):
    inputs = make_inputs(TINY, activation, torch.float64, torch.device("cpu"), "channels-last", residual=residual)

    def fused(x, weight, bias, other=None):
        return FUSED(x, weight, bias, x if residual == "x itself" else other, inputs.dilation, activation)

    args = [inputs.x, inputs.weight, inputs.bias] + [inputs.residual] * (residual == "another")
    args = [arg.clone().requires_grad_() for arg in args]
    assert torch.autograd.gradcheck(fused, args)
    assert torch.autograd.gradgradcheck(fused, args)


@interpreter_cannot("fp64, which the kernels lack")
@pytest.mark.parametrize("name", [*ACTIVATIONS, "input-grad"])
def test_gradcheck_and_gradgradcheck_of_the_gradient_ops(name):
    inputs = make_inputs(TINY, name, torch.float64, torch.device("cpu"))
    op, args = (ACTIVATION_GRAD, inputs.backward) if name in ACTIVATIONS else (INPUT_GRAD, input_grad_args(inputs))
    args = [arg.clone().requires_grad_() if isinstance(arg, Tensor) else arg for arg in args]
    assert torch.autograd.gradcheck(op, args)
    assert torch.autograd.gradgradcheck(op, args)


def input_grad_args(inputs: Inputs) -> tuple:
    """As many channels in as out."""
    return inputs.grad_y, inputs.weight, inputs.dilation, inputs.residual


# ---- as a part of PyTorch


def schema_order(args: tuple) -> tuple:
    return *args[:4], None, None, *args[4:]


OPCHECKS = {
    "fused": lambda inputs: (FUSED_OP, schema_order(inputs.forward)),
    "fused, x is the residual": lambda inputs: (FUSED_OP, schema_order(inputs._replace(residual=inputs.x).forward)),
    "fused, no bias, no residual": lambda inputs: (FUSED_OP, schema_order(inputs._replace(bias=None, residual=None).forward)),
    "activation_grad": lambda inputs: (ACTIVATION_GRAD_OP, schema_order(inputs.backward)),
    "activation_grad, no bias": lambda inputs: (ACTIVATION_GRAD_OP, schema_order(inputs._replace(bias=None).backward)),
    "input_grad": lambda inputs: (INPUT_GRAD, (inputs.x, inputs.weight[:8], inputs.dilation, inputs.residual)),
}


@pytest.mark.parametrize("what", OPCHECKS.values(), ids=OPCHECKS.keys())
@pytest.mark.parametrize(
    ("layout", "extra", "activation"), [(BOTH[0], BOTH[0], "gelu"), (BOTH[1], BOTH[1], "glu"), (BOTH[1], BOTH[0], "gelu")], ids=str
)
def test_opcheck(layout, extra, activation, what, device):
    """Schema, fake (strides too), autograd registration, and AOT dispatch with static and with dynamic shapes."""
    op, args = what(make_inputs(SQUARE, activation, torch.float32, device, layout, extra))
    leaves = {id(arg): arg.clone().requires_grad_() for arg in args if isinstance(arg, Tensor)}  # x given twice stays one tensor
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, tuple(leaves.get(id(arg), arg) for arg in args), test_utils=tests)


def block_and_gradients(function, block: ResidualCausalBlock, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    names = ["x", *(name for name, _ in block.named_parameters())]
    gradients = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


@pytest.mark.parametrize("activation", ["gelu", "tanh_sigmoid"])
@each_layout
def test_a_block_compiles_once_for_all_sizes(layout, activation, device):
    torch._dynamo.reset()
    block = ResidualCausalBlock(8, 3, dilation=4, activation=activation).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    after_the_first = 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, T in [(2, 17), (3, 21), (5, 5), (2, 34)]:
            x = randn((B, 8, T), torch.float32, device, LAYOUTS[layout])
            got, want = block_and_gradients(compiled, block, x), block_and_gradients(block, block, x)
            assert torch.equal(got["y"], want["y"])
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # AOT autograd hands over grad_y in a layout of its own
            after_the_first = after_the_first or counter.frame_count
    assert counter.frame_count == after_the_first


@pytest.mark.parametrize("K", [3, pytest.param(256, marks=interpreter_cannot("in little time"))], ids=["recomputed", "stored"])
def test_activation_checkpointing(K, device, path):
    block = ResidualCausalBlock(8, K, activation="silu").to(device)
    x = torch.randn(2, 8, 11, device=device)
    got = block_and_gradients(lambda x: checkpoint(block, x, use_reentrant=False), block, x)
    assert_same_bits(got, block_and_gradients(block, block, x))


def _loss(f):
    return lambda *args: f(*args).pow(3).sum()


TRANSFORMS = {  # f(x, weight, bias, residual), at stacks of two
    "vmap": lambda f: vmap(f),
    "vmap x": lambda f: lambda x, w, b, r: vmap(lambda x: f(x, w[0], b[0], r[0]))(x),
    "vmap residual": lambda f: lambda x, w, b, r: vmap(lambda r: f(x[0], w[0], b[0], r))(r),
    "vmap x, which is the residual": lambda f: lambda x, w, b, r: vmap(lambda x: f(x, w[0], b[0], x))(x),
    "grad": lambda f: lambda *stacks: grad(_loss(f), (0, 1, 2, 3))(*(stack[0] for stack in stacks)),
    "grad of grad": lambda f: (
        lambda *stacks: grad(lambda *args: sum(g.pow(2).sum() for g in grad(_loss(f), (0, 1, 2, 3))(*args)), (0, 1, 2, 3))(
            *(stack[0] for stack in stacks)
        )
    ),
    "grad, x being the residual": lambda f: lambda x, w, b, r: grad(lambda x: _loss(f)(x, w[0], b[0], x))(x[0]),
    "gradients per sample": lambda f: lambda x, w, b, r: vmap(grad(_loss(f), (1, 2)), (0, None, None, 0))(x, w[0], b[0], r),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@each_activation
def test_functional_transforms(activation, transform, strict_dtype, device):
    several = [make_inputs(TINY, activation, strict_dtype, device, layout) for layout in BOTH]
    stacks = [torch.stack(values) for values in zip(*(inputs[:4] for inputs in several), strict=True)]
    got, want = (transform(lambda *args, f=f: f(*args, TINY.d, activation))(*stacks) for f in (public, composed))
    torch.testing.assert_close(got, want, **(dict(rtol=1e-4, atol=1e-4) if strict_dtype == torch.float32 else {}))


@interpreter_cannot("it would take part in nothing that the plain run lacks")
@each_activation
def test_functional_transforms_of_the_gradient_ops(activation):
    """Each against the same written with autograd's own."""
    inputs = make_inputs(TINY, activation, torch.float64, torch.device("cpu"))
    rest = inputs.dilation, activation

    def by_vjp(grad_y, x, weight, bias):
        return torch.func.vjp(ACTIVATIONS[activation], conv1d(x, weight, bias, inputs.dilation))[1](grad_y)[0]

    args = inputs.backward[:4]
    stacks = [torch.stack([arg, arg.flip(-1)]) for arg in args]
    for transform in (vmap, lambda f: lambda *stacks: grad(_loss(f), (0, 1, 2, 3))(*(stack[0] for stack in stacks))):
        got, want = (transform(f)(*stacks) for f in (lambda *args: ACTIVATION_GRAD(*args, *rest), by_vjp))
        torch.testing.assert_close(got, want)
    if activation not in GATES:
        grad_y, weight, dilation, residual = input_grad_args(inputs)
        got = vmap(lambda residual: INPUT_GRAD(grad_y, weight, dilation, residual))(torch.stack([residual, 2 * residual]))
        torch.testing.assert_close(got, INPUT_GRAD(grad_y, weight, dilation) + torch.stack([residual, 2 * residual]))


@pytest.mark.parametrize(
    "op", ["fused", "fused, x is the residual", "fused by its residual", "activation_grad", "input_grad by its residual"]
)
def test_forward_mode_is_refused(op, device):
    """A clear error: never a silent zero."""
    inputs = make_inputs(SQUARE, "gelu", torch.float32, device)
    f = {
        "fused": lambda x: FUSED(x, *inputs.forward[1:]),
        "fused, x is the residual": lambda x: FUSED(x, inputs.weight, None, x, 2, "gelu"),
        "fused by its residual": lambda r: FUSED(*inputs.forward[:3], r, 2, "gelu"),
        "activation_grad": lambda x: ACTIVATION_GRAD(inputs.grad_y, x, *inputs.backward[2:]),
        "input_grad by its residual": lambda r: INPUT_GRAD(inputs.grad_y, inputs.weight, 2, r),
    }[op]
    with pytest.raises(NotImplementedError, match="forward-mode"), torch.autograd.forward_ad.dual_level():
        f(torch.autograd.forward_ad.make_dual(inputs.x, torch.ones_like(inputs.x)))
    if op != "fused by its residual":  # in steps under torch.func, where that of a sum is right
        with pytest.raises(NotImplementedError, match="forward-mode"):
            jvp(f, (inputs.x,), (torch.ones_like(inputs.x),))


# ---- what is saved


def saved_by(function, *args) -> tuple[Tensor, list[Tensor]]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda value: value):
        y = function(*args)
    return y, saved


def of_size(saved: list[Tensor], *sizes: int) -> list[Tensor]:
    """Those of activations; the parameters are smaller."""
    return [value for value in saved if value.numel() in sizes]


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@each_activation
def test_a_block_saves_its_input_alone(activation, autocast, device):
    block = ResidualCausalBlock(16, 3, activation=activation).to(device)
    x = torch.randn(7, 16, 97, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=HALF, enabled=autocast):
        y, saved = saved_by(block, x)
    (kept,) = of_size(saved, x.numel(), 2 * x.numel())
    assert torch.equal(kept, x.to(y.dtype))
    assert all(value.numel() < x.numel() for value in saved if value is not kept)


@interpreter_cannot("in little time; the plain run covers it")
@each_activation
def test_the_rule_for_storing_the_pre_activation(activation, device):
    """From C_in * K = 2,048 on."""
    for problem, stored in ((RECOMPUTED, False), (STORED, True)):
        inputs = make_inputs(problem._replace(B=67, T=71), activation, torch.float32, device)
        weight = inputs.weight.detach().requires_grad_()
        _, saved = saved_by(public, inputs.x, weight, *inputs.forward[2:])
        p = causal_conv1d(inputs.x, inputs.weight, inputs.bias, dilation=inputs.dilation)
        halves = (p, *p.chunk(2, 1)) if activation in GATES else (p,)
        kept = [value for value in saved if any(value.shape == part.shape and torch.equal(value, part) for part in halves)]
        if activation not in ("relu", "tanh_sigmoid"):  # which keep their result, as PyTorch's do
            assert bool(kept) == stored
        assert (len(of_size(saved, inputs.x.numel(), 2 * inputs.x.numel())) > 1) == stored


# ---- autocast


@stored_too
@each_residual
@of_each_kind
def test_autocast(activation, residual, problem, device):
    """Everything in the autocast dtype, the gradients in those of the leaves; numbers as those of tensors cast by hand."""
    inputs = make_inputs(problem, activation, torch.float32, device, residual=residual)

    def cast(*args):
        with torch.autocast(device.type, dtype=HALF):
            return public(*args)

    got, want = run(cast, inputs, residual), run(public, inputs.map(lambda value: value.to(HALF)), residual)
    assert got["y"].dtype == HALF
    for name, value in got.items():
        assert name == "y" or value.dtype == torch.float32
        assert torch.equal(value, want[name].to(value.dtype)), name


@pytest.mark.parametrize("transform", [lambda loss: grad(loss), lambda loss: vmap(grad(loss), (0, None))], ids=["grad", "per sample"])
def test_functional_transforms_under_autocast(transform, device):
    inputs = make_inputs(SQUARE, "silu", torch.float32, device)

    def run_with(f):
        def loss(x, weight):
            x = x if x.dim() == 3 else x[None]
            return f(x, weight, inputs.bias, x, inputs.dilation, "silu").float().square().sum()

        return transform(loss)(inputs.x, inputs.weight)

    with torch.autocast(device.type, dtype=HALF):
        got, want = run_with(public), run_with(composed)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * want.abs().max().item())


# ---- errors

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


def test_results_may_be_changed_in_place(device):
    x, weight = torch.randn(2, 8, 9, device=device, requires_grad=True), torch.randn(8, 8, 3, device=device, requires_grad=True)
    y = FUSED(x, weight, None, x, 1, "silu")
    y.relu_().sum().backward()
    assert x.grad is not None


def test_nothing_fused_is_the_plain_op(device):
    """`activation=None, residual=None` is the plain op to the bit, and so is the fused op told to do nothing."""
    inputs = make_inputs(SQUARE, "none", torch.float32, device, residual="none")
    want = torch.ops.fuzzytok.causal_conv1d(*inputs.forward[:3], inputs.dilation)
    assert torch.equal(causal_conv1d(*inputs.forward[:3], dilation=inputs.dilation), want)
    assert torch.equal(FUSED(*inputs.forward), want)
