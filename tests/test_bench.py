"""The bench itself: its rivals are right, its report and bars say what a run says, and its gate can fail. No times are asserted."""

import copy
import json
import math

import pytest
import torch
from modes import HALF, INTERPRETED, ON_CUDA, needs_kernels, run_python

from bench import bars, check, grid, measure, precompile, report, results
from bench.grid import Case, Shape
from bench.roofline import Ceilings

TINY = [Shape(2, 37, 6, 10, 3, 4), Shape(1, 5, 4, 4, 3, 4), Shape(2, 16, 4, 4, 1, 1), Shape(2, 33, 20, 24, 5, 2)]
ROWS = [
    *((rival, op) for rival in ("ours", "module", *grid.CUDNN_FORMS, "shifted") for op in ("forward", "forward_backward")),
    *((rival, op) for rival in ("ours", "gemm") for op in ("input_grad", "weight_grad")),
    ("gemm", "forward"),
]
FP32 = "tf32" if ON_CUDA else "fp32"  # as PyTorch's switches are by default: setting the newer ones would break other tests here
CEILINGS = Ceilings(flops=8e14, bandwidth=3e12)


def run_of(microseconds, on_gpu=True) -> dict:
    """A bench.json in which each row of the grid takes `microseconds(case)`."""
    rows = [
        {
            "name": str(case),
            "stats": {"median": 1.0},
            "extra_info": {**measure.extra_info(case, microseconds(case), CEILINGS if on_gpu else None), "error": 1e-3, "configs": {}},
        }
        for case in grid.cases(on_gpu)
    ]
    machine = {
        "slug": "pretended_gpu" if on_gpu else "cpu",
        "gpu": "Pretended GPU" if on_gpu else None,
        "versions": {"torch": "0", "CUDA": None},
        "ceilings": CEILINGS._asdict() if on_gpu else None,
    }
    return {"datetime": "2000-01-01T00:00:00", "commit_info": {"id": "0" * 40}, "machine_info": machine, "benchmarks": rows}


def good(case: Case) -> float:
    """Microseconds with which every bar is met: ours at the roofline, the bound and the rivals far behind."""
    floor = max(grid.flops(case.op, case.shape) / CEILINGS.flops, grid.least_bytes(case.op, case.shape, 2) / CEILINGS.bandwidth) * 1e6
    if case.section == "dilation":
        return 100.0
    return floor * (1 if case.rival == "ours" else 1.5 if case.rival == "gemm" else 6)


@pytest.fixture
def stored(tmp_path):
    """Stores a run and returns its path."""

    def store(run: dict):
        path = tmp_path / "bench.json"
        path.write_text(json.dumps(run))
        return path

    return store


# ---- the grid


@pytest.mark.parametrize("on_gpu", [True, False])
def test_rows_have_names_of_their_own(on_gpu):
    names = [str(case) for case in grid.cases(on_gpu)]
    assert len(set(names)) == len(names)
    assert all(Shape.parse(str(case.shape)) == case.shape for case in grid.cases(on_gpu))


def test_the_full_grid_and_the_small_one():
    full, small = grid.cases(on_gpu=True), grid.cases(on_gpu=False)
    assert len(grid.GRID) == 12
    assert {case.rival for case in full} == set(report.LABELS)
    assert {case.rival for case in small} == {"ours", "module", "conv1d_pad"}
    assert len({case.shape for case in small}) == 4


def test_work_and_bytes():
    shape = Shape(32, 2048, 256, 256, 3, 4)
    assert grid.flops("forward", shape) == 2 * 65536 * 256 * 256 * 3
    assert grid.flops("forward_backward", shape) == 3 * grid.flops("weight_grad", shape)
    assert grid.least_bytes("forward", shape, 2) == 2 * (2 * 65536 * 256 + 3 * 256 * 256 + 256)
    info = measure.extra_info(Case("main", "forward", "ours", shape), 50.0, CEILINGS)
    assert info["tokens_per_s"] == pytest.approx(65536 / 50e-6)
    assert info["tflops"] == pytest.approx(grid.flops("forward", shape) / 50e-6 / 1e12)
    assert info["roofline_share"] == pytest.approx(grid.flops("forward", shape) / 8e14 / 50e-6)


def test_precompiling_covers_every_kernel_once():
    cases = [case for case in grid.cases(on_gpu=True) if precompile._has_kernels(case)]
    assert {case.rival for case in cases} == {"ours", "listing1", "naive"}
    ours = [case for case in grid.cases(on_gpu=True) if case.rival == "ours" and case.section != "host"]
    assert {precompile._key(case) for case in ours} <= {precompile._key(case) for case in cases}


# ---- the rivals


@pytest.mark.parametrize("shape", TINY, ids=str)
@pytest.mark.parametrize(("rival", "op"), ROWS)
def test_rivals_are_right(rival, op, shape, monkeypatch):
    monkeypatch.setattr(measure, "LONGEST_ROUND_MS", math.inf)  # beside 27 other processes a call took so long that a round had fewer
    case = Case("main", op, rival, shape, dtype=FP32)
    with torch.set_grad_enabled(op == "forward_backward"):
        calls = measure.Calls(case, measure.Data(case, 1 if rival == "module" else 2))
        for call in calls.all:
            call()
        assert len(calls.all) >= measure.CALLS
        assert calls.error() > 0  # and raises if it is too large


@needs_kernels
@pytest.mark.parametrize("shape", [Shape(2, 37, 6, 10, 3, 4), Shape(1, 70, 40, 50, 3, 2)], ids=str)
@pytest.mark.parametrize("rival", grid.PAPER_FORMS)
def test_paper_kernels_are_right(rival, shape):
    case = Case("main", "forward", rival, shape, dtype={torch.float16: "fp16", torch.bfloat16: "bf16"}[HALF])
    calls = measure.Calls(case, measure.Data(case, 1))
    calls.copies[0]()
    calls.error()


def test_channels_first_and_other_dtypes():
    for dtype in ("fp16",) if INTERPRETED else ("fp16", "bf16"):
        case = Case("channels_first", "forward_backward", "ours", TINY[0], dtype=dtype, layout="first")
        calls = measure.Calls(case, measure.Data(case, 1))
        assert bool(calls.configs()) == (INTERPRETED or ON_CUDA)
        assert calls.error() > 0


@pytest.mark.parametrize("name", ["y", "grad_x", "grad_weight", "grad_bias"])
def test_a_wrong_result_is_refused(name):
    case = Case("main", "forward_backward", "ours", TINY[3], dtype=FP32)
    data = measure.Data(case, 1)
    calls = measure.Calls(case, data)
    calls.copies[0]()
    right = calls.copies[0].results
    for wrong in (right[name].roll(1, 0), right[name] * float("nan")):
        with pytest.raises(ValueError, match=name):
            data.error({**right, name: wrong})


def test_a_round_runs_every_copy():
    case = Case("main", "forward", "ours", TINY[0], dtype=FP32)
    calls = measure.Calls(case, measure.Data(case, 3))
    one_round = measure.Round(calls.all)
    one_round()
    assert len(one_round.milliseconds) == 1
    assert all(call.results for call in calls.copies)
    assert len({call.results["y"].data_ptr() for call in calls.copies}) == 3


def test_a_round_of_slow_calls_is_short(monkeypatch):
    monkeypatch.setattr(measure, "LONGEST_ROUND_MS", 1e-9)
    case = Case("main", "forward", "ours", TINY[0], dtype=FP32)
    calls = measure.Calls(case, measure.Data(case, 3))
    assert calls.all == calls.copies[:1]


@pytest.mark.skipif(INTERPRETED or ON_CUDA, reason="of the CPU's small grid")
def test_a_run_that_is_interrupted_stores_the_rows_before(tmp_path):
    run_python(f"""
import json, os, pytest
from pathlib import Path
os.environ.pop("PYTEST_XDIST_WORKER", None)  # of these tests' own run: pytest-benchmark does nothing where it is set
from bench import test_throughput
told, rows = test_throughput.extra_info, []
def interrupted(*args):
    rows.append(told(*args))
    if len(rows) > 2:
        raise KeyboardInterrupt
    return rows[-1]
test_throughput.extra_info = interrupted
path = Path({str(tmp_path / "bench.json")!r})
status = pytest.main([test_throughput.__file__, "-q", "-p", "no:cacheprovider", f"--benchmark-json={{path}}"])
assert status == pytest.ExitCode.INTERRUPTED
assert len(json.loads(path.read_text("utf-8"))["benchmarks"]) == 2
""")


def test_switches():
    run_python("""
import torch
from bench.grid import Case, GRID
from bench.measure import switches
from fuzzytok_kernels.support import conv_switch

def inside(**fields):
    with switches(Case("main", "forward", **{"rival": "conv1d_pad", "shape": GRID[0], **fields})):
        return conv_switch.fp32_precision, torch.backends.cudnn.benchmark

default = conv_switch.fp32_precision
assert inside(rival="conv2d_pad_searched") == (default, True)
assert torch.backends.cudnn.allow_tf32 in (True, False)  # the older name still reads: bf16 rows touch no newer one
assert inside(dtype="fp32") == ("ieee", False)
assert inside(dtype="tf32") == ("tf32", False)
assert inside() == (default, False)
""")


# ---- bars and report


def verdicts(run: dict) -> dict[str, str]:
    return {bar.what: bar.verdict for bar in bars.bars(results.Run(run))}


def test_bars_are_met():
    assert set(verdicts(run_of(good)).values()) == {"met", "by construction", ""}


@pytest.mark.parametrize(
    ("section", "op", "slower", "what"),
    [
        ("main", "forward", 1.3, "forward / GEMM, >= 2^16 tokens, geometric mean"),
        ("main", "forward", 1.2, "forward, share of the roofline, >= 2^16 tokens, C = 512 and 1024, worst"),
        ("main", "weight_grad", 1.7, "weight_grad / GEMM, whole grid, worst"),
        ("main", "forward_backward", 1.6, "forward_backward, times faster, against F.conv1d+pad, geometric mean"),
        ("channels_first", "forward_backward", 2.5, "forward_backward, times faster, channels-first against F.conv1d+pad, geometric mean"),
        ("main", "forward", 6.5, "small shapes, times faster than the best rival, worst"),
        ("fp16", "forward", 1.06, "fp16 / bf16, worst"),
        ("tf32", "forward", 4.1, "fp32 with TF32, times faster than F.conv1d+pad, worst"),
        ("fp32", "forward_backward", 6.1, "fp32 strict, times faster than F.conv1d+pad, worst"),
        ("host", "forward", 3.7, "host cost / F.conv1d+pad's, no grad, worst"),
        ("host", "forward_backward", 4.9, "host cost / F.conv1d+pad's, forward + backward, worst"),
    ],
)
def test_a_bar_is_missed(section, op, slower, what):
    def bad(case: Case) -> float:
        return good(case) * (slower if case[:3] == (section, op, "ours") else 1)

    assert verdicts(run_of(bad))[what] == "missed"


def test_a_slow_dilation_is_missed():
    run = run_of(lambda case: 106.0 if case.section == "dilation" and case.shape.d == 512 else good(case))
    assert verdicts(run)["d from 1 to 512 / d = 1, worst"] == "missed"


def test_a_missing_row_is_no_met_bar():
    run = run_of(good)
    run["benchmarks"] = [row for row in run["benchmarks"] if "forward-gemm-32x2048x256" not in row["name"]]
    found = {bar.what: bar for bar in bars.bars(results.Run(run))}["forward / GEMM, >= 2^16 tokens, worst"]
    assert (found.verdict, "1 of 6 rows missing" in found.measured) == ("incomplete", True)
    assert verdicts({**run, "benchmarks": []})["fp16 / bf16, worst"] == "incomplete"


def test_report(stored):
    pytest.importorskip("matplotlib")

    def mixed(case: Case) -> float:
        return good(case) * (0.1 if (case.rival, case.shape) == ("shifted", grid.GRID[4]) else 1)

    run = run_of(mixed)
    run["benchmarks"] = [row for row in run["benchmarks"] if "compiled" not in row["name"]]
    path = stored(run)
    shown = report.write(path)
    text = (path.parent / "report.md").read_text()
    assert shown in text
    assert "Pretended GPU" in text
    assert "| main | forward | 32x2048x256_K3_d4 | K shifted GEMMs |" in text  # the row that hurts
    assert "| main | forward | compiled | 3 |" in text  # the rows that are missing
    for line in text.splitlines():  # every table is whole
        assert not line.startswith("|") or line.endswith("|")
    for picture in ("roofline.png", "tokens.png"):
        assert (path.parent / picture).stat().st_size > 10_000
        assert f"({picture})" in text


def test_report_of_a_cpu(stored):
    path = stored(run_of(good, on_gpu=False))
    assert "The bars" not in report.write(path)
    assert [file.name for file in path.parent.glob("*.png")] == []


# ---- the gate


@pytest.fixture
def gate(stored, tmp_path, monkeypatch):
    """Runs `bench.check` on a run, with baselines in a folder of the test's own."""
    monkeypatch.setattr(check, "BASELINES", tmp_path / "baselines")
    return lambda run, *options: check.main([str(stored(run)), *options])


def test_gate(gate, capsys):
    run = run_of(good)
    assert gate(run) == 1  # no baseline yet
    assert gate(run, "--update") == 0
    assert gate(run) == 0
    for slower, status in ((1.04, 0), (1.06, 1)):
        slow = run_of(lambda case, slower=slower: good(case) * (slower if case[:4] == ("main", "forward", "ours", grid.GRID[4]) else 1))
        capsys.readouterr()
        assert gate(slow) == status
        lost = [line for line in capsys.readouterr().out.splitlines() if "LOST" in line]
        assert [line.split()[-1] for line in lost] == ["main-forward-ours-32x2048x256_K3_d4"] * status


def test_gate_misses_a_row(gate):
    run = run_of(good)
    gate(run, "--update")
    fewer = copy.deepcopy(run)
    fewer["benchmarks"] = [row for row in run["benchmarks"] if row["name"] != "main-forward-ours-32x2048x256_K3_d4"]
    assert gate(fewer) == 1


def test_gate_holds_a_faster_gpu_to_the_same_ratio(gate):
    gate(run_of(good), "--update")
    assert gate(run_of(lambda case: good(case) / 2)) == 0
    assert gate(run_of(lambda case: good(case) / (2 if case.rival != "ours" else 1))) == 1


def test_gate_of_a_cpu(gate):
    assert gate(run_of(good, on_gpu=False)) == 1
