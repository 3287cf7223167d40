"""`report.md`: the three tables, the pictures, and the paper's defects with our figures beside them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.paper import claims, pictures, radical_table, table1, table2_text
from bench.paper.config import REFERENCE
from bench.report import table

TABLES = ("table1", "table2", "radical")
_RENDER: dict[str, Callable[[dict[str, Any]], str]] = {"table1": table1.text, "table2": table2_text.text, "radical": radical_table.text}


def read(folder: Path) -> dict[str, Any]:
    """What is stored of each table, by its name: {"facts", "figures"}."""
    paths = {name: folder / f"{name}.json" for name in TABLES}
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
    parts += [_RENDER[name](figures[name]) for name in TABLES if name in figures]
    if "table2" in figures:
        parts += [f"![{path.stem}]({path.name})" for path in _pictures(figures["table2"], folder)]
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
            f"- {name}: {facts['date']}, {facts['device']}, commit {facts['commit'] or 'unknown'}; {versions}; {facts['seconds']:.0f} s.{left}"
        )
    return ["\n".join(lines)]


def _pictures(table2: dict[str, Any], folder: Path) -> list[Path]:
    try:
        return pictures.draw(table2, folder)
    except ModuleNotFoundError:  # matplotlib; the tables say the same
        return []


def _defects(figures: dict[str, Any]) -> str:
    lines = ((what, beside(key, figures)) for what, key in claims.DEFECTS)
    return "## What is wrong with the paper's figures, and ours beside them\n\n" + table(("in the paper", "here"), lines)


def beside(key: str, figures: dict[str, Any]) -> str:
    """What we have to say to one defect, with what was measured; "not measured" where it was not."""
    try:
        return _BESIDE[key](figures)
    except (KeyError, StopIteration, TypeError, ZeroDivisionError):
        return "not measured yet"


def _first(figures: dict[str, Any]) -> tuple[dict[str, Any], dict[str, table2_text.Model]]:
    corpus = next(iter(figures["table2"].values()))
    return corpus["facts"], table2_text.models(corpus)


def _losses(figures: dict[str, Any]) -> str:
    _, found = _first(figures)
    bits = found[REFERENCE].mean("test")
    claimed = ", ".join(f"{loss:.4f} nats are {loss / math.log(2):.2f} bits per byte" for loss in claims.LOSSES)
    return f"{found[REFERENCE].label}: {bits:.3f} bits per byte of held-out text, {bits * math.log(2):.3f} nats. Of the paper's, {claimed}."  # type: ignore[operator]


def _per_byte(figures: dict[str, Any]) -> str:
    facts, found = _first(figures)
    size = facts["bytes"]["train"] / facts["ids"]["bpe385"]
    ours, theirs = found[REFERENCE].mean("test"), found["bpe385-conv"].mean("test")
    converted = float(claims.BPE_LOSS) / size
    return (
        f"A token of our 385 stands for {size:.2f} bytes: the BPE Conv1D's {claims.BPE_LOSS} would be {converted:.2f} nats a byte, less than 1.4110."
        f" Ours per byte: {ours:.3f} bits for FuzzyTok, {theirs:.3f} for the conv over 385 tokens."
    )


def _memory(figures: dict[str, Any]) -> str:
    _, found = _first(figures)
    peaks = [found[REFERENCE].mean("memory", shape) for shape in claims.MEMORY_SAVED]
    return f"{peaks[0]:,.0f} MiB and {peaks[1]:,.0f} MiB, {peaks[1] / peaks[0]:.2f} times as much for four times the bytes; in % against each rival below."  # type: ignore[operator]


def _fields(figures: dict[str, Any]) -> str:
    _, found = _first(figures)
    checked = {name: found[name].runs[0]["figures"]["causality"] for name in ("fuzzytok-29", REFERENCE)}
    return (
        "; ".join(f"{found[name].label}: {check['reach']} by its gradients" for name, check in checked.items())
        + ". Both are rows of Table 2."
    )


def _radical(figures: dict[str, Any]) -> str:
    corpus = next(iter(figures["radical"].values()))
    language = corpus["languages"][0]
    names = ("bag of bytes", "FuzzyTok, RF 43, untrained", "FuzzyTok, RF 43", "byte LSTM")
    return "; ".join(f"{name} {corpus['rows'][name][0][language]['ratio'][0]:.3f}" for name in names) + f" ({language})"


def _causality(figures: dict[str, Any]) -> str:
    _, found = _first(figures)
    tested = [model for model in found.values() if model.values("test")]
    passed = [
        model
        for model in tested
        if all(run["figures"]["causality"]["bit_equal"] and run["figures"]["causality"]["gradient"] for run in model.runs)
    ]
    return f"{len(passed)} of {len(tested)} models pass, recurrent ones and Transformers included."


def _table1(figures: dict[str, Any]) -> str:
    return f"One convolution of 256 channels, forward and training apart, for {len(figures['table1']['rows'])} shapes."


def _traffic(figures: dict[str, Any]) -> str:
    rows = figures["table1"]["traffic"]["rows"]
    sums = {name: sum(row["requested"].values()) / (1 << 20) for name, row in rows.items() if row["requested"]}
    return "Asked for by the programs, MiB of x and weight: " + ", ".join(f"{name} {value:,.0f}" for name, value in sums.items())


def _cudnn(figures: dict[str, Any]) -> str:
    op = [ops["forward_backward"] for ops in figures["table1"]["rows"].values()][-1]
    return f"F.conv1d + F.pad takes {op['conv1d_pad']['us'] / op['ours']['us']:.2f} times our time, forward and backward, at the largest shape."


def _parameters(figures: dict[str, Any]) -> str:
    _, found = _first(figures)
    return "; ".join(f"{model.label}: {table2_text._parameters(model)[0]:,}" for model in found.values() if model.values("test"))


_BESIDE: dict[str, Callable[[dict[str, Any]], str]] = {
    "losses": _losses,
    "per_byte": _per_byte,
    "memory": _memory,
    "fields": _fields,
    "radical": _radical,
    "causality": _causality,
    "table1": _table1,
    "tensor_cores": lambda figures: "bf16 products on the tensor cores of the GPU named above; fp32 is a row of the op's own bench.",
    "versions": lambda figures: "The versions of each table stand above.",
    "cudnn": _cudnn,
    "corpus": lambda figures: "Pinned packages, a split by document, seeds and their spread; training bytes are counted, not epochs.",
    "traffic": _traffic,
    "parameters": _parameters,
}
