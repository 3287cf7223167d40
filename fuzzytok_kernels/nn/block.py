"""The residual block that FuzzyTok is stacked from."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from fuzzytok_kernels.nn.conv import CausalConv1d

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class ResidualCausalBlock(nn.Module):
    """`x + activation(conv(x))` on x (B, channels, T), in the memory layout of x.

    Args:
        channels, kernel_size, dilation: of the convolution, at least 1.
        activation: "relu", "silu", "gelu" (exact, by erf) or "gelu_tanh".

    Raises:
        ValueError: another activation, or a size below 1.
    """

    def __init__(self, channels: int, kernel_size: int, dilation: int = 1, activation: str = "gelu") -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; expected one of {', '.join(map(repr, _ACTIVATIONS))}")
        self.activation = activation
        self.conv = CausalConv1d(channels, channels, kernel_size, dilation)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, T) -> (B, channels, T)."""
        return x + _ACTIVATIONS[self.activation](self.conv(x))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
