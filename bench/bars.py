"""The bars: what the kernels are held to, each computed from a run."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from bench.grid import DILATIONS, FP32_SHAPES, GRID, HOST_SHAPES, LARGE, PAPER_FORMS, PYTORCH_FORMS, SMALL, Shape
from bench.results import Run

_FORWARDS = ("forward", "input_grad")
_PAIR = ("forward", "forward_backward")
_HOLDS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, ">": operator.gt}


class Bar(NamedTuple):
    """One line of the table of bars."""

    what: str
    bar: str
    measured: str
    verdict: str  # "met", "missed", "incomplete" where rows are missing and those there hold, "" where nothing is asked


def bars(run: Run) -> list[Bar]:
    """All bars, judged by `run`. Ratios are within the run; none is rounded before it is judged."""
    return [
        *(bar for op in _FORWARDS for bar in _against_gemm(run, op, LARGE, 0.82, 1.03, ">= 2^16 tokens")),
        *(bar for op in _FORWARDS for bar in _roofline(run, op)),
        *_against_gemm(run, "weight_grad", LARGE, 0.85, 1.08, ">= 2^16 tokens"),
        *_against_gemm(run, "weight_grad", GRID, 0.85, 1.08, "whole grid"),
        *_faster(run, "against F.conv1d+pad", "main", ("conv1d_pad",), 4.0, 1.8),
        *_faster(run, "against the best PyTorch form", "main", PYTORCH_FORMS, 2.0, 1.2),
        *_faster(run, "channels-first against F.conv1d+pad", "channels_first", ("conv1d_pad",), 2.5, 1.2),
        *_small(run),
        *_dtypes(run),
        *_host(run),
        *_dilation(run),
        Bar(
            "packing and other preparation per call",
            "inside every figure",
            "ours takes the parameter as the module keeps it",
            "by construction",
        ),
    ]


def _against_gemm(run: Run, op: str, shapes: Sequence[Shape], mean: float, worst: float, which: str) -> list[Bar]:
    ratios = {shape: _ratio(run.time("main", op, "ours", shape), run.time("main", op, "gemm", shape)) for shape in shapes}
    what = f"{op} / GEMM, {which}"
    return [_mean(what, ratios, "<=", mean), _worst(what, ratios, "<=", worst)]


def _roofline(run: Run, op: str) -> list[Bar]:
    def shares(low: int, high: int) -> dict[Shape, float | None]:
        rows = {shape: run.get("main", op, "ours", shape) for shape in LARGE if low <= shape.c_in <= high}
        return {shape: row.roofline_share if row else None for shape, row in rows.items()}

    return [
        _worst(f"{op}, share of the roofline, >= 2^16 tokens, 128 <= C <= 384", shares(128, 384), ">=", 0.85),
        _worst(f"{op}, share of the roofline, >= 2^16 tokens, C = 512 and 1024", shares(512, 1024), ">=", 0.90),
    ]


def _faster(run: Run, what: str, section: str, rivals: Sequence[str], mean: float, worst: float) -> list[Bar]:
    op = "forward_backward"
    speedups = {shape: _ratio(run.best("main", op, rivals, shape), run.time(section, op, "ours", shape)) for shape in GRID}
    return [_mean(f"{op}, times faster, {what}", speedups, ">=", mean), _worst(f"{op}, times faster, {what}", speedups, ">=", worst)]


def _small(run: Run) -> list[Bar]:
    rivals = (*PYTORCH_FORMS, *PAPER_FORMS)
    speedups = _each(_PAIR, SMALL, lambda op, shape: _ratio(run.best("main", op, rivals, shape), run.time("main", op, "ours", shape)))
    bounds = _each(_PAIR, SMALL, lambda op, shape: _ratio(run.time("main", op, "gemm", shape), run.time("main", op, "ours", shape)))
    return [
        _worst("small shapes, times faster than the best rival", speedups, ">", 1.0),
        _worst("small shapes, times faster than the GEMM (a bound)", bounds, ">", None),
    ]


def _dtypes(run: Run) -> list[Bar]:
    halves = _each(_PAIR, GRID, lambda op, shape: _ratio(run.time("fp16", op, "ours", shape), run.beside("fp16", op, shape)))

    def speedups(dtype: str) -> dict[str, float | None]:
        return _each(_PAIR, FP32_SHAPES, lambda op, shape: _ratio(*(run.time(dtype, op, rival, shape) for rival in ("conv1d_pad", "ours"))))

    return [
        _worst("fp16 / bf16", halves, "<=", 1.05),
        _worst("fp32 with TF32, times faster than F.conv1d+pad", speedups("tf32"), ">=", 1.5),
        _worst("fp32 strict, times faster than F.conv1d+pad", speedups("fp32"), ">=", 1.0),
    ]


def _host(run: Run) -> list[Bar]:
    def ratios(op: str) -> dict[Shape, float | None]:
        return {shape: _ratio(*(run.time("host", op, rival, shape) for rival in ("ours", "conv1d_pad"))) for shape in HOST_SHAPES}

    return [
        _worst("host cost / F.conv1d+pad's, no grad", ratios("forward"), "<=", 0.6),
        _worst("host cost / F.conv1d+pad's, forward + backward", ratios("forward_backward"), "<=", 0.8),
    ]


def _dilation(run: Run) -> list[Bar]:
    shapes = [Shape(32, 2048, 256, 256, 3, d) for d in DILATIONS]
    times = _each(_PAIR, shapes, lambda op, shape: _ratio(run.time("dilation", op, "ours", shape), run.beside("dilation", op, shape)))
    return [_worst("d from 1 to 512 / d = 1", times, "<=", 1.05)]


# ---- a bar from its values, by row


def _mean(what: str, values: Mapping, sign: str, limit: float) -> Bar:
    mean = geometric_mean(_known(values).values())
    return judged(f"{what}, geometric mean", values, mean, "", sign, limit)


def _worst(what: str, values: Mapping, sign: str, limit: float | None) -> Bar:
    known = _known(values)
    worst = (max if sign == "<=" else min)(known, key=lambda key: known[key], default=None)
    return judged(f"{what}, worst", values, known.get(worst), f" ({worst})", sign, limit)


def judged(what: str, values: Mapping, value: float | None, where: str, sign: str, limit: float | None) -> Bar:
    """A bar whose `value` was made of `values`, None of which is a row that is missing; `where` says where it is from."""
    missing = len(values) - len(_known(values))
    measured = "not measured" if value is None else f"{value:.3f}{where}"
    if missing and value is not None:
        measured += f"; {missing} of {len(values)} rows missing"
    return Bar(what, "for reference" if limit is None else f"{sign} {limit:g}", measured, _verdict(value, sign, limit, missing))


def _verdict(value: float | None, sign: str, limit: float | None, missing: int) -> str:
    if limit is None:
        return ""
    if value is not None and not _HOLDS[sign](value, limit):
        return "missed"
    return "incomplete" if missing else "met"


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _known(values: Mapping) -> dict:
    return {key: value for key, value in values.items() if value is not None}


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _each(ops: Iterable[str], shapes: Iterable[Shape], value: Callable[[str, Shape], float | None]) -> dict[str, float | None]:
    return {f"{op} {shape}": value(op, shape) for op in ops for shape in shapes}
