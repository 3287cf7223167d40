"""The matrix product that every kernel accumulates with."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b`. Under "tf32" fp32 operands are rounded to nearest, as cuDNN does: the tensor cores would cut the 13 bits off,
    at 2.6 times the error (measured on an H100)."""
    if PRECISION == "tf32":
        a = _nearest_tf32(a)
        b = _nearest_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _nearest_tf32(x):
    rounded = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # a NaN's bits could carry over into a number
