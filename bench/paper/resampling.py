"""AUC, ratio and gap of pairs of words, with intervals from resampled families."""

from typing import NamedTuple

import numpy as np

_RESAMPLES = 500
_INTERVAL = (2.5, 97.5)


class Pairs(NamedTuple):
    """Of words: (N, 2) numbers of words of one family, of different families, and of different families with the same first letters."""

    same: np.ndarray
    random: np.ndarray
    prefix: np.ndarray


class Ranks:
    """Of `same` (N,) among `other` (M,), found once for all resamples."""

    def __init__(self, same: np.ndarray, other: np.ndarray) -> None:
        self.order = np.argsort(other, kind="stable")
        self.below, self.up_to = (np.searchsorted(other[self.order], same, side=side) for side in ("left", "right"))

    def auc(self, same_weights: np.ndarray, other_weights: np.ndarray) -> float:
        """The weighted share of pairs (one of `same`, one of `other`) where the first is larger; a tie is half; nan without pairs."""
        before = np.concatenate([[0.0], np.cumsum(other_weights[self.order])])
        total = same_weights.sum() * before[-1]
        return float(same_weights @ (before[self.below] + before[self.up_to]) / 2 / total) if total else float("nan")


def figures(vectors: np.ndarray, families: np.ndarray, pairs: Pairs, seed: int = 0) -> dict[str, list[float | None]]:
    """[value, low, high] of each figure, of vectors (words, C); `families` (words,) numbers each word's family.

    "ratio" and the mean cosines are of the raw vectors; "gap" and the AUCs of vectors less their mean. The interval is the middle 95 %
    of resampled families: a pair weighs as often as its families were drawn.
    """
    raw = [_cosines(vectors, each) for each in pairs]
    centred = [_cosines(vectors - vectors.mean(0), each) for each in pairs]
    ranks = [Ranks(centred[0], other) for other in centred[1:]]
    count = int(families.max()) + 1
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    rows = [_row(raw, centred, ranks, _weighed(each, families, pairs)) for each in (np.ones(count), *weights.astype(float))]
    result = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        known = values[1:][np.isfinite(values[1:])]
        low, high = np.percentile(known, _INTERVAL) if len(known) else (float("nan"), float("nan"))
        result[name] = [_number(value) for value in (values[0], low, high)]
    return result


def _row(raw: list[np.ndarray], centred: list[np.ndarray], ranks: list[Ranks], weights: list[np.ndarray]) -> dict[str, float]:
    same, random = (_mean(values, weight) for values, weight in zip(raw[:2], weights[:2], strict=True))
    centred_same, centred_random = (_mean(values, weight) for values, weight in zip(centred[:2], weights[:2], strict=True))
    return {
        "ratio": same / random if random else float("nan"),  # words that share nothing: a few resamples of trigrams
        "same": same,
        "random": random,
        "gap": centred_same - centred_random,
        "auc_random": ranks[0].auc(weights[0], weights[1]),
        "auc_prefix": ranks[1].auc(weights[0], weights[2]),
    }


def _weighed(weights: np.ndarray, families: np.ndarray, pairs: Pairs) -> list[np.ndarray]:
    first = [weights[families[each[:, 0]]] for each in pairs]
    second = [weights[families[each[:, 1]]] for each in pairs]
    return [first[0], first[1] * second[1], first[2] * second[2]]  # the words of a pair in `same` have one family


def _cosines(vectors: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    norms = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    unit = vectors / norms
    return (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1)


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    total = weights.sum()
    return float(values @ weights / total) if total else float("nan")


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None  # JSON has no nan
