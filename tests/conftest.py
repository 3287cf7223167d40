"""The switches of the tests: where they run (modes.py), on which dtypes, on which of the two kernel paths."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it set where oracle.py asks for deterministic algorithms
if "PYTEST_XDIST_WORKER" in os.environ:  # else each of 14 workers has Inductor start a process for every core
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from modes import DEVICE, DTYPES, INTERPRETED, KERNELS_RUN, ON_CUDA, SIZES, STRICT

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
if INTERPRETED:
    from addresses import watch

    watch()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    if ON_CUDA and not torch.cuda.is_available():
        pytest.exit("FUZZYTOK_TEST_DEVICE=cuda, but PyTorch sees no GPU", returncode=2)
    return DEVICE


@pytest.fixture
def strict(monkeypatch) -> None:
    """fp32 without TF32. By the old name: PyTorch refuses to read it once the new one has been set."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request, strict) -> torch.dtype:
    return request.param


@pytest.fixture(params=SIZES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype_of_each_size(request, strict) -> torch.dtype:
    return request.param


@pytest.fixture
def strict_dtype(strict) -> torch.dtype:
    """The dtype in which two correct results are close."""
    return STRICT


@pytest.fixture(params=["tma", "pointer"] if KERNELS_RUN else ["reference"])
def path(request):
    """Runs a test on both kernel paths, or once where the reference computes."""
    if not KERNELS_RUN:
        yield request.param
        return
    from fuzzytok_kernels import tuning

    with tuning.force(path=request.param):
        yield request.param


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders of tuning files for a GPU that is not there, empty; by `predicted` all configs are alike, so that the nearest serves."""
    from places import GPU, Places

    from fuzzytok_kernels import tuning
    from fuzzytok_kernels.tuning import lookup
    from fuzzytok_kernels.tuning.gpu import Gpu

    found = Places(tmp_path)
    monkeypatch.setenv("FUZZYTOK_TUNING_DIR", str(found.own))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("FUZZYTOK_AUTOTUNE", raising=False)
    monkeypatch.setattr(lookup, "shipped_folder", lambda: found.shipped)
    monkeypatch.setattr(Gpu, "current", staticmethod(lambda device: GPU if device >= 0 else None))
    monkeypatch.setattr(lookup, "_warned", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(lookup, "predicted", lambda problem, config, multiprocessors: 1.0)
    tuning.forget()
    yield found
    tuning.forget()
