"""The radical ratio's table: the runs of Table 2, their models before training, a bag of bytes and character trigrams."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.paper.bundle import Bundle
from bench.paper.config import Settings
from bench.paper.prepare import path_of
from bench.paper.radical import of_baselines
from bench.paper.runs import Place, outcomes
from bench.report import table

COLUMNS = {
    "ratio": "raw ratio",
    "gap": "centred gap",
    "auc_random": "AUC, random words",
    "auc_prefix": "AUC, same first 3 letters",
}


def measure(work: Path, corpora: list[str], settings: Settings, place: Place, table2: dict[str, Any]) -> dict[str, Any]:
    """By corpus, row and language; what Table 2 has not trained is trained now.

    Raises:
        OutOfTimeError: not all of it could be.
    """
    figures: dict[str, Any] = {}
    for name in corpora:
        bundle = Bundle.load(path_of(work, name))
        rows: dict[str, list[dict[str, Any]]] = {label: [row] for label, row in of_baselines(bundle).items()}
        found = [each for each in outcomes(bundle, settings, place, table2.get(name, {}).get("runs", {})) if each.run.model.trained]
        for outcome in found:
            if outcome.run.seed == settings.seeds[name][0]:
                rows[f"{outcome.run.model.label}, untrained"] = [outcome.untrained()]
        for outcome in found:
            outcome.evaluate()
            rows.setdefault(outcome.run.model.label, []).append(outcome.figures["radical"])
        figures[name] = {"rows": rows, "languages": list(bundle.facts["families"])}
    return figures


def text(figures: dict[str, Any]) -> str:
    """The tables in markdown."""
    parts = ["## The radical ratio", _METHOD]
    for corpus, found in figures.items():
        for language in found["languages"]:
            lines = [(label, *_cells([row[language] for row in rows])) for label, rows in found["rows"].items()]
            counts = next(iter(found["rows"].values()))[0][language]["counts"]
            parts.append(
                f"### {language.capitalize()} words, models of the {corpus} corpus\n\n"
                f"{counts['families']} families of {counts['words']} words; {counts['same']:,} pairs of one family, "
                f"{counts['random']:,} random ones, {counts['prefix']:,} with the same first letters."
            )
            parts.append(table(("", *COLUMNS.values()), lines))
    return "\n\n".join(parts)


_METHOD = """\
e(w) is the mean of the final states over the ids of `" " + w`; words of one root are words to which Snowball gives one stem. The raw
ratio, mean cosine of words of one root over mean cosine of words of different roots, is what the paper prints (1.1186 for FuzzyTok and
for the LSTM, 1.0917, 1.0524). Before anything else it depends on how far all vectors point the same way: see the bag of bytes and the
untrained models. The gap is the difference of the two mean cosines after the mean of all vectors is taken off; the AUC is the
probability that a pair of one root is closer than a pair of two, by the same cosines: 0.5 is chance. In brackets the interval of the
first seed from resampled families (95 %); where there are several seeds, the figure before it is their mean."""


def _cells(rows: list[dict[str, Any]]) -> Iterator[str]:
    for name in COLUMNS:
        values = [row[name][0] for row in rows if row[name][0] is not None]
        low, high = rows[0][name][1:]
        yield f"{statistics.mean(values):.3f} [{low:.3f}, {high:.3f}]" if values and low is not None else "-"
