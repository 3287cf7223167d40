"""Beside each defect of the paper: what we measured of the same thing."""

import math
import statistics
from collections.abc import Callable
from typing import Any

from bench.paper import claims
from bench.paper.config import REFERENCE
from bench.paper.models import parameter_counts
from bench.paper.table2_text import Model, models

_MEMORY_RIVALS = ("bpe4096-conv", "bpe4096-transformer")  # of the two claims


def beside(key: str, figures: dict[str, Any]) -> str:
    """What we have to say to one defect, with what was measured; "not measured" where it was not."""
    try:
        return _BESIDE[key](figures)
    except (KeyError, StopIteration):
        return "not measured yet"


def _first(figures: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Model]]:
    corpus = next(iter(figures["table2"].values()))
    return corpus["facts"], models(corpus)


def _losses(figures: dict[str, Any]) -> str:
    _, found = _first(figures)
    bits = found[REFERENCE].measured("test")
    claimed = ", ".join(f"{loss:.4f} nats are {loss / math.log(2):.2f} bits per byte" for loss in claims.LOSSES)
    return f"{found[REFERENCE].label}: {bits:.3f} bits per byte of held-out text, {bits * math.log(2):.3f} nats. Of the paper's, {claimed}."


def _per_byte(figures: dict[str, Any]) -> str:
    facts, found = _first(figures)
    size = facts["bytes"]["train"] / facts["ids"]["bpe385"]
    ours, theirs = found[REFERENCE].measured("test"), found["bpe385-conv"].measured("test")
    converted = float(claims.BPE_LOSS) / size
    return (
        f"A token of our 385 stands for {size:.2f} bytes: the BPE Conv1D's {claims.BPE_LOSS} would be {converted:.2f} nats a byte beside"
        " FuzzyTok's 1.4110."
        f" Ours per byte: {ours:.3f} bits for FuzzyTok, {theirs:.3f} for the conv over 385 tokens."
    )


def _memory(figures: dict[str, Any]) -> str:
    _, found = _first(figures)
    peaks = [found[REFERENCE].measured("memory", shape) for shape in claims.MEMORY_SAVED]
    rivals = [found[name].measured("memory", shape) for name, shape in zip(_MEMORY_RIVALS, claims.MEMORY_SAVED, strict=True)]
    saved = _saved(peaks, rivals)
    return (
        f"{peaks[0]:,.0f} MiB and {peaks[1]:,.0f} MiB, {peaks[1] / peaks[0]:.2f} times as much for four times the bytes; saved against the"
        f" conv over BPE at the first and the Transformer over BPE at the second: {saved}." + _against_385(found.get("bpe385-conv"), peaks)
    )


def _saved(peaks: list[float], rivals: list[float]) -> str:
    return ", ".join(f"{1 - own / rival:.1%}" for own, rival in zip(peaks, rivals, strict=True))


def _against_385(rival: Model | None, peaks: list[float]) -> str:
    """The vocabulary that the paper's baselines seem to have had."""
    if rival is None:
        return ""
    saved = _saved(peaks, [rival.measured("memory", shape) for shape in claims.MEMORY_SAVED])
    return f" Against the conv over the 385 tokens that its parameter counts imply: {saved}."


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
    ratios = {name: statistics.mean(row[language]["ratio"][0] for row in corpus["rows"][name]) for name in names}
    return "; ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()) + f" ({language} words)"


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
    rows = [ops["forward"] for ops in figures["table1"]["rows"].values()]
    tiled = ", ".join(_times(row, "naive", "listing1") for row in rows)
    return f"{tiled}; our tuned kernels / its tiled one: " + ", ".join(_times(row, "listing1", "ours") for row in rows)


def _times(row: dict[str, Any], slower: str, faster: str) -> str:
    times = [row.get(name, {}).get("us") for name in (slower, faster)]
    return f"{times[0] / times[1]:.2f}x" if all(times) else "-"


def _traffic(figures: dict[str, Any]) -> str:
    rows = figures["table1"]["traffic"]["rows"]
    asked = {name: sum(row["requested"].values()) / (1 << 20) for name, row in rows.items() if row["requested"]}
    counted = {name: row["measured"]["l2"] / (1 << 20) for name, row in rows.items() if "l2" in row.get("measured", {})}
    text = "Asked for by the programs, MiB of x and weight: " + ", ".join(f"{name} {value:,.0f}" for name, value in asked.items())
    return text + ("; through the L2: " + ", ".join(f"{name} {value:,.0f}" for name, value in counted.items()) if counted else "")


def _cudnn(figures: dict[str, Any]) -> str:
    op = [ops["forward_backward"] for ops in figures["table1"]["rows"].values()][-1]
    times = op["conv1d_pad"]["us"] / op["ours"]["us"]
    return f"F.conv1d + F.pad takes {times:.2f} times our time, forward and backward, at the largest shape."


def _parameters(figures: dict[str, Any]) -> str:
    _, found = _first(figures)
    return "; ".join(f"{model.label}: {parameter_counts(model.size)[0]:,}" for model in found.values() if model.values("test"))


_BESIDE: dict[str, Callable[[dict[str, Any]], str]] = {
    "losses": _losses,
    "per_byte": _per_byte,
    "memory": _memory,
    "fields": _fields,
    "radical": _radical,
    "causality": _causality,
    "table1": _table1,
    "tensor_cores": lambda figures: "bf16 products on the tensor cores of the GPU named above",
    "versions": lambda figures: "those of each table stand above",
    "cudnn": _cudnn,
    "corpus": lambda figures: "Pinned packages, a split by document, seeds and their spread; training bytes are counted, not epochs.",
    "traffic": _traffic,
    "parameters": _parameters,
}
