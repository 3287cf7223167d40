"""The activations of the fused block on fp32 values in registers, and their derivatives.

An epilogue is bound by the instructions that it issues (31 an element cost 18 us at C=256, B*T=65,536 on an H100, beside the product's
42). So a reciprocal is the square of rsqrt, two instructions where an exact quotient takes eight, and off by 4e-7 of itself at most; and
exact GELU takes its normal distribution from Abramowitz and Stegun, formula 7.1.26: off by less than 1.5e-7, with one exponential, which
the derivative shares.
"""

import triton
import triton.language as tl


@triton.jit
def activate(p, ACTIVATION: tl.constexpr):
    """The activation of the pre-activation p, for one that is no gate."""
    if ACTIVATION == "none":
        return p
    elif ACTIVATION == "relu":
        return tl.where(p < 0, 0.0, p)  # NaN stays
    elif ACTIVATION == "silu":
        return p * _sigmoid(p)
    elif ACTIVATION == "gelu":
        beyond, _ = _normal(p)
        return tl.maximum(p, 0.0) - tl.abs(p) * beyond  # NaN at infinity, as PyTorch's
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        return p * _sigmoid(_tanh_argument(p))


@triton.jit
def derivative(p, ACTIVATION: tl.constexpr):
    """d activate(p) / dp."""
    if ACTIVATION == "relu":
        return tl.where(p <= 0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s, rest = _sigmoids(p)
        return s + p * s * rest
    elif ACTIVATION == "gelu":
        beyond, density = _normal(p)
        return tl.where(p < 0, beyond, 1 - beyond) + p * density
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        s, rest = _sigmoids(_tanh_argument(p))
        return s + p * s * rest * (1.5957691216 + 0.2140644488 * p * p)


@triton.jit
def gate(value, by, ACTIVATION: tl.constexpr):
    """`value`, or its tanh, let through by the sigmoid of `by`."""
    if ACTIVATION == "tanh_sigmoid":
        value = 2 * _sigmoid(2 * value) - 1
    return value * _sigmoid(by)


@triton.jit
def gate_grads(value, by, grad, ACTIVATION: tl.constexpr):
    """The gradients of `value` and `by`, from that of `gate(value, by)`."""
    s, rest = _sigmoids(by)
    slope = grad * s
    if ACTIVATION == "tanh_sigmoid":
        up, down = _sigmoids(2 * value)  # tanh is their difference
        return slope * (4 * up * down), slope * (up - down) * rest
    else:
        tl.static_assert(ACTIVATION == "glu")
        return slope, slope * value * rest


@triton.jit
def _normal(p):
    """The share of a standard normal distribution beyond |p|, and its density there."""
    e = tl.exp2(p * p * -0.7213475204)  # exp(-p^2 / 2)
    u = _reciprocal(1 + 0.2316418883 * tl.abs(p))
    beyond = u * (0.127414796 + u * (-0.142248368 + u * (0.7107068705 + u * (-0.7265760135 + u * 0.5307027145)))) * e
    return beyond, 0.3989422804 * e


@triton.jit
def _sigmoid(x):
    return _reciprocal(1 + tl.exp2(x * -1.4426950409))


@triton.jit
def _reciprocal(x):
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _sigmoids(x):
    """sigmoid(x) and sigmoid(-x), which as a difference from 1 would lose its digits."""
    z = x * -1.4426950409
    e = tl.exp2(tl.where(z > 126, 126.0, z))  # finite, so that e times its reciprocal is 1
    s = _reciprocal(1 + e)
    return s, e * s


@triton.jit
def _tanh_argument(p):
    """2 sqrt(2 / pi) (p + 0.044715 p^3): 1/2 (1 + tanh(z)) is sigmoid(2 z)."""
    return p * (1.5957691216 + 0.0713548162726 * p * p)
