"""Table 1 of the paper: tokens a second of the naive kernel, of Listing 1, of ours and of F.conv1d, forward and training."""

import functools
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.grid import PAPER_SHAPES, SMALL, Case, Shape
from bench.measure import DEVICE, Calls, Data, Round, rotation, switches
from bench.model.attempts import attempted, free
from bench.paper import traffic
from bench.precompile import compile_kernels
from bench.report import table

RIVALS = {
    "naive": "naive Triton",
    "listing1": "Listing 1",
    "conv1d_pad": "F.conv1d + F.pad",
    "conv2d_trim": "conv2d channels_last",
    "ours": "ours",
}
PAPER = {(1, 128): (36_491, 56_186), (8, 256): (63_026, 135_239), (16, 512): (63_319, 142_790), (32, 1024): (43_969, 195_930)}
_FORWARD_ONLY = ("naive", "listing1")  # the paper has no backward kernel
_ROUNDS, _LAUNCHED = 15, 50


def measure() -> dict[str, Any]:
    """Every row, by shape, op and rival; the traffic of the largest shape. On the CPU two shapes, and what runs there."""
    shapes = PAPER_SHAPES if DEVICE == "cuda" else SMALL
    rows: dict[str, Any] = {}
    if DEVICE == "cuda":
        own = [Case("main", "forward_backward", "ours", shape) for shape in shapes]
        compile_kernels([*own, *(Case("main", "forward", name, shapes[0]) for name in _FORWARD_ONLY)])
    for shape in shapes:
        rows[str(shape)] = {op: _rows(shape, op) for op in ("forward", "forward_backward")}
    return {"rows": rows, "traffic": _traffic(shapes[-1], rows[str(shapes[-1])]["forward"])}


def _rows(shape: Shape, op: str) -> dict[str, Any]:
    names = [name for name in RIVALS if DEVICE == "cuda" or name not in _FORWARD_ONLY]
    return {name: attempted(functools.partial(_row, shape, op, name)) for name in names if op == "forward" or name not in _FORWARD_ONLY}


def _row(shape: Shape, op: str, rival: str) -> dict[str, Any]:
    """Microseconds of a call in a graph of many, and launched one by one from Python; checked first."""
    case = Case("main", op, rival, shape, dtype="bf16" if DEVICE == "cuda" else "fp32")
    torch.manual_seed(0)
    with switches(case), torch.set_grad_enabled(op == "forward_backward"):
        calls = Calls(case, Data(case, Data.copies_of(case)))
        configs = calls.configs()
        error = calls.error()
        timed = Round(rotation(calls.copies))
        for _ in range(1 + (_ROUNDS if DEVICE == "cuda" else 3)):
            timed()
        graph = statistics.median(timed.milliseconds[1:]) * 1e3 / len(timed.calls)
        launched = _launched(calls)
    free()
    return {"us": graph, "launched_us": launched, "error": error, "configs": configs}


def _launched(calls: Calls) -> float:
    """Microseconds of a call from Python, none waited for but the last of a round; the median round, for the first ones allocate."""
    many = (calls.copies * _LAUNCHED)[: _LAUNCHED if DEVICE == "cuda" else 4]
    rounds = []
    for _ in range(5):
        _synchronize()
        begin = time.perf_counter()
        for call in many:
            call()
        _synchronize()
        rounds.append((time.perf_counter() - begin) * 1e6 / len(many))
    return statistics.median(rounds)


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _traffic(shape: Shape, forward: dict[str, Any]) -> dict[str, Any]:
    """Of the kernels that the paper compares, and ours."""
    config: dict[str, Any] = next(iter(forward["ours"].get("configs", {}).values()), {})
    figures: dict[str, Any] = {"shape": str(shape), "rows": {}}
    for name in ("scalar", "naive", "listing1", "ours"):
        figures["rows"][name] = {"requested": traffic.requested(name, shape, config)}
        if DEVICE == "cuda" and name != "scalar":
            figures["rows"][name]["measured"] = traffic.measured(name, shape)
    return figures


# ---- text


def text(figures: dict[str, Any]) -> str:
    """The table in markdown."""
    parts = ["## Table 1: tokens a second", _METHOD]
    for op, title in (("forward", "Forward, one convolution"), ("forward_backward", "Training: forward and backward, one convolution")):
        parts += [f"### {title}", table(("B x T", *_header(op)), _lines(figures["rows"], op))]
        header = (f"launched one by one, {op.replace('_', ' + ')}", *(RIVALS[name] for name in _names(op)))
        parts += [table(header, _launched_lines(figures["rows"], op)), _faster(figures["rows"], op)]
    return "\n\n".join([*parts, *_traffic_text(figures["traffic"])])


_METHOD = """\
One convolution of 256 channels, K = 3, bf16 (on the CPU: fp32), each result first compared with the reference in fp64. The first table
of each op is from replays of a captured graph over fresh inputs, by the device's clock; the second is of the same calls launched from
Python one by one: at the smaller shapes the host's time, not the kernels', and longer where the machine has other work. The paper says
neither what its tokens a second are of (one convolution, a model, a training step) nor at which number of channels; of one convolution of
256 channels its best figure would be 0.08 TFLOP/s. Its kernels have no backward pass, and so no training row. Ours holds x channels-last,
the others as suits them."""


def _names(op: str) -> list[str]:
    return [name for name in RIVALS if op == "forward" or name not in _FORWARD_ONLY]


def _header(op: str) -> Iterator[str]:
    yield from (RIVALS[name] for name in _names(op))
    if op == "forward":
        yield from ("tiled / naive", "the paper's", "its tokens/s, naive and tiled")
    yield "ours / F.conv1d"


def _lines(rows: dict[str, Any], op: str) -> Iterator[tuple[str, ...]]:
    for name, ops in rows.items():
        shape, row = Shape.parse(name), ops[op]
        speeds = {rival: _tokens_per_s(shape, row.get(rival, {}).get("us")) for rival in RIVALS}
        cells = [_cell(row.get(rival, {}), speeds[rival]) for rival in _names(op)]
        if op == "forward":
            naive, tiled = PAPER[shape.B, shape.T]
            cells += [_times(speeds["listing1"], speeds["naive"]), f"{tiled / naive:.2f}x", f"{naive:,}, {tiled:,}"]
        yield (f"{shape.B} x {shape.T}", *cells, _times(speeds["ours"], speeds["conv1d_pad"]))


def _launched_lines(rows: dict[str, Any], op: str) -> Iterator[tuple[str, ...]]:
    for name, ops in rows.items():
        shape = Shape.parse(name)
        speeds = (_tokens_per_s(shape, ops[op].get(rival, {}).get("launched_us")) for rival in _names(op))
        yield (f"{shape.B} x {shape.T}", *(f"{speed / 1e6:.3g} M" if speed else "-" for speed in speeds))


def _faster(rows: dict[str, Any], op: str) -> str:
    """Where ours loses."""
    said = []
    for clock, how in (("us", "in a graph"), ("launched_us", "launched one by one")):
        faster = [
            f"{RIVALS[rival]} at {shape.B} x {shape.T}"
            for shape, ops in ((Shape.parse(name), ops) for name, ops in rows.items())
            for rival in _names(op)
            if ops[op].get(rival, {}).get(clock, math.inf) < ops[op].get("ours", {}).get(clock, math.inf)
        ]
        said.append(f"{how}, {', '.join(faster) or 'none'}")
    return f"Faster than ours: {'; '.join(said)}."


def _traffic_text(figures: dict[str, Any]) -> Iterator[str]:
    shape = Shape.parse(figures["shape"])
    yield f"### Bytes moved, forward at {shape.B} x {shape.T} in bf16, beside the claimed 32x"
    least = (2 * shape.tokens * shape.c_in + shape.K * shape.c_in**2) * 2
    lines = []
    for name, row in figures["rows"].items():
        asked, counted = row["requested"], row.get("measured", {"failed": "not measured: no GPU"})
        total = sum(asked.values()) if asked else None
        cells = [_mib(asked.get("x")), _mib(asked.get("weight")), f"{total / least:.1f}x" if total else "-"]
        read = [_mib(counted.get(metric)) for metric in traffic.METRICS]
        lines.append((RIVALS.get(name, "one product a load"), *cells, *read))
    yield table(("MiB", "of x, asked for", "of the weight", "all, over the least", "DRAM read", "DRAM written", "L2"), lines)
    failed = sorted({row["measured"]["failed"] for row in figures["rows"].values() if "failed" in row.get("measured", {})})
    if failed:
        yield f"Not measured: {'; '.join(failed)}."
    yield (
        "The claimed 32x is of x alone, against a kernel that computes one output channel a program. It leaves out the weight, that every"
        " tap reads the tile of x anew, and the L2, which serves most of it. Against the naive kernel of its own Table 1, which holds all"
        f" channels in one tile, Listing 1 asks for {shape.c_out // 32} times as much of x, not 32 times less."
    )


def _tokens_per_s(shape: Shape, microseconds: float | None) -> float | None:
    return shape.tokens / microseconds * 1e6 if microseconds else None


def _cell(row: dict[str, Any], speed: float | None) -> str:
    return f"{speed / 1e6:.4g} M" if speed else row.get("failed", "-")


def _times(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}x" if a and b else "-"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value / (1 << 20):,.1f}"
