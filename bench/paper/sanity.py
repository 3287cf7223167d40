"""Rows that need no neural network: xz, and a 5-gram of bytes with Witten-Bell smoothing."""

import lzma

import numpy as np

from bench.paper.vocabulary import BYTE_VOCABULARY

_ORDER = 5
_IDS = len(BYTE_VOCABULARY.pieces)


def xz_bits_per_byte(text: bytes) -> float:
    """Of `text` alone, at xz's best preset: it has learnt nothing before."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def ngram_bits_per_byte(training: np.ndarray, held_out: np.ndarray) -> float:
    """Of byte ids with end marks: every id is predicted from the four before it, and the bits are divided by the bytes.

    Witten and Bell: P_n(x|c) = (count(c x) + kinds(c) P_(n-1)(x|c')) / (count(c) + kinds(c)), down to an even spread.
    """
    probability = np.full(len(held_out), 1 / _IDS)
    for order in range(1, _ORDER + 1):
        probability = _smoothed(_keys(training, order), _keys(held_out, order), probability)
    return float(-np.log2(probability).sum() / (held_out != BYTE_VOCABULARY.end).sum())


def _keys(ids: np.ndarray, order: int) -> np.ndarray:
    """(N,) one number for each id and the order - 1 before it; end marks stand before the first."""
    padded = np.concatenate([np.full(order - 1, BYTE_VOCABULARY.end), ids]).astype(np.int64)
    keys = np.zeros(len(ids), dtype=np.int64)
    for place in range(order):
        keys = keys * _IDS + padded[place : place + len(ids)]
    return keys


def _smoothed(training: np.ndarray, wanted: np.ndarray, lower: np.ndarray) -> np.ndarray:
    grams, counts = np.unique(training, return_counts=True)
    contexts, first = np.unique(grams // _IDS, return_index=True)
    totals, kinds = np.add.reduceat(counts, first), np.diff(np.append(first, len(grams)))
    count = _looked_up(grams, counts, wanted)
    total, kind = (_looked_up(contexts, values, wanted // _IDS) for values in (totals, kinds))
    return np.where(total > 0, (count + kind * lower) / np.maximum(1, total + kind), lower)


def _looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where there is none."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
