"""Whether a model sees the future, and how far it sees into the past: by changed ids, and by gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.paper.models import LanguageModel
from bench.paper.step import autocast

_LENGTH, _BATCH = 192, 4


def causality(model: LanguageModel, checked: int, seed: int = 0) -> dict[str, Any]:
    """Three checks of a model on its device, each at `checked` positions.

    "bit_equal": outputs up to t are the same bits when all later ids are drawn anew. "gradient": no later id has a gradient.
    "reach": how many ids, the present one included, have one, the most of all positions, of a text of "length".
    "exact": that is the receptive field, and leaves none of it out; None for a model without one.
    """
    expected = model.size.receptive_field
    reach = reached(model, model.embedding, model.size.vocabulary, checked, seed)
    return {
        "bit_equal": unmoved(model, model.size.vocabulary, checked, seed),
        "gradient": reach["later"] == 0,
        "reach": reach["reach"],
        "length": _LENGTH,
        "exact": None if expected is None else reach["gaps"] == 0 and reach["reach"] == expected,
    }


@torch.no_grad()
def unmoved(model: Callable[[Tensor], Tensor], vocabulary: int, checked: int, seed: int = 0) -> bool:
    """Outputs (B, T, ...) of ids (B, T) are bit-equal up to t, whatever follows, as training computes them."""
    device = _device(model)
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (_BATCH, _LENGTH), generator=random)
    with autocast(device):
        before = model(ids.to(device))
        for t in _positions(checked, random):
            changed = ids.clone()
            changed[:, t + 1 :] = torch.randint(vocabulary, (_BATCH, _LENGTH - t - 1), generator=random)
            if not torch.equal(model(changed.to(device))[:, : t + 1], before[:, : t + 1]):
                return False
    return True


def reached(model: nn.Module, embedding: nn.Parameter, vocabulary: int, checked: int, seed: int = 0) -> dict[str, int]:
    """From where outputs (1, T, ...) get gradients, through the rows of the embedding of a text whose ids all differ.

    "later": positions behind the output that have one. "reach": the distance to the earliest, plus one. "gaps": how many positions
    between have none.
    """
    device = embedding.device
    random = torch.Generator().manual_seed(seed)
    ids = torch.randperm(vocabulary, generator=random)[:_LENGTH]
    found = {"later": 0, "reach": 0, "gaps": 0}
    for t in [_LENGTH - 1, *_positions(checked - 1, random)]:
        with autocast(device):
            outputs = model(ids[None].to(device))[0, t]
        weights = torch.randn(outputs.shape, generator=random).to(outputs)
        (gradient,) = torch.autograd.grad((outputs * weights).sum(), embedding)
        moved = (gradient[ids.to(device)] != 0).any(1).cpu()  # (T,)
        first = int(moved.nonzero()[0])
        found["later"] += int(moved[t + 1 :].sum())
        found["reach"] = max(found["reach"], t + 1 - first)
        found["gaps"] += int((~moved[first : t + 1]).sum())
    return found


def _positions(count: int, random: torch.Generator) -> list[int]:
    return (torch.randperm(_LENGTH - 1, generator=random)[:count]).tolist()


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
