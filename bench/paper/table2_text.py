"""Table 2 in markdown: quality, costs, causality, robustness, and the columns that FuzzyTok loses."""

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from bench.paper.claims import MEMORY_SAVED, TABLE2
from bench.paper.config import REFERENCE, model_names
from bench.paper.models import Size, parameter_counts
from bench.paper.noises import LABELS, NOISES
from bench.report import table

Runs = list[dict[str, Any]]  # of one model, by seed: "run" and "figures"
_SPEEDS = ("training MB/s", "compiled MB/s", "share of forward + backward alone")
_SHARE_BAR = 0.60


class Model(NamedTuple):
    """The runs of one model on one corpus, and what they have in common."""

    name: str
    label: str
    size: Size
    bytes_per_id: float
    runs: Runs

    def values(self, *path: str) -> list[float]:
        """The figure at `path` of every run that has it."""
        found = []
        for run in self.runs:
            value: Any = run["figures"]
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None and not isinstance(value, dict):
                found.append(value)
        return found

    def mean(self, *path: str) -> float | None:
        return statistics.mean(values) if (values := self.values(*path)) else None

    def measured(self, *path: str) -> float:
        """The mean; KeyError if there is none."""
        if not self.values(*path):
            raise KeyError(path)
        return statistics.mean(self.values(*path))

    def curve(self) -> list[tuple[float, float]]:
        """(bytes trained on, bits per byte of the validation part) of each point, the mean over the seeds."""
        curves = [
            [(row["bytes"], row["validation"]) for row in training["curve"] if "validation" in row]
            for run in self.runs
            if (training := run["figures"].get("training"))
        ]
        rows = zip(*curves, strict=False)
        return [(statistics.mean(size for size, _ in row), statistics.mean(bits for _, bits in row)) for row in rows]

    @property
    def rate(self) -> float:
        """The highest of training."""
        return self.runs[0]["run"]["model"]["rate"]

    @property
    def flops_per_byte(self) -> float:
        """Of a forward pass."""
        return self.size.flops(self.runs[0]["run"]["length"]) / self.bytes_per_id


def models(corpus: dict[str, Any]) -> dict[str, Model]:
    """By name, those with figures, in the order of the configs."""
    found: dict[str, Model] = {}
    names = model_names()
    for each in sorted(corpus["runs"].values(), key=lambda each: (names.index(each["run"]["model"]["name"]), each["run"]["seed"])):
        config = each["run"]["model"]
        facts = corpus["facts"]
        bytes_per_id = facts["bytes"]["train"] / facts["ids"][config["vocabulary"]]
        fresh = Model(config["name"], config["label"], Size(**each["run"]["size"]), bytes_per_id, [])
        found.setdefault(config["name"], fresh).runs.append(each)
    return found


def spread(values: list[float], form: str) -> str:
    """The mean, and ± the standard deviation where there are several."""
    deviation = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def text(figures: dict[str, Any]) -> str:
    """All of it, by corpus."""
    parts = ["## Table 2", _METHOD]
    for name, corpus in figures.items():
        found = models(corpus)
        parts += [f"### The {name} corpus", _corpus(corpus["facts"]), _windows(corpus["facts"], found)]
        parts += [_quality(corpus["facts"], found), *_reservations(corpus["facts"], found)]
        parts += [_robustness(found), _causality(corpus["facts"], found)]
        if costs := _costs(found):
            parts.append(costs)
        parts.append(_lost(found))
    parts += ["### The paper's Table 2", _paper()]
    return "\n\n".join(parts)


_METHOD = """\
All models see the same bytes in training, in windows of as many bytes, and spend as many FLOPs on a byte (of a forward pass; a training
step takes three times that): their widths are chosen to match FuzzyTok with a receptive field of 43. Bits per byte are Σ NLL / (ln 2 ·
UTF-8 bytes) of the whole test part, every token and every end mark counted, each scored with at least half a window before it; loss
(nats) and perplexity are of a byte too. Mean ± standard deviation over the seeds, which draw a model's first values and the order of its
windows; the split is one, and what other test documents would change is not in it. Which learning rates were tried stands at the end."""


def _corpus(facts: dict[str, Any]) -> str:
    sources = "; ".join(f"{name}, {each['documents']:,} documents, {each['bytes'] / 1e6:.1f} MB" for name, each in facts["sources"].items())
    tokens = ", ".join(f"{name} {facts['bytes']['train'] / count:.2f}" for name, count in facts["ids"].items())
    sizes = ", ".join(f"{part} {size / 1e6:.2f} MB in {facts['documents'][part]:,} documents" for part, size in facts["bytes"].items())
    return (
        f"{sources}; after duplicates were removed. Split by document: {sizes}. sha256 of the test part: `{facts['sha256']['test'][:16]}`. "
        f"Bytes a token: {tokens}."
    )


def _windows(facts: dict[str, Any], found: dict[str, Model]) -> str:
    settings = [run["run"]["settings"] for model in found.values() for run in model.runs][:1]
    return "".join(
        f"Training windows of {each['window']} bytes, {each['batch']} of them a step; {each['train_mib']:g} MiB, which are"
        f" {each['train_mib'] * (1 << 20) / facts['bytes']['train']:.1f} passes over the training part."
        for each in settings
    )


def _reservations(facts: dict[str, Any], found: dict[str, Model]) -> Iterator[str]:
    """What a reader must know before the bits per byte are compared."""
    tested = [model for model in found.values() if model.values("test")]
    if few := [model.label for model in tested if len(model.values("test")) == 1]:
        whose = "every model" if len(few) == len(tested) else "; ".join(few)
        yield f"One seed of {whose}: what is chance and what a difference cannot be told apart."
    if overfit := [label for model in tested if (label := _overfit(model))]:
        yield (
            f"Over-fitted: the validation part was best before the end of training ({'; '.join(overfit)}). The figures above are of the end"
            " all the same, for every model has the same bytes."
        )
    if beaten := [model.label for model in tested if model.measured("test") > facts["xz"]]:
        yield (
            f"xz does better than {len(beaten)} of the {len(tested)} models here: {'; '.join(beaten)}. It learns from the test part as it"
            " goes and copies what it met anywhere before; a model sees its window alone."
        )


def _overfit(model: Model) -> str | None:
    """How much of the validation part's best was lost by the end, if more than a hundredth, in the mean over the seeds."""
    bits = [bits for _, bits in model.curve()]
    return f"{model.label} {min(bits):.2f}, then {bits[-1]:.2f}" if bits and bits[-1] > 1.01 * min(bits) else None


def _quality(facts: dict[str, Any], found: dict[str, Model]) -> str:
    header = (
        "",
        "bits/byte",
        "loss",
        "perplexity",
        "learning rate",
        "width",
        "parameters",
        "without embedding",
        "FLOPs/byte",
        "receptive field, bytes",
        "training MiB",
        "seeds",
    )
    lines = []
    for model in found.values():
        if values := model.values("test"):
            total, inner = parameter_counts(model.size)
            cells = [
                spread(values, ".4f"),
                spread([bits * math.log(2) for bits in values], ".4f"),
                spread([2**bits for bits in values], ".3f"),
            ]
            field = model.size.receptive_field
            reach = "no limit" if field is None else f"{field * model.bytes_per_id:.0f}"
            cells += [f"{model.rate:g}", str(model.size.width), f"{total:,}", f"{inner:,}", f"{model.flops_per_byte / 1e6:.2f} M", reach]
            cells += [f"{(model.mean('training', 'bytes') or 0) / (1 << 20):.1f}", str(len(values))]
            lines.append((model.label, *cells))
    for label, name in (("byte 5-gram (Witten-Bell)", "5-gram"), ("xz -9e, the test part alone", "xz")):
        mean = facts[name]
        lines.append((label, f"{mean:.4f}", f"{mean * math.log(2):.4f}", f"{2**mean:.3f}", *[""] * 8))
    return table(header, lines)


def _robustness(found: dict[str, Model]) -> str:
    lines = []
    for model in found.values():
        if clean := model.values("robustness", "none"):
            lines.append((model.label, spread(clean, ".3f"), *(spread(_more(model, noise), "+.3f") for noise in NOISES)))
    title = (
        "#### Robustness\n\nBits per byte of some documents of the test part, and how many more with each noise. A model that has learnt"
        " little has little to lose.\n\n"
    )
    return title + table(("", "no noise", *(LABELS[noise] for noise in NOISES)), lines)


def _causality(facts: dict[str, Any], found: dict[str, Model]) -> str:
    lines = []
    for model in found.values():
        checks = [run["figures"]["causality"] for run in model.runs if "causality" in run["figures"]]
        if checks:
            equal, gradient = (all(check[name] for check in checks) for name in ("bit_equal", "gradient"))
            field, reach = model.size.receptive_field, max(check["reach"] for check in checks)
            exact = (
                f"{field} of {field}" if field and all(check["exact"] for check in checks) else f"{reach} of {field or checks[0]['length']}"
            )
            moved = facts["changed_by_the_future"].get(model.runs[0]["run"]["model"]["vocabulary"])
            lines.append((model.label, _yes(equal), _yes(gradient), exact, "none" if moved is None else f"{moved:.1%} of cuts"))
    title = (
        "#### Causality\n\nOf the trained models, in ids. A token itself is not causal in bytes: the last column says how often other"
        " bytes behind a token's end change it, or a token before it.\n\n"
    )
    header = (
        "",
        "earlier outputs bit-equal",
        "no gradient from later",
        "ids seen, of the field or the text",
        "tokens that the future changes",
    )
    return title + table(header, lines)


def _costs(found: dict[str, Model]) -> str | None:
    """Of the models that were timed; the savings are FuzzyTok's."""
    timed = [model for model in found.values() if model.values("memory", "16x1024") or model.values("speed", "step_ms")]
    if not timed:
        return None
    ours = {shape: found[REFERENCE].mean("memory", shape) if REFERENCE in found else None for shape in MEMORY_SAVED}
    lines = []
    for model in timed:
        cells = []
        for shape, own in ours.items():
            peak = model.mean("memory", shape)
            cells += [
                "failed" if peak is None else f"{peak:,.0f}",
                "-" if not peak or not own or model.name == REFERENCE else _less(1 - own / peak),
            ]
        lines.append((model.label, *cells, *_speeds(model)))
    name = found[REFERENCE].label if REFERENCE in found else "FuzzyTok"
    header = ("", "MiB, 16 x 1024 bytes", f"{name} takes", "MiB, 32 x 2048 bytes", f"{name} takes", *_SPEEDS)
    bar = "".join(_bar(found[REFERENCE]) if REFERENCE in found else ())
    return _COSTS + table(header, lines) + bar + _not_measured(found) + _not_compiled(timed)


_COSTS = """\
#### Costs

Peak of all that is allocated in a training step launched op by op, at equal bytes, in MiB (2^20 bytes; the paper's are MB). The paper
claims to save 38.1 % at 16 x 1024 against its conv over BPE and 95.7 % at 32 x 2048 against its Transformer. Training speed is in source
bytes (10^6), waited for step by step, the median of at least 50 steps, each one CUDA graph; compiled is the same step with forward and
backward compiled by PyTorch, LSTM layers cuDNN's all the same (its memory was not measured, and may be less for what is many small ops, as
a Transformer is); the last column is training's share of the speed of forward and backward alone, without optimiser and data, which is
what the model bench times. Speed and memory are not of the architecture alone: the convolutions over BPE run on our kernels too, FuzzyTok
without them is the row of F.conv1d; and all are matched to RF 43, whose 256 channels suit kernels best, where the others have the width
that the FLOPs ask for, as RF 29 does.

"""


def _less(saved: float) -> str:
    return f"{saved:.1%} less" if saved >= 0 else f"{-saved:.1%} more"


def _not_measured(found: dict[str, Model]) -> str:
    labels = [model.label for model in found.values() if not any("speed" in run["figures"] for run in model.runs)]
    return f"\n\nNot measured yet, or in part: {'; '.join(labels)}." if labels else ""


def _not_compiled(timed: list[Model]) -> str:
    labels = [model.label for model in timed if not any("compiled_ms" in run["figures"] for run in model.runs)]
    whose = "any model" if len(labels) == len(timed) else "; ".join(labels)
    small = "What is many small ops, as a Transformer is, may gain most by it, in speed and memory."
    return f"\n\nNot measured yet: the step of {whose} compiled by PyTorch. {small}" if labels else ""


def _speeds(model: Model) -> Iterator[str]:
    trained, compiled, share = _training_rate(model), _compiled_rate(model), _share(model)
    seeds = [rate / 1e6 for rate in model.values("training", "bytes_per_s")]
    yield "-" if trained is None else spread(seeds or [trained / 1e6], ".2f")
    yield "-" if compiled is None else f"{compiled / 1e6:.2f}"
    yield "-" if share is None else f"{share:.0%}"


def _bar(model: Model) -> Iterator[str]:
    """Of the whole training against the model bench's way of timing the model."""
    if (share := _share(model)) is not None:
        verdict = "met" if share >= _SHARE_BAR else "**missed**"
        yield f"\n\nBar: {model.label} trains at >= {_SHARE_BAR:.0%} of the speed of forward and backward alone: {share:.1%}, {verdict}."


def _share(model: Model) -> float | None:
    trained, alone = _training_rate(model), model.mean("speed", "model_ms")
    return trained * alone / 1e3 / _step_bytes(model) if trained and alone else None


def _training_rate(model: Model) -> float | None:
    """Bytes a second of its runs; of a model that is not trained, of its step."""
    step = model.mean("speed", "step_ms")
    return model.mean("training", "bytes_per_s") or (step and _step_bytes(model) / step * 1e3)


def _step_bytes(model: Model) -> float:
    run = model.runs[0]["run"]
    return run["settings"]["batch"] * run["length"] * model.bytes_per_id


class _Column(NamedTuple):
    """Of a model: its value, None where it has none, whether more of it is better, and how it is printed."""

    value: Callable[[Model], float | None]
    more_is_better: bool = False
    form: str = ".3f"


def _lost(found: dict[str, Model]) -> str:
    """Every column in which another model is better than a FuzzyTok, for each of the two."""
    ours = [model for model in found.values() if model.name.startswith("fuzzytok") and model.values("test")]
    rivals = [model for model in found.values() if not model.name.startswith("fuzzytok")]
    columns = {
        "bits, loss and perplexity per byte": _Column(lambda model: model.mean("test")),
        "training MB/s": _Column(lambda model: _mega(model.mean("training", "bytes_per_s")), True, ".2f"),
        "training MB/s, compiled": _Column(lambda model: _mega(_compiled_rate(model)), True, ".2f"),
        "parameters": _Column(lambda model: parameter_counts(model.size)[0], form=",d"),
        "parameters without embedding": _Column(lambda model: parameter_counts(model.size)[1], form=",d"),
        "FLOPs/byte, M (matched, as far as widths go)": _Column(lambda model: model.flops_per_byte / 1e6, form=".2f"),
        **{f"MiB at {shape} bytes": _Column(functools.partial(_peak, shape=shape), form=",.0f") for shape in MEMORY_SAVED},
        **{f"noise, {LABELS[noise]}": _Column(functools.partial(_mean_more, noise=noise), form="+.3f") for noise in NOISES},
    }
    lines = [line for name, column in columns.items() for model in ours if (line := _beaten(name, column, model, rivals))]
    body = table(("column", "FuzzyTok", "better than that"), lines) if lines else "Nowhere."
    return f"#### Where FuzzyTok loses\n\n{body}"


def _beaten(name: str, column: _Column, own: Model, rivals: list[Model]) -> tuple[str, str, str] | None:
    """The line of the column, if a rival is better in it."""
    value, sign = column.value(own), -1 if column.more_is_better else 1
    theirs = [(each, model.label) for model in rivals if (each := column.value(model)) is not None]
    if value is None:
        return None
    better = sorted((pair for pair in theirs if sign * pair[0] < sign * value), key=lambda pair: sign * pair[0])
    if not better:
        return None
    return name, f"{value:{column.form}} ({own.label})", ", ".join(f"{each:{column.form}} ({label})" for each, label in better)


def _mega(value: float | None) -> float | None:
    return value and value / 1e6


def _compiled_rate(model: Model) -> float | None:
    milliseconds = model.mean("compiled_ms")
    return milliseconds and _step_bytes(model) / milliseconds * 1e3


def _peak(model: Model, shape: str) -> float | None:
    return model.mean("memory", shape)


def _more(model: Model, noise: str) -> list[float]:
    """Bits per byte that the noise adds, of each seed."""
    pairs = zip(model.values("robustness", noise), model.values("robustness", "none"), strict=True)
    return [noisy - clean for noisy, clean in pairs]


def _mean_more(model: Model, noise: str) -> float | None:
    return statistics.mean(values) if (values := _more(model, noise)) else None


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def _paper() -> str:
    columns = list(TABLE2["parameters"])
    return table(("as printed", *columns), ((name, *(str(row[column]) for column in columns)) for name, row in TABLE2.items()))
