"""Derivatives, autocast and the functional transforms: each the same as F.conv1d's."""

import functools

import pytest
import torch
from modes import HALF, INTERPRETED, KERNELS_RUN, interpreter_cannot, needs_cuda
from oracle import LAYOUTS, OPS, Problem, assert_same_bits, conv1d, make_inputs, ours, randn, with_gradients
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import fuzzytok_kernels

causal_conv1d = OPS["causal_conv1d"]
SMALL = Problem(B=2, c_in=3, c_out=4, T=7, K=3, d=2)
BOTH = ["channels-first", "channels-last"]
each_op = pytest.mark.parametrize("op", OPS)
each_layout = pytest.mark.parametrize("layout", BOTH)


@pytest.mark.parametrize("bias", [True, False])
@each_layout
@each_op
def test_opcheck(op, layout, bias, device, path):
    """Schema, fake (strides too), autograd registration, and AOT dispatch with static and with dynamic shapes."""
    inputs = make_inputs(SMALL._replace(c_in=8, c_out=16), torch.float32, device, x=layout, grad_y=layout, bias=bias)
    args = tuple(arg.clone().requires_grad_() if isinstance(arg, torch.Tensor) else arg for arg in inputs.args(op))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS[op], args, test_utils=tests)


@interpreter_cannot("fp64, which the kernels lack")
@each_layout
@each_op
def test_gradcheck_and_gradgradcheck(op, layout):
    """In fp64 on the CPU, whatever the mode."""
    inputs = make_inputs(SMALL, torch.float64, torch.device("cpu"), x=layout, grad_y=layout)
    args = tuple(arg.clone().requires_grad_() if isinstance(arg, torch.Tensor) else arg for arg in inputs.args(op))
    assert torch.autograd.gradcheck(OPS[op], args)
    assert torch.autograd.gradgradcheck(OPS[op], args)


@each_layout
def test_backward_is_the_two_gradient_ops(layout, dtype, device, path):
    inputs = make_inputs(SMALL._replace(c_in=8, c_out=16), dtype, device, x=layout, grad_y=layout)
    assert_same_bits(with_gradients(causal_conv1d, inputs), ours(inputs))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_the_wanted_gradients(wanted, device, path):
    inputs = make_inputs(SMALL, torch.float32, device)
    every, leaves = with_gradients(causal_conv1d, inputs), [value.detach().clone() for value in inputs[:3]]
    for i in wanted:
        leaves[i].requires_grad_()
    causal_conv1d(*leaves, inputs.dilation).backward(inputs.grad_y)
    for i, name in enumerate(("grad_x", "grad_weight", "grad_bias")):
        assert (leaves[i].grad is None) == (i not in wanted)
        assert i not in wanted or torch.equal(leaves[i].grad, every[name])


@each_layout
def test_gradient_of_a_sum(layout, dtype, device, path):
    """`y.sum().backward()` hands the ops a gradient of zero strides."""
    inputs = make_inputs(SMALL._replace(c_in=8, c_out=16), dtype, device, x=layout)
    x = inputs.x.clone().requires_grad_()
    causal_conv1d(x, inputs.weight, inputs.bias, inputs.dilation).sum().backward()
    ones = torch.ones_like(inputs.grad_y[:1, :1, :1]).expand_as(inputs.grad_y)
    assert torch.equal(x.grad, ours(inputs._replace(grad_y=ones))["grad_x"])


def test_no_graph_without_a_wish(device):
    inputs = make_inputs(SMALL, torch.float32, device)
    weight = inputs.weight.clone().requires_grad_()
    assert not causal_conv1d(inputs.x, inputs.weight).requires_grad
    assert causal_conv1d(inputs.x, weight).requires_grad
    with torch.no_grad():
        assert not causal_conv1d(inputs.x, weight).requires_grad
    with torch.inference_mode():
        assert torch.equal(causal_conv1d(inputs.x, weight), causal_conv1d(inputs.x, inputs.weight))


# ---- torch.func: f(x, weight, bias) -> y, ours and F.conv1d's


def _loss(f):
    return lambda *args: f(*args).pow(3).sum()


def _vmap(in_dims: tuple, out_dims: int = 0):
    """vmap over `in_dims` of the stacked arguments; what is not mapped is the first of the stack."""

    def transform(f):
        def mapped(*stacks):
            args = [stack[0] if dim is None else stack.movedim(0, dim) for stack, dim in zip(stacks, in_dims, strict=True)]
            return vmap(f, in_dims, out_dims)(*args)

        return mapped

    return transform


def _first(transform):
    """A transform of f at the first of each stack."""
    return lambda f: lambda *stacks: transform(f)(*(stack[0] for stack in stacks))


TRANSFORMS = {
    "vmap x": _vmap((0, None, None)),
    "vmap x, last dimension, out too": _vmap((3, None, None), 2),
    "vmap weight": _vmap((None, 1, None)),
    "vmap bias": _vmap((None, None, 0)),
    "vmap x and weight": _vmap((0, 2, None)),
    "vmap all": _vmap((1, 0, 1)),
    "vmap vmap": lambda f: lambda x, w, b: vmap(lambda weight: vmap(lambda row: f(row, weight, b[0]))(x))(w),
    "grad": _first(lambda f: grad(_loss(f), (0, 1, 2))),
    "grad of grad": _first(lambda f: grad(lambda *args: sum(g.pow(2).sum() for g in grad(_loss(f), (0, 1, 2))(*args)), (0, 1, 2))),
    "jacrev": _first(lambda f: jacrev(f, (0, 1, 2))),
    "jacrev of jacrev": _first(lambda f: jacrev(jacrev(_loss(f), 1), 0)),
    "gradients per sample": lambda f: lambda x, w, b: vmap(grad(_loss(f), (1, 2)), (0, None, None))(x, w[0], b[0]),
    "gradients per model": lambda f: vmap(grad(_loss(f), (0, 1, 2))),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@each_layout
def test_functional_transforms(transform, layout, strict_dtype, device):
    stacks = (
        torch.stack([randn((1, 2, 4), strict_dtype, device, LAYOUTS[layout]) for _ in range(2)]),
        torch.randn(2, 3, 2, 2, dtype=strict_dtype, device=device),
        torch.randn(2, 3, dtype=strict_dtype, device=device),
    )
    got, want = (transform(lambda x, w, b, f=f: f(x, w, b, 2))(*stacks) for f in (causal_conv1d, conv1d))
    tolerance = dict(rtol=1e-4, atol=1e-4) if strict_dtype == torch.float32 else {}
    torch.testing.assert_close(got, want, **tolerance)


def _by_autograd(result: str):
    """A gradient op written with F.conv1d and torch.func: (x, weight, grad_y) -> result."""

    def gradient(x, weight, grad_y):
        _, pullback = torch.func.vjp(lambda x, weight: conv1d(x, weight, None, 2), x, weight)
        return pullback(grad_y)[("grad_x", "grad_weight").index(result)]

    return gradient


GRADIENT_OPS = {  # (x, weight, grad_y) -> result, ours and PyTorch's
    "input_grad": (lambda x, w, dy: OPS["causal_conv1d_input_grad"](dy, w, 2), _by_autograd("grad_x")),
    "weight_grad": (lambda x, w, dy: OPS["causal_conv1d_weight_grad"](dy, x, 2, 2)[0], _by_autograd("grad_weight")),
    "bias_grad": (lambda x, w, dy: OPS["causal_conv1d_weight_grad"](dy, x, 2, 2)[1], lambda x, w, dy: dy.sum((0, 2))),
}
OF_GRADIENTS = ["vmap x", "vmap weight", "vmap bias", "vmap all", "grad", "jacrev", "gradients per model"]


@pytest.mark.parametrize("transform", OF_GRADIENTS)
@pytest.mark.parametrize("name", GRADIENT_OPS)
def test_functional_transforms_of_the_gradient_ops(name, transform, strict_dtype, device):
    """Their third argument, where the forward has its bias, is grad_y."""
    draw = functools.partial(torch.randn, dtype=strict_dtype, device=device)
    stacks = (draw(2, 2, 2, 5), draw(2, 3, 2, 2), draw(2, 2, 3, 5))
    got, want = (TRANSFORMS[transform](f)(*stacks) for f in GRADIENT_OPS[name])
    tolerance = dict(rtol=1e-4, atol=1e-4) if strict_dtype == torch.float32 else {}
    torch.testing.assert_close(got, want, **tolerance)


def _dual(f, x):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


FORWARD_MODE = {
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(lambda x: f(x).sum())(x),
    "dual numbers": _dual,
    "vmap of jvp": lambda f, x: vmap(lambda row: jvp(f, (row,), (row,)))(x[None]),
}


@pytest.mark.parametrize("mode", FORWARD_MODE.values(), ids=FORWARD_MODE.keys())
@each_op
def test_forward_mode_is_refused(op, mode, device):
    """A clear error: never a silent zero."""
    first, *rest = make_inputs(SMALL, torch.float32, device).args(op)

    def f(value):
        result = OPS[op](value, *rest)
        return result[0] if isinstance(result, tuple) else result

    with pytest.raises(NotImplementedError, match="forward-mode"):
        mode(f, first)


# ---- autocast

DTYPES_IN = {  # of x, weight and bias
    "fp32": (torch.float32,) * 3,
    "half": (HALF,) * 3,
    "mixed": (HALF, torch.float32, torch.float32),
    "mixed the other way": (torch.float32, HALF, torch.float32),
    **({} if KERNELS_RUN else {"fp64": (torch.float64,) * 3}),
}
AUTOCAST_DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("autocast_dtype", AUTOCAST_DTYPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES_IN.values(), ids=DTYPES_IN.keys())
def test_autocast(dtypes, autocast_dtype, inside, device):
    """Dtypes as F.conv1d's; numbers as those of the op on tensors cast by hand."""
    inputs = make_inputs(SMALL, torch.float32, device)
    values = [value.to(dtype) for value, dtype in zip(inputs[:3], dtypes, strict=True)]
    autocast = functools.partial(torch.autocast, device.type, dtype=autocast_dtype)

    def run(f) -> list[torch.Tensor]:
        leaves = [value.clone().requires_grad_() for value in values]
        with autocast():
            y = f(*leaves, inputs.dilation)
        with autocast(enabled=inside):
            gradients = torch.autograd.grad(y, leaves, inputs.grad_y.to(y.dtype))
        return [y.detach(), *gradients]

    cast = dtypes[0] if dtypes[0] == torch.float64 else autocast_dtype
    by_hand = inputs._replace(**{name: value.to(cast) for name, value in zip(("x", "weight", "bias"), values, strict=True)})
    want = with_gradients(causal_conv1d, by_hand._replace(grad_y=inputs.grad_y.to(cast)))
    got, torchs = run(causal_conv1d), run(conv1d)
    assert [value.dtype for value in got] == [value.dtype for value in torchs]
    for value, wanted in zip(got, want.values(), strict=True):
        assert torch.equal(value, wanted.to(value.dtype))


def test_autocast_off_inside_autocast(device):
    inputs = make_inputs(SMALL, torch.float32, device)
    with torch.autocast(device.type, dtype=HALF), torch.autocast(device.type, enabled=False):
        y = causal_conv1d(*inputs.args("causal_conv1d"))
    assert torch.equal(y, causal_conv1d(*inputs.args("causal_conv1d")))
    assert y.dtype == torch.float32


def test_autocast_leaves_the_gradient_ops_alone(device):
    """Called by themselves they keep their dtype, as PyTorch's convolution_backward does."""
    inputs = make_inputs(SMALL, torch.float32, device)
    want = ours(inputs)
    with torch.autocast(device.type, dtype=HALF):
        got = ours(inputs)
    assert_same_bits(got, {name: want[name] for name in ("grad_x", "grad_weight", "grad_bias")})
    assert got["y"].dtype == HALF


@needs_cuda
def test_autocast_of_another_device(device):
    inputs = make_inputs(SMALL, torch.float32, device)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert causal_conv1d(*inputs.args("causal_conv1d")).dtype == torch.float32


# ---- the public function


def test_public_function_is_the_op(dtype, device, path):
    x, weight, bias, _, dilation = make_inputs(SMALL, dtype, device)
    assert torch.equal(fuzzytok_kernels.causal_conv1d(x, weight, bias, dilation=dilation), causal_conv1d(x, weight, bias, dilation))
    assert torch.equal(fuzzytok_kernels.causal_conv1d(x, weight), causal_conv1d(x, weight, None, 1))


def test_results_may_be_changed_in_place(device):
    """As those of F.conv1d may: nn.ReLU(inplace=True) behind a convolution trains, and so does a gradient of a gradient."""
    x, weight = torch.randn(2, 8, 9, device=device, requires_grad=True), torch.randn(8, 8, 3, device=device, requires_grad=True)
    y = OPS["causal_conv1d"](x, weight, None, 1)
    (grad_weight,) = torch.autograd.grad(y.relu_().square().sum(), weight, create_graph=True)
    grad_weight.mul_(2).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("transform", ["grad", "grad of grad", "per sample"])
def test_functional_transforms_under_autocast(transform, device):
    x, weight = torch.randn(4, 3, 9, device=device), torch.randn(5, 3, 2, device=device)

    def run(f):
        def loss(weight, x):
            return f(x if x.dim() == 3 else x[None], weight, None, 2).float().square().sum()

        if transform == "grad":
            return torch.func.grad(loss)(weight, x)
        if transform == "per sample":
            return torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
        return torch.func.grad(lambda weight, x: torch.func.grad(loss)(weight, x).square().sum())(weight, x)

    with torch.autocast(device.type, dtype=HALF):
        got, want = run(OPS["causal_conv1d"]), run(conv1d)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * want.abs().max().item())
