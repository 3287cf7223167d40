"""What the three ops compute: the error rule over shapes and layouts, determinism, causality."""

import pytest
import torch
from modes import KERNELS_RUN, interpreter_cannot, needs_cuda
from oracle import (
    LAYOUTS,
    OPS,
    WEIGHT_LAYOUTS,
    Inputs,
    Problem,
    assert_accurate,
    assert_same_bits,
    exact,
    make_inputs,
    naive,
    ours,
    poisoned,
    with_gradients,
)

from fuzzytok_kernels.layout import empty_output

SHAPES = {
    "one block": Problem(B=2, c_in=16, c_out=16, T=64, K=3, d=2),
    "several blocks of time": Problem(B=2, c_in=24, c_out=16, T=141, K=3, d=4),
    "several blocks of channels": Problem(B=1, c_in=136, c_out=152, T=21, K=2, d=4),
    "one step": Problem(B=3, c_in=16, c_out=24, T=1, K=3, d=4),
    "T below the history": Problem(B=2, c_in=16, c_out=24, T=5, K=3, d=4),
    "T equal to the history": Problem(B=2, c_in=16, c_out=16, T=8, K=3, d=4),
    "every tap but the present before 0": Problem(B=2, c_in=16, c_out=16, T=7, K=3, d=1000),
    "primes": Problem(B=3, c_in=7, c_out=13, T=37, K=3, d=5),
    "one channel": Problem(B=2, c_in=1, c_out=1, T=67, K=3, d=3),
    "one channel in": Problem(B=2, c_in=1, c_out=16, T=33, K=3, d=2),
    "one channel out": Problem(B=2, c_in=16, c_out=1, T=33, K=3, d=2),
    "5 channels to 6": Problem(B=2, c_in=5, c_out=6, T=41, K=2, d=7),
    "one row": Problem(B=1, c_in=16, c_out=32, T=33, K=2, d=1),
    "many rows": Problem(B=67, c_in=8, c_out=8, T=3, K=2, d=1),
    **{f"K={K}": Problem(B=2, c_in=16, c_out=24, T=45, K=K, d=3) for K in range(1, 8)},
    "no rows": Problem(B=0, c_in=16, c_out=24, T=9, K=3, d=2),
}
LONG = {  # more blocks than the interpreter would finish
    "long": Problem(B=4, c_in=256, c_out=192, T=2053, K=3, d=16),
    "narrow and long": Problem(B=3, c_in=8, c_out=32, T=65_543, K=3, d=512),
}
WIDE = {  # a size above 65,535, the limit of a grid's second and third axis
    "c_in": Problem(B=1, c_in=65_544, c_out=8, T=5, K=2, d=1),
    "c_out": Problem(B=1, c_in=8, c_out=65_544, T=5, K=2, d=1),
    "c_in and no alignment": Problem(B=1, c_in=65_537, c_out=1, T=5, K=2, d=1),
    "c_out and no alignment": Problem(B=1, c_in=1, c_out=65_537, T=5, K=2, d=1),
}
WIDE_BATCH = {
    "B": Problem(B=65_543, c_in=8, c_out=8, T=3, K=2, d=1),
    "B and no alignment": Problem(B=65_537, c_in=1, c_out=3, T=1, K=2, d=1),
}
MIDDLE = Problem(B=2, c_in=16, c_out=24, T=37, K=3, d=4)
BOTH = ["channels-first", "channels-last"]


def table(shapes: dict) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("problem", shapes.values(), ids=shapes.keys())


@table(SHAPES)
def test_reference_is_equations_2_and_3(problem, device):
    inputs = make_inputs(problem, torch.float64, device)
    for name, value in with_gradients(lambda x, w, b, d: naive(Inputs(x, w, b, x, d)), inputs).items():
        torch.testing.assert_close(exact(inputs)[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", BOTH)
@table(SHAPES)
def test_shapes(problem, layout, dtype, device, path):
    assert_accurate(make_inputs(problem, dtype, device, x=layout, grad_y=layout))


@needs_cuda
@pytest.mark.parametrize("layout", BOTH)
@table(LONG)
def test_long(problem, layout, dtype, device, path):
    assert_accurate(make_inputs(problem, dtype, device, x=layout, grad_y=layout))


@interpreter_cannot("its grids have no limits, and this takes it minutes")
@table(WIDE)
def test_more_than_65535_channels(problem, device, path):
    assert_accurate(make_inputs(problem, torch.float16 if KERNELS_RUN else torch.float32, device, "channels-last", "channels-last"))


@interpreter_cannot("its grids have no limits, and this takes it minutes")
@table(WIDE_BATCH)
def test_more_than_65535_rows(problem, device, path):
    assert_accurate(make_inputs(problem, torch.float16 if KERNELS_RUN else torch.float32, device))


@pytest.mark.parametrize("d", [2**31 - 1, 2**40])
@pytest.mark.parametrize("layout", BOTH)
def test_taps_beyond_32_bits(layout, d, device, path):
    """Only tap 0 is left: the ops with K=4 are those with K=1."""
    inputs = make_inputs(MIDDLE._replace(K=4, d=d), torch.float16, device, x=layout, grad_y=layout)
    got, want = ours(inputs), ours(inputs._replace(weight=inputs.weight[:, :, :1], dilation=1))
    want["grad_weight"] = torch.nn.functional.pad(want["grad_weight"], (0, 3))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("bias", [True, False])
def test_without_bias(bias, dtype, device, path):
    inputs = make_inputs(MIDDLE, dtype, device, bias=bias)
    got = assert_accurate(inputs)["y"]
    assert torch.equal(got, ours(inputs._replace(bias=torch.zeros(24, dtype=dtype, device=device)))["y"]) is not bias


@pytest.mark.parametrize("shape", [(2, 16, 0), (0, 16, 0), (0, 16, 5)], ids=str)
@pytest.mark.parametrize("layout", BOTH)
def test_nothing_to_compute(shape, layout, dtype, device, path):
    """PyTorch's own convolution refuses T = 0, so that the error rule has no say here."""
    B, _, T = shape
    inputs = make_inputs(Problem(B, 16, 24, T, 3, 2), dtype, device, x=layout, grad_y=layout)
    for results in (ours(inputs), with_gradients(OPS["causal_conv1d"], inputs)):
        assert (results["y"].shape, results["grad_x"].shape) == ((B, 24, T), (B, 16, T))
        assert_same_bits(results, {"grad_weight": torch.zeros_like(inputs.weight), "grad_bias": torch.zeros_like(inputs.bias)})


# ---- layouts

MIXED = [("channels-first", "channels-last"), ("channels-last", "channels-first"), ("channels-last", "one value for all")]


@pytest.mark.parametrize(("x", "grad_y"), [(layout, layout) for layout in LAYOUTS] + MIXED)
def test_layouts(x, grad_y, dtype_of_each_size, device, path):
    assert_accurate(make_inputs(MIDDLE, dtype_of_each_size, device, x=x, grad_y=grad_y))


@pytest.mark.parametrize("weight", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("layout", BOTH)
def test_weight_layouts(layout, weight, dtype_of_each_size, device, path):
    assert_accurate(make_inputs(MIDDLE, dtype_of_each_size, device, x=layout, grad_y=layout, weight=weight))


def test_bias_layouts(dtype, device, path):
    inputs = make_inputs(MIDDLE, dtype, device)
    table = torch.randn(2, 48, device=device).to(dtype)
    for bias in (table[1, ::2], table[:, :24].mT[:, 1], inputs.bias[:1].expand(24)):
        assert_accurate(inputs._replace(bias=bias))


# ---- the same bits


def test_poison(dtype, device):
    """The other tests lean on it: inside `poisoned`, fresh memory is full of NaN."""
    with poisoned():
        assert torch.empty(5, 3, dtype=dtype, device=device).isnan().all()
        assert empty_output(torch.zeros(2, 7, 3, dtype=dtype, device=device).mT, 4).isnan().all()


@pytest.mark.parametrize("layout", BOTH)
def test_same_bits_on_every_call(layout, dtype, device, path):
    """Also where fresh memory is not poisoned: nothing is read before it is written."""
    inputs = make_inputs(MIDDLE._replace(T=141), dtype, device, x=layout, grad_y=layout)
    first = ours(inputs)
    for _ in range(3):
        assert_same_bits(ours(inputs), first)
    for name, op in OPS.items():
        for got, want in zip(_tuple(op(*inputs.args(name))), _tuple(first[_RESULT[name]]), strict=False):
            assert torch.equal(got, want), name


_RESULT = {"causal_conv1d": "y", "causal_conv1d_input_grad": "grad_x", "causal_conv1d_weight_grad": "grad_weight"}


def _tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


# ---- causality

CUTS = [1, 4, 17, 36]


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # NumPy's word on Inf, in the interpreter
@pytest.mark.parametrize("future", ["other values", "NaN", "Inf"])
def test_causality_by_perturbation(future, layout, dtype, device, path):
    """What changes from time t on changes no bit of y before t, nor of another row; it does change y at t. The input-grad mirrors it."""
    inputs = make_inputs(MIDDLE, dtype, device, x=layout, grad_y=layout)
    before = ours(inputs)
    for t in CUTS:
        value = {"other values": 3.0, "NaN": float("nan"), "Inf": float("inf")}[future]
        x, grad_y = inputs.x.clone(), inputs.grad_y.clone()
        x[0, :, t:] = value
        grad_y[0, :, :t] = value
        y = OPS["causal_conv1d"](x, *inputs.args("causal_conv1d")[1:])
        grad_x = OPS["causal_conv1d_input_grad"](grad_y, *inputs.args("causal_conv1d_input_grad")[1:])
        assert torch.equal(y[0, :, :t], before["y"][0, :, :t])
        assert torch.equal(grad_x[0, :, t:], before["grad_x"][0, :, t:])
        assert torch.equal(y[1], before["y"][1])
        assert torch.equal(grad_x[1], before["grad_x"][1])
        assert (y[0, :, t] != before["y"][0, :, t]).all()
        assert (grad_x[0, :, t - 1] != before["grad_x"][0, :, t - 1]).all()


@pytest.mark.parametrize("layout", BOTH)
def test_causality_by_gradient(layout, device, path):
    """The gradient of y at time t reaches x at t, t - d, t - 2d, and is exactly zero everywhere else."""
    inputs = make_inputs(MIDDLE, torch.float32, device, x=layout)
    x = inputs.x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = OPS["causal_conv1d"](x, inputs.weight, inputs.bias, inputs.dilation)
    for t in (0, 3, 4, 11, 36):
        (grad_x,) = torch.autograd.grad(y[1, :, t].sum(), x, retain_graph=True)
        reached = {tuple(index) for index in grad_x.any(1).nonzero().tolist()}
        assert reached == {(1, t - k * inputs.dilation) for k in range(3) if t - k * inputs.dilation >= 0}
