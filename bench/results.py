"""A run as `make bench` stored it, and where."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bench.grid import Case, Shape, cases, companion
from fuzzytok_kernels.tuning.gpu import Gpu

FOLDER = Path(__file__).parent / "results"
BASELINES = Path(__file__).parent / "baselines"


def slug() -> str:
    """The name of this machine's results: its GPU's, or "cpu"."""
    gpu = Gpu.current(0)
    return gpu.slug if gpu else "cpu"


class Row(NamedTuple):
    """One row's figures."""

    case: Case
    microseconds: float
    tokens_per_s: float
    tflops: float
    gb_per_s: float
    roofline_share: float | None
    error: float
    beside: float | None = None  # microseconds of the row that it was timed in turns with


class Run:
    """All rows of one run."""

    def __init__(self, stored: dict[str, Any]) -> None:
        machine = stored["machine_info"]
        self.date: str = stored["datetime"][:10]
        self.commit: str | None = stored["commit_info"].get("id")
        self.slug: str = machine["slug"]
        self.gpu: str | None = machine["gpu"]
        self.versions: dict[str, str | None] = machine["versions"]
        self.ceilings: dict[str, float] | None = machine["ceilings"]
        rows = [_row(row["extra_info"]) for row in stored["benchmarks"] if row["extra_info"]]  # a row that failed has none
        self.rows = {row.case[:4]: row for row in rows}

    @staticmethod
    def load(path: Path) -> "Run":
        """The run stored at `path`."""
        return Run(json.loads(path.read_text(encoding="utf-8")))

    def get(self, section: str, op: str, rival: str, shape: Shape) -> Row | None:
        """One row; None if it was not measured."""
        return self.rows.get((section, op, rival, shape))

    def time(self, section: str, op: str, rival: str, shape: Shape) -> float | None:
        """Its microseconds. The GEMMs of forward_backward are those of its three parts."""
        if rival == "gemm" and op == "forward_backward":
            parts = [self.time(section, part, rival, shape) for part in ("forward", "input_grad", "weight_grad")]
            return None if None in parts else sum(filter(None, parts))
        row = self.get(section, op, rival, shape)
        return row.microseconds if row else None

    def beside(self, section: str, op: str, shape: Shape) -> float | None:
        """The microseconds of the row of ours that this one is held against: timed in turns with it, or else by itself."""
        row = self.get(section, op, "ours", shape)
        other = companion(row.case) if row else None
        if row is None or other is None:
            return row and row.microseconds
        return row.beside or self.time(other.section, op, "ours", other.shape)

    def best(self, section: str, op: str, rivals: Iterable[str], shape: Shape) -> float | None:
        """The least time of `rivals`; None if none was measured."""
        times = (self.time(section, op, rival, shape) for rival in rivals)
        return min((time for time in times if time is not None), default=None)

    def missing(self) -> list[Case]:
        """The rows of the grid that were deselected or failed."""
        return [case for case in cases(on_gpu=self.gpu is not None) if case[:4] not in self.rows]


def _row(info: dict[str, Any]) -> Row:
    case = Case(info["section"], info["op"], info["rival"], Shape.parse(info["shape"]), info["dtype"], info["layout"])
    return Row(case, *(info[name] for name in Row._fields[1:-1]))._replace(beside=info.get("beside"))
