"""A kernel that reads where it is told to, for the tests of addresses.py."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x, y, offset, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + offset, mask=at < count))
