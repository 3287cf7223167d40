"""The measuring half of the tuner, as far as it goes without a GPU: workers, compilation for absent GPUs, the choice of a winner."""

import contextlib
import importlib
import pkgutil
import time
from concurrent.futures import Future

import pytest
from modes import INTERPRETED, ON_CUDA, needs_cuda, not_interpreted, run_python

from fuzzytok_kernels import kernels, tuning
from fuzzytok_kernels.tuning import Problem
from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.lookup import shipped_folder, user_folder
from fuzzytok_kernels.tuning.space import OPS, candidates, default_config, predicted
from fuzzytok_kernels.tuning.store import path_of, read
from fuzzytok_kernels.tuning.worker import Worker, WorkerError, pool

pytest.importorskip("triton")
import triton

from fuzzytok_kernels.tuning import tuner
from fuzzytok_kernels.tuning.architectures import ARCHITECTURES
from fuzzytok_kernels.tuning.compile import Resources
from fuzzytok_kernels.tuning.warmup import default_jobs

GPU = Gpu("Fake GPU", "sm90", 132, 232_448)
H100 = Gpu("NVIDIA H100 80GB HBM3", "sm90", 132, 232_448)
USED = Resources(shared=1000, registers=32, local=0)
PROBLEM = Problem("causal_conv1d", "bf16", "last", True, "none", 3, 256, 256, 65536)


# ---- workers


def test_worker_returns_raises_and_goes_on():
    with contextlib.closing(Worker("math:sqrt")) as root:
        assert root(4.0) == 2.0
        with pytest.raises(WorkerError, match="ValueError"):
            root(-1.0)
        assert root(9.0) == 3.0


def test_a_crash_costs_one_call():
    with contextlib.closing(Worker("builtins:exec")) as run:
        for code in ("import os; os.abort()", "import os; os._exit(3)"):
            with pytest.raises(WorkerError, match="died"):
                run(code)
            assert run("1 + 1") is None


def test_a_hang_is_cut_off():
    with contextlib.closing(Worker("time:sleep", timeout=0.5)) as sleep, pytest.raises(WorkerError, match="no answer"):
        sleep(60)


def test_who_leaves_a_pool_waits_for_nothing():
    """Neither for what runs nor for what has not begun: a check that is stopped can say at once what it has."""
    begun = time.monotonic()
    with pool("time:sleep", 2) as submit:
        futures = [submit(seconds) for seconds in (0.0, 60.0, 60.0, 60.0)]
        futures[0].result()
    assert time.monotonic() - begun < 30
    assert sum(future.cancelled() for future in futures) >= 1


@not_interpreted
def test_no_kernel_reads_a_global():
    """Triton 3.6 makes its cache's key of the global constants known by then: what a warm-up had compiled, its timing did not find.

    (178 of 220 kernels were compiled twice, one after the other.)
    """
    modules = [importlib.import_module(f"{kernels.__name__}.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)]
    found = [jit for module in modules for jit in vars(module).values() if isinstance(jit, triton.JITFunction)]
    assert len(found) > 20
    for jit in found:
        assert jit.cache_key
        assert [name for name, _ in jit.used_global_vals] == [], jit


# ---- candidates


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("aligned", [True, False])
def test_candidates(op, aligned):
    problem = PROBLEM._replace(op=op, aligned=aligned)
    found = candidates(problem, 8, GPU)
    assert 1 < len(found) <= 8
    assert default_config(problem) not in found
    assert aligned or all(config.path == "pointer" for config in found)
    assert found == sorted(found, key=lambda config: (predicted(problem, config, 132), config))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("channels", [(1, 1), (1, 64), (64, 1), (5, 6), (16, 16), (2, 256), (32, 24)], ids=str)
def test_narrow_problems_have_candidates(op, aligned, channels):
    c_in, c_out = channels
    assert candidates(PROBLEM._replace(op=op, aligned=aligned, c_in=c_in, c_out=c_out), 8, GPU)


def test_default_jobs_are_distinct():
    problems = [job.problem for job in default_jobs(descriptors=True)]
    assert len(set(problems)) == len(problems) > 100


# ---- the choice of a winner, with times made up


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """tune() with a race that any function of the config decides, and a count of races."""
    races = []

    def race_by(share, default_us=100.0, used=USED):
        def race(device, job, config, used, shared_memory):
            races.append(config)
            result = share(config)
            if isinstance(result, BaseException):
                raise result
            return default_us, 100.0 * result

        @contextlib.contextmanager
        def compilers(gpu):
            def compile(job, config):
                future = Future()
                if used is None and config == default_config(job.problem):
                    future.set_exception(WorkerError("the compiler crashed"))
                else:
                    future.set_result(used)
                return future

            yield compile

        monkeypatch.setattr(tuner, "racer", lambda: contextlib.nullcontext(race))
        monkeypatch.setattr(tuner, "compilers", compilers)

    monkeypatch.setattr(Gpu, "current", staticmethod(lambda device: GPU))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return race_by, races


def test_the_fastest_wins_and_is_stored(made_up, tmp_path):
    race_by, _ = made_up
    best = candidates(PROBLEM, 6, GPU)[3]
    race_by(lambda config: 0.5 if config == best else 0.9)
    (entry,) = tuner.tune([tuner.job_of(PROBLEM)], tmp_path, 6)
    assert (entry.config, entry.time_us, entry.default_us) == (best, 50.0, 100.0)
    assert read(path_of(tmp_path, GPU, PROBLEM.op), GPU, PROBLEM.op) == ([entry], None)


def test_what_was_recorded_is_tuned_and_served_in_this_process(places, made_up):
    """As the README says it."""
    race_by, _ = made_up
    best = candidates(PROBLEM, 6, GPU)[3]
    race_by(lambda config: 0.5 if config == best else 0.9)
    with tuning.record_problems() as problems, pytest.warns(UserWarning, match="not tuned for"):
        assert tuning.get_config(0, PROBLEM) == default_config(PROBLEM)
    tuner.tune(map(tuner.job_of, problems), user_folder())
    tuning.forget()
    assert tuning.get_config(0, PROBLEM) == best


@pytest.mark.parametrize("share", [0.99, 1.0, 1.5, float("inf")])
def test_a_winner_must_beat_the_default_by_two_percent(share, made_up, tmp_path):
    race_by, _ = made_up
    race_by(lambda config: share)
    (entry,) = tuner.tune([tuner.job_of(PROBLEM)], tmp_path, 6)
    assert entry.config == default_config(PROBLEM)


def test_a_candidate_that_crashes_is_left_out(made_up, tmp_path):
    race_by, _ = made_up
    first, second, *_ = candidates(PROBLEM, 6, GPU)
    race_by(lambda config: WorkerError("crash") if config == first else 0.6 if config == second else 0.7)
    (entry,) = tuner.tune([tuner.job_of(PROBLEM)], tmp_path, 6)
    assert entry.config == second


def test_what_could_not_be_timed_is_left_out(made_up, tmp_path):
    """On Triton 3.9 a race that lost its candidate to pruning has no time of the default either."""
    race_by, _ = made_up
    first, second, *_ = candidates(PROBLEM, 6, GPU)
    race_by(lambda config: float("nan") if config == first else 0.6 if config == second else 0.7)
    (entry,) = tuner.tune([tuner.job_of(PROBLEM)], tmp_path, 6)
    assert entry.config == second


@pytest.mark.parametrize("fault", [{"default_us": float("inf")}, {"used": None}], ids=["wrong", "crashes the compiler"])
def test_a_bad_default_costs_one_problem(fault, made_up, tmp_path):
    race_by, _ = made_up
    race_by(lambda config: 0.5, **fault)
    assert tuner.tune([tuner.job_of(PROBLEM)], tmp_path, 6) == []


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(made_up, tmp_path):
    race_by, races = made_up
    race_by(lambda config: 0.5)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be stored in"):
        tuner.tune([tuner.job_of(PROBLEM)], tmp_path / "file", 6)
    assert not races


def test_a_killed_run_goes_on_where_it_was(made_up, tmp_path):
    race_by, races = made_up
    jobs = [tuner.job_of(PROBLEM._replace(c_in=c_in)) for c_in in (64, 128, 256)]

    def share(config):
        return KeyboardInterrupt() if len(races) > 8 else 0.5

    race_by(share)
    with pytest.raises(KeyboardInterrupt):
        tuner.tune(jobs, tmp_path, 6)
    stored = read(path_of(tmp_path, GPU, PROBLEM.op), GPU, PROBLEM.op)[0]
    assert [entry.problem for entry in stored] == [jobs[0].problem]

    races.clear()
    race_by(lambda config: 0.5)
    assert [entry.problem for entry in tuner.tune(jobs, tmp_path, 6)] == [job.problem for job in jobs]
    assert len(races) == 12, "the first problem was raced again"
    races.clear()
    tuner.tune(jobs, tmp_path, 6)
    assert not races
    tuner.tune(jobs, tmp_path, 8)  # more candidates than were tried
    assert races


def test_nothing_is_tuned_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(Gpu, "current", staticmethod(lambda device: None))
    with pytest.raises(RuntimeError, match="there is none"):
        tuner.tune([tuner.job_of(PROBLEM)], tmp_path)


# ---- other GPUs


@pytest.mark.skipif(INTERPRETED or ON_CUDA, reason="compiles for other GPUs: once, on the CPU, is enough")
@pytest.mark.parametrize("gpu", ARCHITECTURES, ids=lambda gpu: gpu.arch)
def test_the_default_fits_every_gpu(gpu):
    with tuner.compilers(gpu) as compile:
        futures = {}
        for op in OPS:
            epilogue = "gelu" if op in ("causal_conv1d_fused", "causal_conv1d_activation_grad") else "none"
            for dtype in ("bf16", "fp32") if gpu.arch.startswith("sm") else ("bf16",):
                job = tuner.job_of(PROBLEM._replace(op=op, dtype=dtype, aligned=gpu.descriptors, epilogue=epilogue))
                futures[op, dtype] = compile(job, default_config(job.problem))
        odd = tuner.job_of(PROBLEM._replace(aligned=False, kernel_size=32, c_in=250, c_out=250, steps=2048))
        futures["many taps"] = compile(odd, default_config(odd.problem))
        for name, future in futures.items():
            used = future.result()
            assert used.shared <= gpu.shared_memory, name
            assert not used.spills, name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("gpu", [*ARCHITECTURES, H100], ids=lambda gpu: f"{gpu.arch}-{gpu.slug}")
def test_shipped_files_are_of_this_version(gpu, op):
    entries, refusal = read(path_of(shipped_folder(), gpu, op), gpu, op)
    assert refusal is None
    assert len({entry.problem for entry in entries}) >= 8


# ---- on a GPU


@needs_cuda
def test_warm_up_explain_and_check(tmp_path, capsys, monkeypatch):
    """One problem from the command line: tuned, stored, served by the file, still right and fast."""
    from fuzzytok_kernels.cli import main

    monkeypatch.setenv("FUZZYTOK_TUNING_DIR", str(tmp_path))
    one = ["--op", "causal_conv1d", "--shape", "2,96,24,40,3", "--dtype", "fp16"]
    assert main(["warmup", *one, "--quick"]) == 0
    assert "1 of 1 problems are tuned" in capsys.readouterr().out
    gpu = Gpu.current(0)
    (entry,), refusal = read(path_of(tmp_path, gpu, "causal_conv1d"), gpu, "causal_conv1d")
    assert (entry.problem.steps, entry.problem.c_in, entry.problem.dtype, refusal) == (256, 24, "fp16", None)
    assert main(["explain", *one]) == 0
    assert f"served by   {path_of(tmp_path, gpu, 'causal_conv1d')}" in capsys.readouterr().out


@needs_cuda
def test_a_wrong_candidate_loses(monkeypatch):
    """A config whose result is off, as of a miscompiled kernel, is told before it is timed."""
    from fuzzytok_kernels.tuning import Config, measure

    job = tuner.job_of(PROBLEM._replace(c_in=64, c_out=64, steps=4096))
    config, other, *_ = candidates(job.problem, 6, GPU)
    right = measure._Launch.run

    def wrong(self, num_ctas=1, **fields):
        results = right(self, num_ctas=num_ctas, **fields)
        if Config(**fields) == config:
            results[0][..., 0] += 1
        return results

    monkeypatch.setattr(measure._Launch, "run", wrong)
    used = USED
    default_us, config_us = measure.race(0, job, config, used, H100.shared_memory)
    assert 0 < default_us < config_us == float("inf")
    assert measure.race(0, job, other, used, H100.shared_memory)[1] < float("inf")
    assert measure.race(0, job, other, used._replace(local=64), H100.shared_memory)[1] == float("inf"), "spills"
    assert measure.race(0, job, other, used, shared_memory=999)[1] == float("inf"), "does not fit"


@needs_cuda
def test_check_finds_what_became_slower(tmp_path, monkeypatch, capsys):
    from fuzzytok_kernels.cli import main
    from fuzzytok_kernels.tuning.store import Entry, merge

    gpu, problem = Gpu.current(0), PROBLEM._replace(c_in=64, c_out=64, steps=4096)
    slow = default_config(problem)._replace(BLOCK_T=16, BLOCK_C_OUT=16, num_warps=1, num_stages=1, programs_per_sm=1)
    merge(tmp_path, gpu, problem.op, [Entry(problem, slow, 1.0, 2.0, 1000)], {})
    monkeypatch.setattr("fuzzytok_kernels.tuning.lookup.folders", lambda: {"this": tmp_path})
    assert main(["check"]) == 1
    assert "slower" in capsys.readouterr().out


@needs_cuda
def test_autotune_at_the_first_call(tmp_path):
    """FUZZYTOK_AUTOTUNE=1 tunes and stores an unknown problem, but not inside a graph capture; the results are right all the while."""
    run_python(
        """
import pathlib, os, torch
from fuzzytok_kernels import causal_conv1d, tuning
x, weight = torch.randn(1, 72, 64, device="cuda").half(), torch.randn(40, 72, 2, device="cuda").half()
stored = lambda: sorted(pathlib.Path(os.environ["FUZZYTOK_TUNING_DIR"]).rglob("*.json"))
with tuning.force(path="pointer"):
    causal_conv1d(x, weight)  # compiles what the capture launches
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = causal_conv1d(x, weight)
assert not stored()
graph.replay()
torch.testing.assert_close(causal_conv1d(x, weight, dilation=1), captured)
causal_conv1d(x[:, :, :32], weight)
assert len(stored()) == 1, stored()
""",
        FUZZYTOK_AUTOTUNE="1",
        FUZZYTOK_TUNING_DIR=str(tmp_path),
    )
