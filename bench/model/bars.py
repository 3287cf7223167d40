"""The bars of the block and the model, each computed from a run's sections."""

from collections.abc import Iterator, Sequence

from bench.bars import Bar, judged
from bench.model.attempts import Figures
from bench.model.forms import COMPILED, EAGER_CONV1D, FORMS, OURS, PYTORCH
from bench.model.sizes import BATCHES

FORWARD_LIMITS = {"relu": 1.15, "silu": 1.25, "gelu_tanh": 1.25, "gelu": 1.45}  # times the plain op's
PAPER_SAVED = 0.381  # of video memory, against PyTorch's Conv1D at B=16, T=1024


def judge(sections: Figures) -> list[Bar]:
    """The bars of the sections that were measured."""
    judges = {"block": _block, "backward": _backward, "model": _model, "saved": _saved}
    return [bar for name, bars in judges.items() if "failed" not in sections.get(name, {"failed": ""}) for bar in bars(sections[name])]


def _block(rows: Figures) -> Iterator[Bar]:
    for name, limit in FORWARD_LIMITS.items():
        yield _bar(f"block forward / plain op, {name}", rows[name].get("ratio"), "<=", limit)


def _backward(rows: Figures) -> Iterator[Bar]:
    best = min((row["ratio"] for name, row in rows.items() if name != "ours" and row.get("ratio")), default=None)
    yield _bar("block forward + backward, times faster than the best compiled", best, ">=", 2.2)


def _model(figures: Figures) -> Iterator[Bar]:
    large, small = (figures.get(f"{B}x{T}", {}) for B, T in BATCHES)
    rivals: Sequence[str]
    for figure, how in (("graph_ms", "CUDA graph against CUDA graph"), ("eager_ms", "launched against launched")):
        for rivals, which, limit in ((COMPILED, "the best compiled", 1.8), (EAGER_CONV1D, "eager F.conv1d", 5.0)):
            share, where = _share(large, rivals, figure)
            yield _bar(f"model step, times faster than {which}, {how}", share and 1 / share, ">=", limit, where)
    share, where = _share(large, PYTORCH, "peak_mib")
    yield _bar("model step, peak memory / the best PyTorch form's", share, "<=", 0.70, where)
    for rivals, which in ((PYTORCH, "the best PyTorch form"), (EAGER_CONV1D, "eager F.conv1d")):
        share, where = _share(small, rivals, "peak_mib")
        saved = "not measured" if share is None else f"{1 - share:.1%}{where}"
        yield Bar(f"B=16 T=1024, memory saved against {which}", f"the paper claims {PAPER_SAVED:.1%}", saved, "")


def _saved(counts: Figures) -> Iterator[Bar]:
    yield _bar("tensors of the input's size that a block saves", counts["ours"], "<=", 1)


def _share(rows: Figures, rivals: Sequence[str], figure: str) -> tuple[float | None, str]:
    """The least of ours over the least of `rivals`, and which these are."""
    ours, rival = (
        min((name for name in names if figure in rows.get(name, ())), key=lambda name: rows[name][figure], default=None)
        for names in (OURS, rivals)
    )
    if ours is None or rival is None:
        return None, ""
    return rows[ours][figure] / rows[rival][figure], f" ({FORMS[ours].label}; {FORMS[rival].label})"


def _bar(what: str, value: float | None, sign: str, limit: float, where: str = "") -> Bar:
    return judged(what, {"": value}, value, where, sign, limit)
