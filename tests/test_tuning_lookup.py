"""Which config a problem gets, in which order it is looked for, and that looking never raises, never repeats itself, never touches CUDA."""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from modes import DEVICE, needs_kernels, run_python
from places import CONFIG, GENERIC, GPU, OP, PROBLEM, SIBLING, stages

import fuzzytok_kernels
from fuzzytok_kernels import tuning
from fuzzytok_kernels.tuning import Config, Problem, get_config, lookup, space, store
from fuzzytok_kernels.tuning.arguments import add_problem_arguments, problem_from
from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.space import OPS, default_config

# ---- order


def test_order(places):
    files = [
        places.put(places.own, 1),
        places.put(places.cache, 2),
        places.put(places.shipped, 3),
        places.put(places.shipped, 4, SIBLING),
        places.put(places.shipped, 5, GENERIC),
    ]
    for expected, path in enumerate(files, 1):
        assert stages() == expected
        path.unlink()
    tuning.forget()
    with pytest.warns(UserWarning, match="not tuned"):
        assert get_config(0, PROBLEM) == default_config(PROBLEM)


def test_user_s_cache_alone(places, monkeypatch):
    monkeypatch.delenv("FUZZYTOK_TUNING_DIR")
    assert lookup.user_folder() == places.cache
    places.put(places.own, 1), places.put(places.cache, 2)
    assert stages() == 2
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(places.cache))
    assert lookup.user_folder() == places.cache / ".cache" / "fuzzytok_kernels" / "tuning"


def test_one_tuned_problem_does_not_serve_all_others(places):
    """The nearest of all files, not of the first; what was not measured on this GPU is as good as one or two doublings farther."""
    small = PROBLEM._replace(c_in=64, c_out=64)
    places.put(places.own, 1, problem=small)
    places.put(places.shipped, 2)
    assert (stages(small), stages(), stages(PROBLEM._replace(c_in=512))) == (1, 2, 2)
    places.put(places.shipped, 3, SIBLING, PROBLEM._replace(c_in=512))
    places.put(places.shipped, 4, SIBLING, PROBLEM._replace(c_in=2048))
    assert (stages(PROBLEM._replace(c_in=512)), stages(PROBLEM._replace(c_in=2048))) == (2, 4)


def test_only_what_is_alike(places):
    places.put(places.own, 1)
    places.put(places.shipped, 2, problem=PROBLEM._replace(dtype="tf32", steps=1))
    assert stages(PROBLEM._replace(dtype="tf32")) == 2


def test_what_fits_the_problem_goes_before_what_is_near(places, monkeypatch):
    """By the model of the time: a large tile that won for many steps would leave most of the GPU idle on a few."""
    monkeypatch.setattr(lookup, "predicted", space.predicted)
    large = CONFIG._replace(BLOCK_T=256, BLOCK_C_OUT=256, num_warps=8, programs_per_sm=1)
    places.put(places.own, 3, config=large)
    tuning.forget()
    assert get_config(0, PROBLEM) == large
    few = get_config(0, PROBLEM._replace(steps=128))
    assert few.BLOCK_T * few.BLOCK_C_OUT < 256 * 256
    assert space.shared_memory(PROBLEM, few) <= GPU.shared_memory


def test_the_model_trusts_only_measured_gpus_beyond_their_file(places, monkeypatch):
    monkeypatch.setattr(lookup, "predicted", space.predicted)
    places.put(places.shipped, 4, SIBLING)
    places.put(places.shipped, 5, GENERIC, PROBLEM._replace(c_in=64))
    assert stages(PROBLEM._replace(steps=128)) == 4


@pytest.mark.parametrize(("gpu", "expected"), [(SIBLING, 4), (GENERIC, 3)])
def test_what_a_sibling_measured_goes_before_the_model(places, monkeypatch, gpu, expected):
    """Its winner of this very problem, though the model prefers another of its winners; not what was compiled and never measured."""
    monkeypatch.setattr(lookup, "predicted", lambda problem, config, sm_count: float(config.num_stages))
    places.put(places.shipped, 3, gpu, PROBLEM._replace(c_in=512))
    places.put(places.shipped, 4, gpu)
    assert stages() == expected


def test_a_config_of_another_problem_must_suit(places):
    """Another dtype's pipeline may be too large, descriptors unable to read, three taps more than there are; then the default serves."""
    places.put(places.own, 4, config=CONFIG._replace(BLOCK_C_OUT=256))
    places.put(places.own, 4, problem=PROBLEM._replace(dtype="tf32"), config=CONFIG._replace(BLOCK_T=64))
    tuning.forget()
    odd, wide = PROBLEM._replace(aligned=False), PROBLEM._replace(dtype="tf32", c_out=512)
    assert get_config(0, odd).path == "pointer"
    for problem in (odd, wide, PROBLEM._replace(c_in=16, c_out=16)):
        assert space.suits(get_config(0, problem), problem)
        assert space.shared_memory(problem, get_config(0, problem)) <= GPU.shared_memory


def test_config_of_a_sibling_must_fit(places):
    places.put(places.shipped, 4, SIBLING._replace(name="a large one"), shared=1 << 30)
    places.put(places.shipped, 5, SIBLING)
    assert stages() == 5


def test_unknown_gpu_and_architecture(places, monkeypatch):
    places.put(places.shipped, 3)
    monkeypatch.setattr(Gpu, "current", staticmethod(lambda device: Gpu("??/../ ☃", "sm90", 1, 1 << 18)))
    assert stages() == 3
    monkeypatch.setattr(Gpu, "current", staticmethod(lambda device: Gpu("", "gfx9999", 1, 1 << 18)))
    tuning.forget()
    with pytest.warns(UserWarning, match="not tuned"):
        assert get_config(0, PROBLEM) == default_config(PROBLEM)


# ---- nothing found


def test_one_warning_an_op_with_the_command(places):
    with pytest.warns(UserWarning, match=f"{OP} is not tuned for Fake GPU 9000 .* to tune it: fuzzytok warmup") as caught:
        get_config(0, PROBLEM)
    assert len(caught) == 1
    command = str(caught[0].message).partition("to tune it: fuzzytok warmup ")[2]
    assert command == "--op causal_conv1d --shape 1,65536,256,256,3 --dtype bf16 --layout last --dilation 1"
    parser = argparse.ArgumentParser()
    add_problem_arguments(parser)
    assert problem_from(parser.parse_args(command.split()), GPU) == (PROBLEM, 1, 1, 65536)
    assert stages(PROBLEM._replace(c_in=512)) == default_config(PROBLEM).num_stages
    with pytest.warns(UserWarning, match="causal_conv1d_weight_grad is not tuned"):
        get_config(0, PROBLEM._replace(op="causal_conv1d_weight_grad"))


def test_cpu_is_silent_and_touches_nothing(places, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(lookup, "sources", None)
    for name in ("get_device_properties", "get_device_name", "is_current_stream_capturing", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, None)
    tuning.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_config(-1, PROBLEM) == default_config(PROBLEM)


def test_broken_file_is_passed_over_with_one_warning(places):
    places.put(places.own, 1).write_text("{")
    places.put(places.cache, 2)
    with pytest.warns(UserWarning, match="own") as caught:
        assert get_config(0, PROBLEM).num_stages == 2
        assert get_config(0, PROBLEM._replace(c_in=512)).num_stages == 2
    assert len(caught) == 1


# ---- once


def test_no_file_is_touched_again(places, monkeypatch):
    path = places.put(places.own, 1)
    assert stages() == 1
    path.unlink()
    monkeypatch.setattr(lookup, "find", None)
    for _ in range(3):
        assert get_config(0, PROBLEM).num_stages == 1


def test_devices_are_told_apart(places, monkeypatch):
    monkeypatch.setattr(Gpu, "current", staticmethod(lambda device: (GPU, SIBLING)[device]))
    places.put(places.own, 1), places.put(places.own, 2, SIBLING)
    tuning.forget()
    assert [get_config(device, PROBLEM).num_stages for device in (0, 1, 0)] == [1, 2, 1]


def test_threads(places, monkeypatch):
    """All get the same, each file is read once, and the one warning comes once."""
    reads = []
    monkeypatch.setattr(store, "read", lambda *args, read=store.read: reads.append(args[0]) or read(*args))
    places.put(places.own, 1)
    problems = [PROBLEM._replace(c_in=8 * i, op=op) for i in range(1, 60) for op in (OP, "causal_conv1d_input_grad")]
    reads.clear()
    tuning.forget()
    barrier = threading.Barrier(8)

    def look_all_up(_) -> list[Config]:
        barrier.wait()
        return [get_config(0, problem) for problem in problems]

    with pytest.warns(UserWarning, match="input_grad is not tuned") as caught, ThreadPoolExecutor(8) as pool:
        results = list(pool.map(look_all_up, range(8)))
    assert len(caught) == 1
    assert results == [results[0]] * 8
    assert len(reads) == len(set(reads))


def test_fork_while_another_thread_looks_up(places):
    """The child must not wait for a lock whose thread it does not have."""
    places.put(places.own, 1)
    tuning.forget()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with tuning._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        threading.Thread(target=lambda: os._exit(get_config(0, PROBLEM).num_stages)).start()
        done.wait(20)
        os._exit(99)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


COLD = """
import sys
from pathlib import Path
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" and ".json" in str(args[0]) else None)
from fuzzytok_kernels.tuning import Problem, get_config
from fuzzytok_kernels.tuning.gpu import Gpu
Gpu.current = staticmethod(lambda device: Gpu{gpu})
for _ in range(2):
    assert get_config(0, Problem{problem}).num_stages == 7
assert not {{"filelock", "fuzzytok_kernels.tuning.tuner", "fuzzytok_kernels.launch"}} & set(sys.modules)
assert opened == [{path!r}], opened
"""


def test_cold_process_reads_one_file_and_imports_no_tuner(places):
    path = str(places.put(places.own, 7))
    places.put(places.cache, 2)
    run_python(COLD.format(gpu=tuple(GPU), problem=tuple(PROBLEM), path=path))


# ---- the problem


@pytest.mark.parametrize(
    ("steps", "rounded"), [(1, 1), (2, 2), (3, 4), (5, 4), (65_536, 65_536), (65_536 + 42, 65_536), (92_681, 65_536), (92_682, 131_072)]
)
def test_steps_are_rounded_to_the_nearest_power_of_two(steps, rounded):
    """A shard behind its history has the config of the shard."""
    assert tuning.rounded_steps(steps) == rounded


# ---- force and record


def test_force_is_for_all_threads_and_ends(places):
    places.put(places.own, 1)
    assert stages() == 1
    with tuning.force(num_stages=6), ThreadPoolExecutor(1) as pool:
        assert pool.submit(get_config, 0, PROBLEM).result() == default_config(PROBLEM)._replace(num_stages=6)
        with tuning.force(CONFIG):
            assert get_config(0, PROBLEM) == CONFIG
            assert get_config(0, PROBLEM._replace(aligned=False)) == default_config(PROBLEM._replace(aligned=False))
        assert get_config(0, PROBLEM).num_stages == 6
    assert get_config(0, PROBLEM).num_stages == 1


def test_record_problems(places):
    """Those looked up before as well, those of other threads, and those that run with a forced config."""
    places.put(places.own, 1)
    assert stages() == 1
    forced, threaded, outside = (PROBLEM._replace(c_in=c) for c in (8, 16, 24))
    with tuning.record_problems() as problems:
        assert get_config(0, PROBLEM).num_stages == 1
        with tuning.record_problems() as inner, tuning.force(CONFIG), ThreadPoolExecutor(1) as pool:
            get_config(0, forced)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(get_config, 0, threaded).result()
    get_config(0, outside)
    assert problems == {PROBLEM, forced, threaded}
    assert inner == {forced}


@needs_kernels
@pytest.mark.parametrize("dtype", ["fp16", "tf32"])
@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize("shape", [(2, 70, 24, 40, 3), (2, 70, 20, 40, 3), (2, 70, 23, 39, 1), (1, 2, 8, 8, 2)], ids=str)
def test_commands_name_the_problems_that_run(shape, layout, dtype):
    """`problem_from` makes of a shape what `launch` makes of tensors."""
    B, T, c_in, c_out, K = shape
    x = torch.randn(B, c_in, T, device=DEVICE, dtype=torch.float16 if dtype == "fp16" else torch.float32)
    if layout == "last":
        x = x.mT.contiguous().mT
    weight = torch.randn(c_out, c_in, K, device=DEVICE, dtype=x.dtype, requires_grad=True)
    with tuning.record_problems() as problems, torch.backends.cudnn.flags(allow_tf32=True):
        y = torch.ops.fuzzytok.causal_conv1d(x.requires_grad_(), weight, None, 2)
        y.backward(torch.randn_like(y))
        z = torch.ops.fuzzytok.causal_conv1d_fused(x, weight, None, None, None, None, 2, "gelu")
        z.backward(torch.randn_like(z))
    gpu = Gpu.current(0) if DEVICE.type == "cuda" else GPU
    if dtype == "tf32" and "tf32" not in {problem.dtype for problem in problems}:
        pytest.skip("no TF32 here")
    for op in OPS:
        activation = "gelu" if op in ("causal_conv1d_fused", "causal_conv1d_activation_grad") else "none"
        options = argparse.Namespace(op=op, shape=shape, dtype=dtype, layout=layout, dilation=2, activation=activation)
        assert problem_from(options, gpu)[0] in problems


# ---- FUZZYTOK_AUTOTUNE


@pytest.fixture
def tuned(places, monkeypatch) -> list:
    """What was tuned at its first call; the tuner is a fake."""
    calls: list = []

    def tune_now(device: int, problem: Problem) -> Config:
        calls.append((device, problem))
        return CONFIG._replace(num_stages=8)

    tuner = types.ModuleType("tuner")
    tuner.tune_now = tune_now
    monkeypatch.setitem(sys.modules, "fuzzytok_kernels.tuning.tuner", tuner)
    monkeypatch.setenv("FUZZYTOK_AUTOTUNE", "1")
    return calls


def test_autotune_at_the_first_call(places, tuned):
    places.put(places.own, 1)
    near = PROBLEM._replace(c_in=264)
    assert [get_config(0, problem).num_stages for problem in (PROBLEM, near, near)] == [1, 8, 8]
    assert tuned == [(0, near)]


def test_autotune_does_not_trust_other_gpus(places, tuned):
    places.put(places.shipped, 4, SIBLING)
    assert get_config(0, PROBLEM).num_stages == 8


def test_no_autotune_inside_a_graph_capture_or_unless_asked(places, tuned, monkeypatch):
    places.put(places.own, 1)
    near = PROBLEM._replace(c_in=264)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert stages(near) == 1
    monkeypatch.setenv("FUZZYTOK_AUTOTUNE", "0")
    assert stages(near) == 1
    assert not tuned


def test_autotune_that_fails_is_a_warning(places, tuned, monkeypatch):
    def fail(device: int, problem: Problem) -> Config:
        raise OSError("read-only")

    monkeypatch.setattr(sys.modules["fuzzytok_kernels.tuning.tuner"], "tune_now", fail)
    places.put(places.own, 1)
    with pytest.warns(UserWarning, match="could not tune .*read-only"):
        assert get_config(0, PROBLEM._replace(c_in=264)).num_stages == 1


# ---- installed

INSTALLED = """
import site, sys
before = len(sys.path)
site.addsitedir({target!r})  # reads .pth files, which PYTHONPATH does not
sys.path[:0] = sys.path[before:]
from fuzzytok_kernels.tuning import Problem, get_config, lookup
from fuzzytok_kernels.tuning.gpu import Gpu
Gpu.current = staticmethod(lambda device: Gpu{gpu})
assert str(lookup.shipped_folder()) == {folder!r}, lookup.shipped_folder()
assert get_config(0, Problem{problem}).num_stages == 7
"""


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_installed_package_finds_its_files(editable, places, tmp_path):
    pytest.importorskip("hatchling")
    pytest.importorskip("editables")
    project, target, root = tmp_path / "project", tmp_path / "target", Path(fuzzytok_kernels.__file__).parents[1]
    shutil.copytree(root / "fuzzytok_kernels", project / "fuzzytok_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, project)
    places.put(project / "tuning_cache", 7)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    subprocess.run([*pip, *(["--editable"] if editable else []), str(project)], check=True, cwd=tmp_path)
    folder = (project if editable else target / "fuzzytok_kernels") / "tuning_cache"
    run_python(INSTALLED.format(target=str(target), folder=str(folder), gpu=tuple(GPU), problem=tuple(PROBLEM)))


def test_forces_that_interleave():
    with tuning.force(BLOCK_T=16):
        inner = tuning.force(BLOCK_T=32)
        inner.__enter__()
    assert tuning.is_forced()
    inner.__exit__(None, None, None)
    assert not tuning.is_forced()


@pytest.mark.parametrize(("fields", "named"), [({"path": "magic"}, "path is 'magic'"), ({"BLOCK_Z": 3}, "BLOCK_Z is no field")], ids=str)
def test_force_refuses_what_no_kernel_takes(fields, named):
    with pytest.raises(ValueError, match=named), tuning.force(**fields):
        pass
    assert not tuning.is_forced()
