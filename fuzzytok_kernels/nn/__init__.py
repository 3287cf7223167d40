"""The modules: parameters and one call of a function each."""

from fuzzytok_kernels.nn.block import ResidualCausalBlock
from fuzzytok_kernels.nn.conv import CausalConv1d
from fuzzytok_kernels.nn.tokenizer import FuzzyTokenizer, bits_per_byte

__all__ = ["CausalConv1d", "FuzzyTokenizer", "ResidualCausalBlock", "bits_per_byte"]
