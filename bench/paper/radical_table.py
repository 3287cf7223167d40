"""The radical ratio's table: from the runs of Table 2, their models before training, a bag of bytes and character trigrams."""

import statistics
from collections.abc import Iterator
from typing import Any

from bench.paper.radical import of_baselines
from bench.paper.runs import Outcome
from bench.paper.sharing import work_off
from bench.paper.table2 import Found
from bench.paper.table2_text import spread
from bench.report import table

COLUMNS = {
    "ratio": "raw ratio",
    "gap": "centred gap",
    "auc_random": "AUC, random words",
    "auc_prefix": "AUC, same first 3 letters",
}


def work(found: Found) -> None:
    """What Table 2 has left to do of it, as far as the time goes."""
    trained = _trained(found)
    work_off((each, each.untrained) for each in trained if each.first)
    work_off((each, each.evaluate) for each in trained)


def collected(found: Found) -> tuple[dict[str, Any], str | None]:
    """By corpus, row and language, one entry a seed; and what is left to do."""
    figures: dict[str, Any] = {}
    for name, some in found.items():
        rows: dict[str, list[dict[str, Any]]] = {label: [row] for label, row in of_baselines(some[0].bundle).items()}
        for each in some:
            each.read()
            for label, figure in ((f"{each.run.model.label}, untrained", "untrained"), (each.run.model.label, "radical")):
                if figure in each.figures:
                    rows.setdefault(label, []).append(each.figures[figure])
        figures[name] = {"rows": rows, "languages": list(some[0].bundle.facts["families"])}
    left = [each.run.name for each in _trained(found) if "radical" not in each.figures or (each.first and "untrained" not in each.figures)]
    return figures, f"{len(left)} runs are left to do, {left[0]} the first of them" if left else None


def _trained(found: Found) -> list[Outcome]:
    return [each for some in found.values() for each in some if each.run.model.trained]


def text(figures: dict[str, Any]) -> str:
    """The tables in markdown."""
    parts = ["## The radical ratio", _METHOD]
    for corpus, found in figures.items():
        for language in found["languages"]:
            lines = [(label, str(len(rows)), *_cells([row[language] for row in rows])) for label, rows in found["rows"].items()]
            counts = next(iter(found["rows"].values()))[0][language]["counts"]
            parts.append(
                f"### {language.capitalize()} words, models of the {corpus} corpus\n\n"
                f"{counts['families']} families of {counts['words']} words; {counts['same']:,} pairs of one family, "
                f"{counts['random']:,} random ones, {counts['prefix']:,} with the same first letters."
            )
            parts += [table(("", "seeds", *COLUMNS.values()), lines), _better(found["rows"], language)]
    return "\n\n".join(parts)


_METHOD = """\
e(w) is the mean of the final states over the ids of `" " + w`; words of one root are words to which Snowball gives one stem. The raw
ratio, mean cosine of words of one root over mean cosine of words of different roots, is what the paper prints (1.1186 for FuzzyTok and
for the LSTM, 1.0917, 1.0524). Before anything else it depends on how far all vectors point the same way: see the bag of bytes and the
untrained models. The gap is the difference of the two mean cosines after the mean of all vectors is taken off; the AUC is the
probability that a pair of one root is closer than a pair of two, by the same cosines: 0.5 is chance. In brackets the interval from
resampled families (95 %). Where there are several seeds, figure and bounds are means over them, and ± is the seeds' standard deviation."""


def _better(rows: dict[str, list[dict[str, Any]]], language: str) -> str:
    """Who tells words of one root from words of the same beginning better than FuzzyTok does, the hardest column."""
    scores = {
        label: statistics.mean(found) for label, some in rows.items() if (found := _values([row[language] for row in some], "auc_prefix"))
    }
    own = {label: score for label, score in scores.items() if label.startswith("FuzzyTok") and "untrained" not in label}
    if not own:
        return "Not measured yet: FuzzyTok, trained."
    best = max(own, key=own.__getitem__)
    others = sorted((label for label, score in scores.items() if score > own[best]), key=scores.__getitem__, reverse=True)
    better = ", ".join(f"{label} {scores[label]:.3f}" for label in others) or "none"
    return f"FuzzyTok's best AUC against words of the same beginning is {own[best]:.3f} ({best}). Better: {better}."


def _cells(rows: list[dict[str, Any]]) -> Iterator[str]:
    for name in COLUMNS:
        found = [row[name] for row in rows if None not in row[name]]
        values, low, high = zip(*found, strict=True) if found else ((), (), ())
        yield f"{spread(list(values), '.3f')} [{statistics.mean(low):.3f}, {statistics.mean(high):.3f}]" if found else "-"


def _values(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name][0] for row in rows if row[name][0] is not None]
