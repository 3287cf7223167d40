"""The model, and the forms in which it is run: with our blocks, and with PyTorch's in their place."""

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.model.sizes import BLOCK, DILATIONS
from fuzzytok_kernels import CausalConv1d, FuzzyTokenizer

SEARCHED = {"mode": "max-autotune-no-cudagraphs"}  # no graphs of its own, since the timer captures all forms


class Model(nn.Module):
    """Bytes to the loss of a next-byte head: embedding, LayerNorm, residual blocks, linear."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        dilations = tuple(itertools.islice(itertools.cycle(DILATIONS), depth))
        self.tokenizer = FuzzyTokenizer(dim, BLOCK.K, dilations)
        self.head = nn.Linear(dim, 256)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids and targets (B, T) -> the mean cross-entropy."""
        return F.cross_entropy(self.head(self.tokenizer(ids)).flatten(0, 1), targets.flatten())


class Conv1dResidual(nn.Module):
    """PyTorch's block as people write it. `stream` is the dtype of what flows from block to block, None to leave that to autocast."""

    def __init__(self, conv: CausalConv1d, stream: torch.dtype | None = None) -> None:
        super().__init__()
        self.conv, self.stream = conv.to_conv1d(), stream
        self.history = (conv.kernel_size - 1) * conv.dilation

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, T) -> (B, C, T)."""
        h = x if self.stream is None else x.to(self.stream)
        return h + F.gelu(self.conv(F.pad(h, (self.history, 0))))


class Conv2dResidual(nn.Module):
    """PyTorch's block in cuDNN's fastest form: an image of height 1, channels_last, padded by cuDNN and trimmed."""

    def __init__(self, conv: CausalConv1d, stream: torch.dtype | None = None) -> None:
        super().__init__()
        taps, self.stream = conv.to_conv1d(), stream
        history = (conv.kernel_size - 1) * conv.dilation
        sizes = (conv.in_channels, conv.out_channels, (1, conv.kernel_size))
        self.conv = nn.Conv2d(*sizes, dilation=(1, conv.dilation), padding=(0, history))
        self.conv.weight = nn.Parameter(taps.weight.detach().unsqueeze(2).contiguous(memory_format=torch.channels_last))
        self.conv.bias = taps.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, T) -> (B, C, T)."""
        h = x if self.stream is None else x.to(self.stream)
        return h + F.gelu(self.conv(h.unsqueeze(2))[..., : x.shape[2]]).squeeze(2)


class Form(NamedTuple):
    """One way to run the model."""

    label: str
    block: Callable[..., nn.Module] | None = None  # from a CausalConv1d; None leaves ours in place
    options: dict[str, Any] | None = None  # of torch.compile; None runs it eagerly
    stream: torch.dtype | None = torch.bfloat16  # ours follows the dtype of autocast; a stream in fp32 moves twice the bytes

    def build(self, ours: Model) -> Model:
        """A model with copies of the parameters of `ours`."""
        model = copy.deepcopy(ours)
        if self.block:
            blocks: Iterable[Any] = model.tokenizer.blocks
            model.tokenizer.blocks = nn.ModuleList(self.block(block.conv, self.stream) for block in blocks)
        return model


OURS = ("ours", "ours_compiled")
EAGER_CONV1D = ("conv1d", "conv1d_bf16")
COMPILED = ("conv1d_compiled", "conv2d_compiled", "conv2d_searched")
PYTORCH = (*EAGER_CONV1D, "conv2d", *COMPILED)
FORMS = {
    "ours": Form("ours"),
    "ours_compiled": Form("ours, compiled", options={}),
    "conv1d": Form("F.conv1d + F.pad", Conv1dResidual, stream=None),
    "conv1d_bf16": Form("F.conv1d + F.pad, stream in bf16", Conv1dResidual),
    "conv1d_compiled": Form("F.conv1d + F.pad, stream in bf16, compiled", Conv1dResidual, {}),
    "conv2d": Form("conv2d channels_last, trimmed, stream in bf16", Conv2dResidual),
    "conv2d_compiled": Form("conv2d channels_last, trimmed, stream in bf16, compiled", Conv2dResidual, {}),
    "conv2d_searched": Form("conv2d channels_last, trimmed, stream in bf16, compiled, max-autotune", Conv2dResidual, SEARCHED),
}
# The mode chooses kernels, not what is saved: where memory alone is wanted, minutes of search are spared.
UNSEARCHED = {name: form for name, form in FORMS.items() if form.options is not SEARCHED}
