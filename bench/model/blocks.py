"""Blocks as `bench.rivals` are: `x + activation(conv(x))`, ours, PyTorch's and in fp64."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fuzzytok_kernels
from bench.grid import Shape
from bench.rivals import Inputs, Ours, Results, Rival
from fuzzytok_kernels import reference


class OurBlock(Ours):
    """As users call it."""

    def __init__(self, shape: Shape, activation: str = "gelu") -> None:
        super().__init__(shape)
        self.activation = activation

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fuzzytok_kernels.causal_conv1d(x, weight, bias, dilation=self.shape.d, activation=self.activation, residual=x)


class Recomputed(OurBlock):
    """Its backward computes the pre-activation anew, whatever the package's rule says."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.fuzzytok.causal_conv1d_fused(x, weight, bias, x, None, None, self.shape.d, self.activation)


class Stored(OurBlock):
    """Its backward reads the pre-activation back."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.activated(torch.ops.fuzzytok.causal_conv1d(x, weight, bias, self.shape.d), x, self.activation)


class ExactPlain(Ours):
    """What the plain op is checked against: the reference, on inputs in fp64."""

    def adapt(self, inputs: Inputs, op: str) -> Inputs:
        return Inputs(*(value.double() for value in inputs))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.causal_conv1d(x, weight, bias, self.shape.d)


class Exact(ExactPlain):
    """What blocks are checked against."""

    def __init__(self, shape: Shape, activation: str = "gelu") -> None:
        super().__init__(shape)
        self.activation = activation

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.activated(super().convolve(x, weight, bias), x, self.activation)


class CompiledBlock(Rival):
    """torch.compile of a block with exact GELU around `conv`, one of PyTorch's convolutions."""

    def __init__(self, conv: Rival, **options: Any) -> None:
        super().__init__(conv.shape)
        self.conv = conv
        self.compiled: Callable[..., Any] = torch.compile(self._block, fullgraph=True, dynamic=False, **options)

    def adapt(self, inputs: Inputs, op: str) -> Inputs:
        return self.conv.adapt(inputs, op)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.compiled(x, weight, bias)

    def _block(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x + F.gelu(self.conv.convolve(x, weight, bias))

    def logical(self, results: Results, inputs: Inputs) -> Results:
        return self.conv.logical(results, inputs)
