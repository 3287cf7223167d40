"""Bits per byte: every id and end mark counted, each with at least half a window before it, divided by the source bytes."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.paper.bundle import Bundle
from bench.paper.models import LanguageModel
from bench.paper.noises import NOISES
from bench.paper.step import autocast

_BATCH_IDS = 1 << 16


def bits_per_byte(model: LanguageModel, bundle: Bundle, vocabulary: str, text: str, window: int, most_bytes: int | None = None) -> float:
    """Of a text of the corpus, or of about its first `most_bytes`; `window` in ids."""
    ids = bundle.ids(vocabulary, text)
    lengths = bundle.vocabulary(vocabulary).lengths
    if most_bytes is not None:
        ids = ids[: int(np.searchsorted(np.cumsum(lengths[ids]), most_bytes)) + 1]
    end = bundle.vocabulary(vocabulary).end
    device = model.embedding.device
    return total_bits(model, torch.from_numpy(ids.astype(np.int64)).to(device), end, window) / float(lengths[ids].sum())


@torch.no_grad()
def total_bits(model: LanguageModel, ids: Tensor, end: int, window: int) -> float:
    """-Σ log2 p(id | those before it), over all ids (N,) of a stream; an end mark stands before the first.

    Windows overlap by half, and all but the first score their second half only.
    """
    stride = window // 2
    context = window - stride
    count = 1 + max(0, -(-(len(ids) - window) // stride))
    batch = min(count, max(1, _BATCH_IDS // window))
    count = batch * -(-count // batch)  # whole batches: another shape would be another kernel to choose and to compile
    padding = ids.new_full((context + count * stride - len(ids),), end)  # behind the last id: what is there is not scored
    stream = torch.cat([ids.new_full((1,), end), ids, padding])
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=ids.device)
    starts = stride * torch.arange(count, device=ids.device)
    places = torch.arange(window, device=ids.device)
    for some in starts.split(batch):
        at = some[:, None] + places  # (b, window)
        scored = ((places >= context) | (some[:, None] == 0)) & (at < len(ids))
        total += (_bits(model, stream[at], stream[at + 1]) * scored).sum(dtype=torch.float64)
    model.train()
    return float(total)


def _bits(model: LanguageModel, ids: Tensor, targets: Tensor) -> Tensor:
    """(b, T) and (b, T) -> (b, T)."""
    with autocast(ids.device):
        logits = model(ids)
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape) / math.log(2)


def robustness(model: LanguageModel, bundle: Bundle, vocabulary: str, window: int) -> dict[str, float]:
    """Bits per byte of documents of the test part with each noise, and without: "none"."""
    return {noise: bits_per_byte(model, bundle, vocabulary, f"noise/{noise}", window) for noise in ("none", *NOISES)}
