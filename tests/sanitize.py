"""`make sanitize`: NVIDIA's memcheck, racecheck and initcheck over small problems of every op, on a GPU; zero findings expected.

    FUZZYTOK_TEST_DEVICE=cuda PYTHONPATH=. python3 tests/sanitize.py [memcheck racecheck initcheck]

First the same without a sanitizer, which compiles the kernels; then a kernel that is wrong on purpose, which each tool must find.
"""

import os
import random
import re
import shutil
import subprocess
import sys
import time

import cases
import torch
import triton
import triton.language as tl
import verdicts

TOOLS = ("memcheck", "racecheck", "initcheck")
_EACH = 6  # problems an op
_SEED = 11


def main(arguments: list[str]) -> int:
    """1 if a tool found anything in the ops, or nothing in the kernel that is wrong; else 0."""
    if arguments[:1] == ["--run"]:
        return {"ops": _run_ops, **dict.fromkeys(TOOLS, lambda: _run_wrong(arguments[1]))}[arguments[1]]()
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    _python("ops", [])
    status = 0
    for tool in arguments or TOOLS:
        command = [sanitizer, "--tool", tool, "--print-limit", "10", *(["--report-api-errors", "no"] if tool == "memcheck" else [])]
        wrong, output = _findings(_python(tool, command))
        print(f"{tool}: {wrong} findings in a kernel that is wrong on purpose", flush=True)
        started = time.monotonic()
        found, output = _findings(_python("ops", command))
        print(f"{tool}: {found} findings in {len(list(_cases()))} problems, {time.monotonic() - started:.0f} s", flush=True)
        if found:
            print(output)
        status |= found != 0 or wrong == 0
    return status


def _python(what: str, command: list[str]) -> str:
    """Memory straight from CUDA, so that the tools see where each tensor ends and what of it was written."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run([*command, sys.executable, __file__, "--run", what], capture_output=True, text=True, env=environment)
    if "ran to its end" not in result.stdout and what == "ops":
        sys.exit(f"{' '.join(command)}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}")
    return result.stdout + result.stderr


def _findings(output: str) -> tuple[int, str]:
    """How many hazards or errors the tool says that it found."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    if not summary:
        sys.exit(f"compute-sanitizer gave no summary:\n{output[-4000:]}")
    return sum(map(int, summary)), output


# ---- in the process that is watched


def _cases() -> list[cases.Case]:
    draw, found = random.Random(_SEED), []
    for op in cases.SUBJECTS:
        for number in range(_EACH):
            template = {name: draw.choice(values) for name, values in cases.choices(op).items()}
            template |= {name: cases.GROUPS[template[name]](draw.randrange(3)) for name in ("c_in", "channels", "T")}
            template["config"] = 1 + number % (len(cases.CONFIGS) - 1)  # each once
            found.append(
                cases.Case(
                    **template, B=1 if template["packed"] else draw.randrange(1, 4), d=draw.randrange(1, 9), spoilt=None, seed=number
                )
            )
    return found


def _run_ops() -> int:
    from fuzzytok_kernels import tuning

    for case in _cases():
        args = cases.SUBJECTS[case.op].arguments(case, cases.Tensors(case))
        args = tuple(arg.clone(memory_format=torch.preserve_format) if isinstance(arg, torch.Tensor) else arg for arg in args)  # no zones
        with verdicts.precision(case.dtype), tuning.force(**cases.CONFIGS[case.config]):
            getattr(torch.ops.fuzzytok, case.op).default(*args)
    torch.cuda.synchronize()
    print("ran to its end")
    return 0


@triton.jit
def wrong_copy_kernel(x, y, n, BLOCK: tl.constexpr):
    """Reads and writes behind the end, and what nobody has written."""
    i = tl.arange(0, BLOCK)
    tl.store(y + i + n, tl.load(x + i))


def _run_wrong(tool: str) -> int:
    if tool == "racecheck":  # Triton places its barriers itself; two warps of a CUDA kernel meet in one word
        source = 'extern "C" __global__ void race_kernel(int* y) { __shared__ int s; s = threadIdx.x; y[threadIdx.x] = s; }'
        kernel = torch.cuda._compile_kernel(source, "race_kernel")
        kernel(grid=(1, 1, 1), block=(128, 1, 1), args=[torch.zeros(128, dtype=torch.int32, device="cuda")])
    else:
        x = torch.empty(1024, device="cuda")
        wrong_copy_kernel[(1,)](x, torch.zeros(1024, device="cuda"), 1024 if tool == "memcheck" else 0, 1024)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
