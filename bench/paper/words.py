"""Families of words of one root."""

from pathlib import Path

import numpy as np

from bench.paper.extract import families

LANGUAGES = ("english", "portuguese")
_FAMILIES, _SEED = 600, 0
_FEWEST, _MOST, _SHORTEST = 3, 4, 4  # words of a family; of larger ones the first few in a seeded order; letters of a word

# For the smoke run, which has no package to take them from.
SMOKE = {
    "english": [
        ["assign", "assigned", "assignment", "assigning"],
        ["attribute", "attributes", "attributed", "attributing"],
        ["bind", "binding", "bindings", "binds"],
        ["call", "called", "caller", "calling"],
        ["compare", "compared", "comparing", "comparison"],
        ["define", "defined", "defining", "definition"],
        ["evaluate", "evaluated", "evaluating", "evaluation"],
        ["except", "exception", "exceptions", "excepted"],
        ["execute", "executed", "executing", "execution"],
        ["import", "imported", "importing", "imports"],
        ["iterate", "iterated", "iterating", "iteration"],
        ["name", "named", "names", "naming"],
        ["operate", "operated", "operating", "operation"],
        ["return", "returned", "returning", "returns"],
        ["special", "specialise", "specialised", "specially"],
        ["type", "typed", "types", "typing"],
    ]
}


def snowball(root: Path) -> dict[str, list[list[str]]]:
    """By language, from the unpacked package: families that Snowball gives one stem, a seeded sample."""
    return {language: _sampled(families(root, language)) for language in LANGUAGES}


def _sampled(found: dict[str, list[str]]) -> list[list[str]]:
    random = np.random.default_rng(_SEED)
    large = [[word for word in words if len(word) >= _SHORTEST] for words in found.values()]
    large = [words for words in large if len(words) >= _FEWEST]
    chosen = random.permutation(len(large))[:_FAMILIES]
    return [[words[place] for place in random.permutation(len(words))[:_MOST]] for words in (large[number] for number in chosen)]
