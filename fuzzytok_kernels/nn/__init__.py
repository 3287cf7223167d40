"""The modules: parameters and one call of a function each."""

from fuzzytok_kernels.nn.block import ResidualCausalBlock
from fuzzytok_kernels.nn.conv import CausalConv1d
from fuzzytok_kernels.nn.language_model import ByteLM
from fuzzytok_kernels.nn.pooling import pool, segments_from_starts, unpool
from fuzzytok_kernels.nn.streaming import StreamState
from fuzzytok_kernels.nn.tokenizer import FuzzyTokenizer, bits_per_byte

__all__ = [
    "ByteLM",
    "CausalConv1d",
    "FuzzyTokenizer",
    "ResidualCausalBlock",
    "StreamState",
    "bits_per_byte",
    "pool",
    "segments_from_starts",
    "unpool",
]
