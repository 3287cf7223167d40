"""The residual block that FuzzyTok is stacked from."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fuzzytok_kernels.checks import check_activation
from fuzzytok_kernels.layout import laid_out_as
from fuzzytok_kernels.nn.conv import CausalConv1d
from fuzzytok_kernels.reference import ACTIVATIONS, GATES


class ResidualCausalBlock(nn.Module):
    """`x + dropout(activation(conv(norm(x))))` on x (B, channels, T), in its memory layout; one kernel from the norm on, without dropout.

    Args:
        channels, kernel_size, dilation: of the convolution, at least 1. For a gate it makes 2 * channels.
        activation: "relu", "silu", "gelu" (exact, by erf), "gelu_tanh", "glu" or "tanh_sigmoid" (WaveNet's gate).
        norm: None, "layer" or "rms", over the channels of each position alone: a norm over time would let the past see the future.
        dropout: the share of the block's contribution, not of x, that training sets to zero.

    Raises:
        ValueError: another activation or norm, a size below 1, or a dropout outside [0, 1].
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilation: int = 1,
        activation: str = "gelu",
        norm: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_activation(activation, _ACTIVATIONS)
        if norm not in _NORMS:
            raise ValueError(f"norm is {norm!r}; expected one of {', '.join(map(repr, _NORMS))}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout!r}; expected a share between 0 and 1")
        self.activation, self.dropout = activation, dropout
        self.norm = _NORMS[norm](channels)
        self.conv = CausalConv1d(channels, 2 * channels if activation in GATES else channels, kernel_size, dilation)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """x (B, channels, T) -> (B, channels, T). With cu_seqlens (N + 1,), B is 1 and N sequences lie end to end in T, of which none sees
        another; see `fuzzytok_kernels.causal_conv1d`."""
        h = x if isinstance(self.norm, nn.Identity) else self.norm(x.mT).mT  # (B, T, channels) and back: views
        if self.dropout and self.training:
            y = self.conv(h, activation=self.activation, cu_seqlens=cu_seqlens)
            return laid_out_as(x, x.to(y.dtype) + F.dropout(y, self.dropout))
        return laid_out_as(x, self.conv(h, activation=self.activation, residual=x, cu_seqlens=cu_seqlens))

    def extra_repr(self) -> str:
        text = f"activation={self.activation!r}"
        return f"{text}, dropout={self.dropout}" if self.dropout else text


_ACTIVATIONS = [name for name in ACTIVATIONS if name != "none"]  # without one, blocks would be no more than one convolution
_NORMS: dict[str | None, Callable[[int], nn.Module]] = {None: lambda channels: nn.Identity(), "layer": nn.LayerNorm, "rms": nn.RMSNorm}
