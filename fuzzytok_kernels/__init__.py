"""FuzzyTok kernels: dense causal dilated 1-D convolutions for PyTorch, and the byte-level tokenizer built from them."""

from fuzzytok_kernels import flops as flops
from fuzzytok_kernels import ops as ops
from fuzzytok_kernels.functional import byte_causal_conv1d, causal_conv1d, causal_conv1d_update
from fuzzytok_kernels.nn import (
    ByteLM,
    CausalConv1d,
    FuzzyTokenizer,
    ResidualCausalBlock,
    StreamState,
    bits_per_byte,
    pool,
    segments_from_starts,
    unpool,
)

__version__ = "0.1.0"
__all__ = [
    "ByteLM",
    "CausalConv1d",
    "FuzzyTokenizer",
    "ResidualCausalBlock",
    "StreamState",
    "bits_per_byte",
    "byte_causal_conv1d",
    "causal_conv1d",
    "causal_conv1d_update",
    "pool",
    "segments_from_starts",
    "unpool",
]
