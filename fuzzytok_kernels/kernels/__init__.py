"""The Triton kernels: `@triton.jit` code only."""
