"""The matrix product that every kernel accumulates with.

Under "tf32" fp32 operands are rounded to nearest, as cuDNN does: the tensor cores would cut the 13 bits off, at 2.6 times the error
(measured on an H100).
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b`."""
    if PRECISION == "tf32":
        a = nearest_tf32(a)
        b = nearest_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_rounded(a, b, acc, PRECISION: tl.constexpr):
    """As `dot`, from Hopper on, of a `b` that holds TF32 already: it then goes from shared memory to the tensor cores as it is."""
    if PRECISION == "tf32":
        a = tl.inline_asm_elementwise("cvt.rn.tf32.f32 $0, $1;", "=r,r", [a], dtype=tl.float32, is_pure=True, pack=1)
        return waited(tl.dot(a, b, acc, input_precision=PRECISION))
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def waited(acc):
    """`acc`, once the product that made it has ended, where its left operand came from registers.

    Hopper reads them while the program goes on, and up to Triton 3.8 the next block is loaded into them before that has ended
    (triton-lang/triton#9433): TF32's 128x256 tiles were up to 266 times as far off as allowed. No instruction touches `acc` here, but what
    does has to wait.
    """
    if cuda_capability_geq(9) and not cuda_capability_geq(10):
        acc = tl.inline_asm_elementwise("", "=r,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def nearest_tf32(x):
    """x with the 13 bits rounded away."""
    rounded = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # a NaN's bits could carry over into a number
