"""The fused convolution, `residual + activation(conv(x))`, and its gradient ops: values, layouts, what NaN reaches."""

import pytest
import torch
from fused_oracle import (
    ACTIVATION_GRAD,
    ACTIVATIONS,
    BOTH,
    FUSED,
    INPUT_GRAD,
    SQUARE,
    assert_accurate,
    composed,
    composed_grad,
    composed_input_grad,
    each_activation,
    each_layout,
    make_inputs,
    of_each_kind,
    public,
    run,
    schema_order,
    stored_too,
)
from oracle import LAYOUTS, Problem, naive, randn
from oracle import Inputs as PlainInputs
from torch import Tensor

from fuzzytok_kernels import causal_conv1d, reference

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


def test_nothing_fused_is_the_plain_op(device):
    """`activation=None, residual=None` is the plain op to the bit, and so is the fused op told to do nothing."""
    inputs = make_inputs(SQUARE, "none", torch.float32, device, residual="none")
    want = torch.ops.fuzzytok.causal_conv1d(*inputs.forward[:3], inputs.dilation)
    assert torch.equal(causal_conv1d(*inputs.forward[:3], dilation=inputs.dilation), want)
    assert torch.equal(FUSED(*inputs.forward), want)
