"""`report.md`: the three tables, the pictures, and the paper's defects with our figures beside them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.paper import claims, pictures, radical_table, sweep, table1, table2_text
from bench.paper.beside import beside
from bench.report import table

TABLES = ("table1", "table2", "radical")
EXTRA = ("sweep",)  # learning rates, which are no table of the paper
_RENDER: dict[str, Callable[[dict[str, Any]], str]] = {
    "table1": table1.text,
    "table2": table2_text.text,
    "radical": radical_table.text,
    "sweep": sweep.text,
}


def read(folder: Path) -> dict[str, Any]:
    """What is stored of each table, by its name: {"facts", "figures"}."""
    paths = {name: folder / f"{name}.json" for name in (*TABLES, *EXTRA)}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def write(folder: Path) -> Path:
    """Write the report into `folder`, from the tables that lie there; its path.

    Raises:
        FileNotFoundError: there are none.
    """
    stored = read(folder)
    if not stored:
        raise FileNotFoundError(f"{folder} has no tables: run table1, table2 or radical first")
    figures = {name: each["figures"] for name, each in stored.items()}
    parts = ["# The FuzzyTok paper's evaluation, run again", *_heads(stored), _defects(figures)]
    parts += [_RENDER[name](figures[name]) for name in (*TABLES, *EXTRA) if name in figures]
    if "table2" in figures:
        parts += ["## Pictures", *(f"![{path.stem}]({path.name})" for path in _pictures(figures["table2"], folder))]
    missing = [name for name in TABLES if name not in figures]
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}.")
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _heads(stored: dict[str, Any]) -> list[str]:
    lines = []
    for name, each in stored.items():
        facts = each["facts"]
        versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items() if version)
        left = f" **Not finished: {facts['left']}.**" if facts.get("left") else ""
        lines.append(
            f"- {name}: {facts['date']}, {facts['device']}, commit {', '.join(facts['commits'])}; {versions};"
            f" {facts['seconds']:.0f} s of all processes together.{left}"
        )
    return ["\n".join(lines)]


def _pictures(table2: dict[str, Any], folder: Path) -> list[Path]:
    try:
        return pictures.draw(table2, folder)
    except ModuleNotFoundError:  # matplotlib; the tables say the same
        return []


def _defects(figures: dict[str, Any]) -> str:
    lines = ((printed, beside(key, figures), why) for printed, key, why in claims.DEFECTS)
    return "## The paper's figures, ours, and why they differ\n\n" + table(("the paper's", "ours", "why they differ"), lines)
