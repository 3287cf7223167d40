"""Kernels that read or write where they are told to, for the tests of addresses.py."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x, y, offset, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + offset, mask=at < count))


@triton.jit
def described_copy_kernel(x, y, source, target):
    y.store([0, target], x.load([0, source]))
