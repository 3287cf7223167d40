"""FuzzyTok kernels: dense causal dilated 1-D convolutions for PyTorch, and the byte-level tokenizer built from them."""

from fuzzytok_kernels import ops as ops
from fuzzytok_kernels.functional import causal_conv1d

__version__ = "0.1.0"
__all__ = ["causal_conv1d"]
