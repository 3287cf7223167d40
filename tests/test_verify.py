"""`fuzzytok check --all`: which runs it makes, and what it says of them. The runs themselves need a GPU."""

import contextlib
import itertools
import math
from concurrent.futures import Future

import pytest
import torch
from modes import needs_cuda

pytest.importorskip("triton")
from fuzzytok_kernels.cli import main
from fuzzytok_kernels.tuning import check, verify
from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.problem import DTYPES, LAYOUTS
from fuzzytok_kernels.tuning.space import OPS, shared_memory, suits
from fuzzytok_kernels.tuning.worker import WorkerError

H100 = Gpu("NVIDIA H100 80GB HBM3", "sm90", 132, 232_448)


@pytest.mark.parametrize("op", OPS)
def test_every_config_dtype_layout_and_epilogue(op):
    found = [(job.problem, config) for jobs, config in verify.runs(H100) for job in jobs if job.problem.op == op]
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        configs = {config for problem, config in found if (problem.dtype, problem.layout) == (dtype, layout)} & {*OPS[op].configs}
        if dtype in ("bf16", "fp16") and layout == "last":
            assert all(shared_memory(found[0][0], config) > H100.shared_memory for config in {*OPS[op].configs} - configs)
        assert len(configs) > 0.6 * len(OPS[op].configs)  # the others are too wide for 32 bits, or for an epilogue through pointers
    paths = {(problem.epilogue, config.path, problem.dtype) for problem, config in found}
    assert paths == {(epilogue, path, dtype) for epilogue in OPS[op].epilogues for path in ("tma", "pointer") for dtype in DTYPES}
    assert all(suits(config, problem) for problem, config in found)


@pytest.mark.parametrize(
    ("answer", "status", "says"),
    [
        (lambda jobs: [0.5] * len(jobs), 0, "runs right on NVIDIA H100 80GB HBM3, 0 wrong; 0 asked"),
        (lambda jobs: [None] * len(jobs), 0, "0 runs right on NVIDIA H100 80GB HBM3, 0 wrong; "),
        (lambda jobs: [math.nan] * len(jobs), 1, "WRONG   nan of the allowed error: Job("),
        (lambda jobs: [1.5] * len(jobs), 1, "WRONG   1.5 of the allowed error: Job("),
        (WorkerError("the process died"), 1, "FAILED  the process died: [Job("),
    ],
    ids=["right", "too large", "NaN", "wrong", "crashed"],
)
def test_what_it_says(answer, status, says, monkeypatch, capsys):
    @contextlib.contextmanager
    def pool(function, processes):
        def submit(device, jobs, config):
            future = Future()
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer(jobs))
            return future

        yield submit

    monkeypatch.setattr(verify, "pool", pool)
    monkeypatch.setattr(check.Gpu, "current", staticmethod(lambda device: H100))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["check", "--all"]) == status
    assert says in capsys.readouterr().out


def test_takes_all_gpus_of_its_kind_in_turn(monkeypatch):
    """And leaves another model alone."""
    seen = []

    @contextlib.contextmanager
    def pool(function, processes):
        def submit(device, jobs, config):
            seen.append(device)
            future = Future()
            future.set_result([0.5] * len(jobs))
            return future

        yield submit

    monkeypatch.setattr(verify, "pool", pool)
    monkeypatch.setattr(check.Gpu, "current", staticmethod(lambda device: H100._replace(name="another") if device == 1 else H100))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert verify.verify_all(H100) == 0
    assert seen[:4] == [0, 2, 0, 2]


def test_what_it_says_when_stopped(monkeypatch, capsys):
    """And where another run goes on, which tries all of the others."""
    tried = []

    def verified(stack, gpu, plan):
        tried.append([(tuple(jobs), config) for jobs, config in plan])
        return {Future(): run for run in plan}

    def stopped(futures):
        for future, (jobs, _) in itertools.islice(futures.items(), 3):
            future.set_result([0.5] * len(jobs))
            yield future
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "_verified", verified)
    monkeypatch.setattr(verify, "as_completed", stopped)
    assert verify.verify_all(H100) == 1
    right = sum(len(jobs) for jobs, _ in tried[0][:3])
    out = capsys.readouterr().out
    assert f"stopped; {len(tried[0]) - 3:,} of {len(tried[0]):,} configs were left: go on with --skip 3\n" in out
    assert f"{right} runs right on NVIDIA H100 80GB HBM3, 0 wrong; 0 asked" in out
    assert verify.verify_all(H100, 3) == 1
    assert tried[1] == tried[0][3:]
    assert "go on with --skip 6\n" in capsys.readouterr().out
    assert {*OPS} == {jobs[0].problem.op for jobs, _ in tried[0][:40]}


@needs_cuda
def test_a_wrong_result_is_told(monkeypatch):
    """In this process, and with a launch that is off by a twentieth."""
    from fuzzytok_kernels import launch
    from fuzzytok_kernels.tuning import measure

    jobs, config = next(iter(verify.runs(Gpu.current(0))))
    assert all(error <= 1 for error in measure.verify(0, jobs, config))
    right = getattr(launch, jobs[0].problem.op)
    monkeypatch.setattr(launch, jobs[0].problem.op, lambda *args: right(*args) * 1.05)
    assert all(error > 1 for error in measure.verify(0, jobs, config))
