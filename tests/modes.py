"""The three ways to run the tests: plain CPU, `TRITON_INTERPRET=1` (CPU tensors reach the kernels), `FUZZYTOK_TEST_DEVICE=cuda`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DEVICE = torch.device(os.environ.get("FUZZYTOK_TEST_DEVICE", "cpu"))
ON_CUDA = DEVICE.type == "cuda"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS_RUN = ON_CUDA or INTERPRETED

if ON_CUDA:
    DTYPES = [torch.float16, torch.bfloat16, torch.float32]
elif INTERPRETED:
    DTYPES = [torch.float32, torch.float16]  # bf16 left out: the interpreter's tl.dot returns garbage for it
else:
    DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

SIZES = DTYPES if not ON_CUDA else [torch.float16, torch.float32]  # one dtype of each size: what addressing depends on
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the autocast dtype
STRICT = torch.float32 if KERNELS_RUN else torch.float64

needs_kernels = pytest.mark.skipif(not KERNELS_RUN, reason="the kernels run on CUDA or with TRITON_INTERPRET=1")
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs FUZZYTOK_TEST_DEVICE=cuda")
needs_two_gpus = pytest.mark.skipif(not ON_CUDA or torch.cuda.device_count() < 2, reason="needs two GPUs")


def interpreter_cannot(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(INTERPRETED, reason=f"interpreter: {reason}")


not_interpreted = interpreter_cannot("no kernel takes part, so that the plain run covers it")


# On a GPU PyTorch's autograd thread, which may need the interpreter once more after a backward in Python, aborts a process in 1 exit of 30
# ("terminate called without an active exception", with an autograd.Function of its own alone, 2.11).
_LEAVE = "\nimport os, sys; sys.stdout.flush(); os._exit(0)" if ON_CUDA else ""


def run_python(code: str, **environment: str) -> None:
    """Runs `code`, which sees the package and the helpers of the tests, in a plain process of its own."""
    tests = Path(__file__).parent
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    inherited["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, "-c", code + _LEAVE], capture_output=True, text=True, env=inherited | environment)
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}"
