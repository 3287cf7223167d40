"""The models: ids to states, and a head that says the next id. What each costs by its own arithmetic stands beside it."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.model.forms import Conv1dResidual
from fuzzytok_kernels import FuzzyTokenizer

HEAD_DIM = 64
_CYCLE, _KERNEL_SIZE = (1, 2, 4), 3
_BYTES = 256


class Size(NamedTuple):
    """Of a model: `depth` counts cycles of dilations or layers, `inner` is the Transformer's hidden width and 0 for others."""

    kind: str
    vocabulary: int
    depth: int
    width: int
    inner: int = 0

    @property
    def receptive_field(self) -> int | None:
        """In ids, the present one included; None if there is no limit."""
        return 1 + self.depth * (_KERNEL_SIZE - 1) * sum(_CYCLE) if self.kind in ("conv", "conv1d") else None

    def flops(self, length: int) -> float:
        """Of a forward pass, for each id of a window of `length`: two for each multiplication and addition of a matrix product.

        Attention's products with what the causal mask leaves out do not count.
        """
        width, head = self.width, 2 * self.width * self.vocabulary
        per_layer = {
            "conv": len(_CYCLE) * 2 * _KERNEL_SIZE * width**2,
            "conv1d": len(_CYCLE) * 2 * _KERNEL_SIZE * width**2,
            "lstm": 2 * 4 * 2 * width**2,
            "transformer": 2 * 4 * width**2 + 2 * 2 * width * self.inner + 2 * 2 * width * (length + 1) / 2,
        }
        return self.depth * per_layer[self.kind] + head


class LanguageModel(nn.Module):
    """ids (B, T) -> logits (B, T, vocabulary) of the id that follows each."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.body = {"conv": conv_body, "conv1d": conv1d_body, "lstm": Lstm, "transformer": Transformer}[size.kind](size)
        self.head = nn.Linear(size.width, size.vocabulary)

    def states(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, width)."""
        return self.body(ids)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.states(ids))

    @property
    def embedding(self) -> nn.Parameter:
        """(vocabulary, width)."""
        embedding: Any = self.body.embedding
        return embedding.weight

    def loss(self, ids: Tensor) -> Tensor:
        """ids (B, T + 1) -> the mean cross-entropy of each id from those before it, in nats."""
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten().long())


def parameter_counts(size: Size) -> tuple[int, int]:
    """Of a model of this size: all, and those outside the embedding table."""
    with torch.device("meta"):
        model = LanguageModel(size)
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total - model.embedding.numel()


def conv_body(size: Size) -> FuzzyTokenizer:
    """FuzzyTok; ids beyond the bytes are special ones to it, whatever they stand for."""
    return FuzzyTokenizer(size.width, _KERNEL_SIZE, _CYCLE * size.depth, num_special=size.vocabulary - _BYTES)


def conv1d_body(size: Size) -> FuzzyTokenizer:
    """The same model with PyTorch's convolution, as people write it."""
    body = conv_body(size)
    body.blocks = nn.ModuleList(Conv1dResidual(block.conv, torch.bfloat16) for block in body.blocks)  # type: ignore[arg-type]
    return body


class Lstm(nn.Module):
    """Embedding and LSTM layers, no wider inside than outside, that remember at the start: their forget gates have a bias of one."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.layers = nn.LSTM(size.width, size.width, size.depth, batch_first=True)
        with torch.no_grad():
            for name, bias in self.layers.named_parameters():
                if name.startswith("bias_ih"):
                    bias[size.width : 2 * size.width] = 1.0  # the gates lie in the order input, forget, cell, output

    def forward(self, ids: Tensor) -> Tensor:
        return self._layered(self.embedding(ids.long()))

    @torch.compiler.disable  # as PyTorch has it for `nn.LSTM`: `torch.lstm` would be taken apart into 512 steps a layer, for minutes
    def _layered(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return self.layers(x)[0]
        # Autocast runs LSTMs in fp16, whatever its dtype is: too narrow for the gradients of a mean over 65,536 ids.
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            state = x.new_zeros(self.layers.num_layers, len(x), x.shape[2], dtype=dtype)
            weights = self._weights(dtype)
            return torch.lstm(x.to(dtype), (state, state), weights, True, self.layers.num_layers, 0.0, self.training, False, True)[0]

    def _weights(self, dtype: torch.dtype) -> list[Tensor]:
        """Parts of one tensor in cuDNN's order, matrices before biases: from tensors apart it would make one at every call."""
        weights = list(self.layers.parameters())
        ordered = sorted(range(len(weights)), key=lambda place: -weights[place].dim())
        flat = torch.cat([weights[place].flatten() for place in ordered]).to(dtype)
        parts = dict(zip(ordered, flat.split([weights[place].numel() for place in ordered]), strict=True))
        return [parts[place].view_as(weight) for place, weight in enumerate(weights)]


class Transformer(nn.Module):
    """Pre-norm layers of causal attention with rotary positions, so that it takes any length."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(_Layer(size.width, size.inner, size.depth) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids.long())
        turns = _rotations(ids.shape[1], x)
        for layer in self.layers:
            x = layer(x, turns)
        return self.norm(x)


class _Layer(nn.Module):
    def __init__(self, width: int, inner: int, depth: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD_DIM)
        self.norm_attention, self.norm_inner = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projections, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.inner_out = nn.Linear(width, inner), nn.Linear(inner, width)
        for linear in (self.projections, self.inner):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (self.out, self.inner_out):
            nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * depth))

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.projections(self.norm_attention(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        attended = F.scaled_dot_product_attention(_turned(q, turns), _turned(k, turns), v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.inner_out(F.gelu(self.inner(self.norm_inner(x))))


def _rotations(length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (T, HEAD_DIM / 2) each, of the angle of each position and pair."""
    rates = (torch.arange(0, HEAD_DIM, 2, device=like.device) * (-math.log(10000.0) / HEAD_DIM)).exp()
    angles = torch.arange(length, device=like.device)[:, None] * rates
    return angles.cos(), angles.sin()


def _turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, H, T, D), each pair of its halves turned by its angle."""
    cosine, sine = (turn.to(x.dtype) for turn in turns)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)
