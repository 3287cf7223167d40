"""The convolution as a module, and the way from and to `torch.nn.Conv1d`."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from fuzzytok_kernels.checks import check_at_least
from fuzzytok_kernels.functional import causal_conv1d
from fuzzytok_kernels.layout import empty_weight


class CausalConv1d(nn.Module):
    """Dense causal dilated 1-D convolution: x (B, in_channels, T) -> (B, out_channels, T), where no output sees a later input.

    `weight` is (out_channels, in_channels, kernel_size), and its tap 0 is the present: `torch.nn.Conv1d` orders the taps the other way
    round, see `from_conv1d` and `to_conv1d`. In memory it lies tap-major, as the kernels read it; `.to()`, `copy.deepcopy` and
    `load_state_dict` keep that, and a weight that lies otherwise gives the same result after one copy a call.

    Args:
        in_channels, out_channels, kernel_size, dilation: at least 1.
        bias: whether a learnable (out_channels,) bias is added.
        device, dtype: of the parameters, as in `torch.nn.Conv1d`.

    Raises:
        ValueError: a size below 1; when called, what `fuzzytok_kernels.causal_conv1d` refuses.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size, "dilation": dilation}
        for name, value in sizes.items():
            check_at_least(1, name, value)
        self.in_channels, self.out_channels, self.kernel_size, self.dilation = in_channels, out_channels, kernel_size, dilation
        like = torch.empty(0, device=device, dtype=dtype)
        self.weight = nn.Parameter(empty_weight(like, out_channels, in_channels, kernel_size))
        self.bias = nn.Parameter(like.new_empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as `torch.nn.Conv1d` does: the same seed gives the same values, the taps flipped."""
        conv1d_weight = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
        nn.init.kaiming_uniform_(conv1d_weight, a=math.sqrt(5))
        with torch.no_grad():
            self.weight.copy_(conv1d_weight.flip(2))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels * self.kernel_size)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        x: Tensor,
        *,
        activation: str | None = None,
        residual: Tensor | None = None,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_final_state: bool = False,
    ) -> Any:
        """x (B, in_channels, T) -> (B, out_channels, T), in the memory layout of x; see `fuzzytok_kernels.causal_conv1d`."""
        return causal_conv1d(
            x,
            self.weight,
            self.bias,
            dilation=self.dilation,
            activation=activation,
            residual=residual,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, dilation={self.dilation}"
        return text if self.bias is not None else f"{text}, bias=False"

    @classmethod
    def from_conv1d(cls, conv: nn.Conv1d) -> "CausalConv1d":
        """A copy of `conv`: on x it returns what `conv` returns on `F.pad(x, ((kernel_size - 1) * dilation, 0))`.

        Raises:
            ValueError: `conv` is no `torch.nn.Conv1d`, or has a stride, padding, padding_mode or groups that a causal convolution lacks.
        """
        _check_conv1d(conv)
        (kernel_size,), (dilation,) = conv.kernel_size, conv.dilation
        return _copied(cls, conv, conv.in_channels, conv.out_channels, kernel_size, dilation=dilation)

    def to_conv1d(self) -> nn.Conv1d:
        """A copy as `torch.nn.Conv1d` with padding 0: it wants its input through `F.pad(x, ((kernel_size - 1) * dilation, 0))`."""
        return _copied(nn.Conv1d, self, self.in_channels, self.out_channels, self.kernel_size, dilation=self.dilation)


def _check_conv1d(conv: nn.Module) -> None:
    if not isinstance(conv, nn.Conv1d):
        raise ValueError(f"conv is a {type(conv).__name__}; expected a torch.nn.Conv1d")
    allowed: dict[str, tuple] = {"stride": ((1,),), "padding": ((0,), "valid"), "padding_mode": ("zeros",), "groups": (1,)}
    for name, values in allowed.items():
        if getattr(conv, name) not in values:
            raise ValueError(f"conv has {name}={getattr(conv, name)!r}; expected {values[0]!r}, the only one a CausalConv1d can do")


def _copied(kind: type, source: Any, *sizes: int, dilation: int) -> Any:
    """A `kind` of these sizes with the parameters of `source`, the taps flipped."""
    weight, bias = source.weight, source.bias
    copy = skip_init(kind, *sizes, dilation=dilation, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        copy.weight.copy_(weight.flip(2))
        if bias is not None:
            copy.bias.copy_(bias)
    return copy
