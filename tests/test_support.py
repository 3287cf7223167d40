"""Where the ops run: GPUs that Triton cannot use well, threads, processes without a GPU."""

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch
from modes import ON_CUDA, interpreter_cannot, needs_cuda, run_python
from oracle import OPS, Problem, assert_accurate, assert_same_bits, make_inputs, ours, with_gradients

from fuzzytok_kernels import reference, registration, support

PROBLEM = Problem(B=2, c_in=16, c_out=24, T=37, K=3, d=4)


@pytest.fixture
def old_gpu(monkeypatch):
    """As if every GPU were a Turing, which gets no tensor cores from Triton."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old GPU")
    caches = [value for module in (registration, support) for value in vars(module).values() if hasattr(value, "cache_clear")]
    for cached in caches:
        cached.cache_clear()
    yield torch.device("cuda:0")
    for cached in caches:
        cached.cache_clear()


def test_old_gpu_runs_the_reference_with_one_warning(old_gpu, monkeypatch):
    calls = {op: Mock(wraps=getattr(reference, op)) for op in OPS}
    for op, call in calls.items():
        monkeypatch.setattr(reference, op, call)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert not support.runs_triton(old_gpu)
            if ON_CUDA:
                assert_accurate(make_inputs(PROBLEM, torch.float16, old_gpu))
    assert not ON_CUDA or all(call.call_count == 6 for call in calls.values())  # ours, and the oracle's
    messages = [str(warning.message) for warning in caught if "fuzzytok_kernels" in str(warning.message)]
    assert len(messages) == 1
    assert "Old GPU" in messages[0]


@needs_cuda
def test_this_gpu_runs_the_kernels(device):
    assert support.runs_triton(torch.device("cuda:0"))


def test_without_triton_the_reference(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
    assert support.runs_triton.__wrapped__(torch.device("cpu")) is False
    with pytest.warns(UserWarning, match="Triton is not installed; convolutions on A GPU"):
        assert support.runs_triton.__wrapped__(torch.device("cuda:0")) is False


def test_with_an_older_triton_the_reference(monkeypatch):
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", "3.5.1")
    monkeypatch.setitem(sys.modules, "fuzzytok_kernels.private_triton", None)  # cannot be imported there
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
    assert support.runs_triton.__wrapped__(torch.device("cpu")) is False
    with pytest.warns(UserWarning, match=r"Triton 3\.5\.1 is older than 3\.6; convolutions on A GPU"):
        assert support.runs_triton.__wrapped__(torch.device("cuda:0")) is False


@pytest.mark.parametrize("version", ["3.6.0", "3.10.1+git0123", "4.0"])
def test_a_newer_triton_is_not_too_old(version, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", version)
    assert support._too_old() is None


def test_without_a_driver_the_reference(monkeypatch):
    triton_driver = pytest.importorskip("triton.runtime.driver").driver
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(triton_driver, "_active", Mock(**{"get_current_target.side_effect": RuntimeError("no driver")}))
    with pytest.warns(UserWarning, match=r"Triton cannot use the driver \(no driver\); convolutions on A GPU"):
        assert support.runs_triton.__wrapped__(torch.device("cuda:0")) is False


CALL = "fuzzytok_kernels.causal_conv1d(torch.ones(1, 1, 2), torch.ones(1, 1, 1))"


@pytest.mark.parametrize("call", ["", CALL], ids=["import", "call"])
def test_import_needs_no_gpu(call):
    """Neither import nor call touches CUDA."""
    run_python(f"import torch, fuzzytok_kernels\n{call}\nassert not torch.cuda.is_initialized()", CUDA_VISIBLE_DEVICES="")


@interpreter_cannot("it keeps the grid in a global, so that threads mix theirs up")
def test_threads(device, path):
    """Eight at once, backward included, each with the bits of the first."""
    inputs = make_inputs(PROBLEM, torch.float32, device)
    want = ours(inputs)

    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: with_gradients(OPS["causal_conv1d"], inputs), range(16)):
            assert_same_bits(got, want)
