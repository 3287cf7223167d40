"""Five seeded noises, each of bytes to bytes: how much worse does a model read what was mistyped?"""

from collections.abc import Callable

import numpy as np

Noise = Callable[[np.ndarray, np.random.Generator], np.ndarray]
_CASE = 0x20  # the bit that tells the cases of an ASCII letter apart


def drop(text: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Without a tenth of the bytes."""
    return text[random.random(len(text)) >= 0.10]


def random_case(text: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Each ASCII letter in upper or lower case, evenly."""
    return np.where(_letters(text) & (random.random(len(text)) < 0.5), text ^ _CASE, text)


def repeats(text: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A tenth of the bytes twice."""
    return np.repeat(text, 1 + (random.random(len(text)) < 0.10))


def upper_case(text: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """All ASCII letters in upper case."""
    return np.where(_letters(text), text & ~np.uint8(_CASE), text)


def swaps(text: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Neighbours exchanged at 5 % of the places; a byte moves once at most."""
    swapped, last = text.copy(), -2
    for place in np.flatnonzero(random.random(max(0, len(text) - 1)) < 0.05).tolist():
        if place > last + 1:
            swapped[[place, place + 1]] = text[[place + 1, place]]
            last = place
    return swapped


NOISES: dict[str, Noise] = {"drop": drop, "random_case": random_case, "repeats": repeats, "upper_case": upper_case, "swaps": swaps}
LABELS = {
    "drop": "10 % dropped",
    "random_case": "random case",
    "repeats": "10 % repeated",
    "upper_case": "upper case",
    "swaps": "5 % swapped",
}


def noisy(document: bytes, name: str, seed: int) -> bytes:
    """The document with noise `name`, the same for the same seed."""
    text = np.frombuffer(document, dtype=np.uint8)
    return NOISES[name](text, np.random.default_rng([seed, list(NOISES).index(name)])).astype(np.uint8).tobytes()


def _letters(text: np.ndarray) -> np.ndarray:
    lower = text | _CASE
    return (lower >= ord("a")) & (lower <= ord("z"))
