"""The radical ratio: are words of one root closer to each other than to other words?"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bench.paper.bundle import Bundle
from bench.paper.models import LanguageModel
from bench.paper.resampling import Pairs, figures
from bench.paper.step import autocast

_PAIRS, _SEED = 4000, 0  # of different families, at most, of each kind
_PREFIX = 3  # letters
_BATCH = 512


def of_model(model: LanguageModel, bundle: Bundle, vocabulary: str) -> dict[str, Any]:
    """By language: the figures of e(w), the mean of the states over the ids of " " + w."""
    return {language: _figures(bundle, language, embedded(model, bundle, vocabulary, language)) for language in bundle.facts["families"]}


def of_baselines(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """What needs no model: a bag of bytes, and character trigrams."""
    rows: dict[str, dict[str, Any]] = {"bag of bytes": {}, "character trigrams": {}}
    for language, groups in bundle.facts["families"].items():
        texts = [f" {word}" for group in groups for word in group]
        rows["bag of bytes"][language] = _figures(bundle, language, counted([list(text.encode()) for text in texts]))
        rows["character trigrams"][language] = _figures(bundle, language, counted([trigrams(text) for text in texts]))
    return rows


@torch.no_grad()
def embedded(model: LanguageModel, bundle: Bundle, vocabulary: str, language: str) -> np.ndarray:
    """(words, width), in fp32."""
    ids, end = bundle.ids(vocabulary, f"words/{language}").astype(np.int64), bundle.vocabulary(vocabulary).end
    ends = np.flatnonzero(ids == end)
    words = [ids[begin:stop] for begin, stop in zip([0, *(ends[:-1] + 1)], ends, strict=True)]
    device = model.embedding.device
    vectors = []
    for some in (words[begin : begin + _BATCH] for begin in range(0, len(words), _BATCH)):
        lengths = torch.tensor([len(word) for word in some], device=device)
        padded = np.full((len(some), int(lengths.max())), end)  # behind a word: no state before sees it
        for row, word in zip(padded, some, strict=True):
            row[: len(word)] = word
        with autocast(device):
            states = model.states(torch.from_numpy(padded).to(device)).float()  # (b, T, width)
        inside = torch.arange(states.shape[1], device=device) < lengths[:, None]
        vectors.append(((states * inside[..., None]).sum(1) / lengths[:, None]).cpu().numpy())
    return np.concatenate(vectors).astype(np.float64)


def counted(texts: Sequence[Sequence[Any]]) -> np.ndarray:
    """(texts, kinds) how often each kind of thing is in each text."""
    kinds = {kind: number for number, kind in enumerate(sorted({kind for text in texts for kind in text}))}
    counts = np.zeros((len(texts), len(kinds)))
    for row, text in zip(counts, texts, strict=True):
        for kind in text:
            row[kinds[kind]] += 1
    return counts


def trigrams(text: str) -> list[str]:
    """Those of the characters; a text of fewer is its own."""
    return [text[place : place + 3] for place in range(max(1, len(text) - 2))]


def paired(groups: Sequence[Sequence[str]]) -> tuple[np.ndarray, Pairs]:
    """The family of each word, and the pairs that are compared; the same for the same words."""
    random = np.random.default_rng(_SEED)
    words = [word for group in groups for word in group]
    families = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    numbers = [np.flatnonzero(families == family).tolist() for family in range(len(groups))]
    same = [pair for group in numbers for pair in itertools.combinations(group, 2)]
    drawn = random.integers(len(words), size=(2 * _PAIRS, 2))
    by_prefix: dict[str, list[int]] = {}
    for number, word in enumerate(words):
        by_prefix.setdefault(word[:_PREFIX], []).append(number)
    prefix = [pair for group in by_prefix.values() for pair in itertools.combinations(group, 2) if families[pair[0]] != families[pair[1]]]
    chosen = random.permutation(len(prefix))[:_PAIRS]
    return families, Pairs(
        np.array(same).reshape(-1, 2),
        drawn[families[drawn[:, 0]] != families[drawn[:, 1]]][:_PAIRS],
        np.array([prefix[place] for place in chosen], dtype=np.int64).reshape(-1, 2),
    )


def _figures(bundle: Bundle, language: str, vectors: np.ndarray) -> dict[str, Any]:
    families, pairs = paired(bundle.facts["families"][language])
    counts = {"words": len(families), "families": int(families.max()) + 1, **{name: len(each) for name, each in pairs._asdict().items()}}
    return {**figures(vectors, families, pairs), "counts": counts}
