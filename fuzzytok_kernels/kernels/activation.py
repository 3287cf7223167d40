"""The activations of the fused block on fp32 values in registers, and their derivatives.

An epilogue is bound by the instructions that it issues (31 an element cost 18 us at C=256, B*T=65,536 on an H100, beside the product's
42). So a reciprocal is the square of rsqrt, two instructions where an exact quotient takes eight, and off by 4e-7 of itself at most; and
exact GELU takes its normal distribution from Abramowitz and Stegun, formula 7.1.26: off by less than 1.5e-7, with one exponential, which
the derivative shares.

APPROXIMATE is for results in bf16, on GPUs that have a tanh of their own (`support.approximates`): one instruction, and off by 2^-11 of
itself at most, as PTX promises, where a result is rounded by 2^-9. SiLU then takes three instructions, and exact GELU nine: its normal
distribution is 1/2 + 1/2 tanh of a polynomial, fitted to be off by less than 3.1e-5. A block's forward went from 1.29 to 1.20 times the
plain one with SiLU, from 1.39 to 1.24 with tanh GELU and from 1.47 to 1.27 with exact GELU; with ReLU it is 1.18, for the residual's sake
(C=256, B*T=65,536, raced on an H200). In fp16, as fine as that tanh, the error rule would not hold; nor anywhere for a density made of it,
1 - tanh^2, whose error counts |p| times where nothing should be left. Hopper's tanh is off by 1.1e-5 at most (rms 4.5e-6), 46 times less
than the promise, which alone is relied on.
"""

import triton
import triton.language as tl


@triton.jit
def activate(p, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr = False):
    """The activation of the pre-activation p, for one that is no gate."""
    if ACTIVATION == "none":
        return p
    elif ACTIVATION == "relu":
        return tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        return p * _sigmoid(p, APPROXIMATE)
    elif ACTIVATION == "gelu" and APPROXIMATE:
        return p * _approximate_normal(p)
    elif ACTIVATION == "gelu":
        beyond, _ = _normal(p)
        return tl.maximum(p, 0.0) - tl.abs(p) * beyond  # NaN at infinity, as PyTorch's
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        return p * _sigmoid(_tanh_argument(p), APPROXIMATE)


@triton.jit
def derivative(p, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr = False):
    """d activate(p) / dp."""
    if ACTIVATION == "relu":
        return tl.where(p <= 0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s, rest = _sigmoids(p)
        return s + p * s * rest
    elif ACTIVATION == "gelu" and APPROXIMATE:
        return _approximate_normal(p) + p * tl.exp2(p * p * -0.7213475204 - 1.3257480647)  # log2 of 1 / sqrt(2 pi)
    elif ACTIVATION == "gelu":
        beyond, density = _normal(p)
        return tl.where(p < 0, beyond, 1 - beyond) + p * density
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        s, rest = _sigmoids(_tanh_argument(p))
        return s + p * s * rest * (1.5957691216 + 0.2140644488 * p * p)


@triton.jit
def gate(value, by, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr = False):
    """`value`, or its tanh, let through by the sigmoid of `by`."""
    if ACTIVATION == "tanh_sigmoid":
        value = _tanh(value) if APPROXIMATE else 2 * _sigmoid(2 * value, False) - 1
    return value * _sigmoid(by, APPROXIMATE)


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
def _approximate_normal(p):
    """The share of a standard normal distribution below p."""
    square = tl.minimum(p * p, 32.0)  # the polynomial turns back at 7.4; tanh is 1 from 4 on
    return 0.5 + 0.5 * _tanh(p * (0.797627586 + square * (0.0369255614 + square * -0.000341177726)))


@triton.jit
def _sigmoid(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        return 0.5 + 0.5 * _tanh(0.5 * x)
    else:
        return _reciprocal(1 + tl.exp2(x * -1.4426950409))


@triton.jit
def _tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


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
