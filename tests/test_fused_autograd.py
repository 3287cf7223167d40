"""The fused convolution as a part of PyTorch: derivatives, transforms, compilation, what is saved, autocast."""

import pytest
import torch
from fused_oracle import (
    ACTIVATION_GRAD,
    ACTIVATION_GRAD_OP,
    ACTIVATIONS,
    BOTH,
    FUSED,
    FUSED_OP,
    GATES,
    INPUT_GRAD,
    RECOMPUTED,
    SQUARE,
    STORED,
    WEIGHT_GRAD,
    Inputs,
    assert_within_the_rule,
    composed,
    each_activation,
    each_layout,
    make_inputs,
    of_each_kind,
    public,
    run,
    schema_order,
    stored_too,
)
from modes import HALF, interpreter_cannot
from oracle import LAYOUTS, Problem, assert_same_bits, conv1d, randn
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from fuzzytok_kernels import ResidualCausalBlock, causal_conv1d

RESIDUALS = ["x itself", "another", "none"]
TINY = Problem(B=2, c_in=2, c_out=2, T=4, K=2, d=2)

each_residual = pytest.mark.parametrize("residual", RESIDUALS)


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


def test_results_may_be_changed_in_place(device):
    x, weight = torch.randn(2, 8, 9, device=device, requires_grad=True), torch.randn(8, 8, 3, device=device, requires_grad=True)
    y = FUSED(x, weight, None, x, 1, "silu")
    y.relu_().sum().backward()
    assert x.grad is not None


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
