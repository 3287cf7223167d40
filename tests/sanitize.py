"""`make sanitize`: NVIDIA's memcheck, racecheck and initcheck over small problems of every op, on a GPU; zero findings expected.

    FUZZYTOK_TEST_DEVICE=cuda PYTHONPATH=. python3 tests/sanitize.py [--tools memcheck racecheck initcheck] [--each N] [--seed S]

First the same without a sanitizer, which compiles the kernels. Then every tool over every op, and over a kernel that is wrong on purpose,
in which it must find something; each in a process of its own, as many at once as there are cores, on all GPUs in turn.
"""

import argparse
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import cases
import guards
import torch
import triton
import triton.language as tl
import verdicts

from fuzzytok_kernels import tuning
from fuzzytok_kernels.tuning.worker import cores

TOOLS = ("memcheck", "racecheck", "initcheck")
_running: list[subprocess.Popen] = []


class Run(NamedTuple):
    """What one process does, by itself or under a tool."""

    tool: str | None
    what: str  # an op, or a tool whose wrong kernel it is
    problems: int
    seed: int
    gpu: int

    def __call__(self) -> str:
        """What it prints. Memory straight from CUDA, so that the tools see where each tensor ends and what of it was written."""
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        command = [sanitizer, "--tool", self.tool, "--print-limit", "10"] if self.tool else []
        command += ["--report-api-errors", "no"] if self.tool == "memcheck" else []
        command += [sys.executable, __file__, "--run", self.what, "--each", str(self.problems)]
        command += ["--seed", str(self.seed), "--gpu", str(self.gpu)]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        kinds = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        with subprocess.Popen(command, env=environment, **kinds) as process:
            _running.append(process)
            return process.communicate()[0]


def main() -> int:
    """1 if a tool found anything in the ops, or nothing in the kernel that is wrong, or a run did not end; else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[2].partition("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--each", type=int, default=12, help="problems an op (default: 12)")
    parser.add_argument("--seed", type=int, default=11, help="of the problems (default: 11)")
    parser.add_argument("--run", choices=[*TOOLS, *cases.SUBJECTS], help="do this alone, in the process that is watched")
    parser.add_argument("--gpu", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.run:
        return _watched(chosen.run, chosen.each, chosen.seed, chosen.gpu)
    started, found, problems, faults = time.monotonic(), Counter(), Counter(), 0
    gpus = itertools.cycle(range(torch.cuda.device_count()))
    compiling = [Run(None, op, chosen.each, chosen.seed, next(gpus)) for op in cases.SUBJECTS]
    watched = [Run(tool, tool, 0, 0, next(gpus)) for tool in chosen.tools]
    watched += [Run(tool, op, chosen.each, chosen.seed, next(gpus)) for op in cases.SUBJECTS for tool in chosen.tools]
    try:
        for run, output in itertools.chain(_outputs(compiling), _outputs(watched)):
            count, fault = _judged(run, output)
            print(f"{run.tool or 'compiling'} {run.what}: {fault or f'{count} findings'}, {time.monotonic() - started:.0f} s", flush=True)
            if fault:
                print(output[:6000], flush=True)
            faults += fault is not None
            if run.tool and run.what != run.tool and count is not None:
                found[run.tool] += count
                problems[run.tool] += run.problems
    except KeyboardInterrupt:
        print("stopped")
    for tool in chosen.tools:
        print(f"{tool}: {found[tool]} findings in {problems[tool]} of {chosen.each * len(cases.SUBJECTS)} problems")
    complete = all(problems[tool] == chosen.each * len(cases.SUBJECTS) for tool in chosen.tools)
    print(f"{faults} faults{'' if complete else ', NOT ALL WAS RUN'}, in {time.monotonic() - started:.0f} s; seed {chosen.seed}")
    return 0 if complete and not faults else 1


def _judged(run: Run, output: str) -> tuple[int | None, str | None]:
    """How much the tool found, None if it did not come to its end; and what is wrong with that, if anything."""
    found = [int(number) for number in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)]
    if run.what == run.tool:
        return (sum(found), None) if sum(found) else (0, "nothing found where something is wrong on purpose")
    if "ran to its end" not in output or (run.tool and not found):
        return None, "did not end"
    return sum(found), f"{sum(found)} FINDINGS" if sum(found) else None


def _outputs(runs: list[Run]) -> Iterator[tuple[Run, str]]:
    """As they come."""
    pool = ThreadPoolExecutor(cores())
    futures = {pool.submit(run): run for run in runs}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in _running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


# ---- in the process that is watched


def _watched(what: str, problems: int, seed: int, gpu: int) -> int:
    torch.cuda.set_device(gpu)
    if what in TOOLS:
        _run_wrong(what)
    else:
        for case in _cases(what, problems, seed):
            args = cases.SUBJECTS[case.op].arguments(case, cases.Tensors(case))
            with verdicts.precision(case.dtype), tuning.force(**cases.CONFIGS[case.config]):
                getattr(torch.ops.fuzzytok, case.op).default(*args)
    torch.cuda.synchronize()
    print("ran to its end", flush=True)
    return 0


def _cases(op: str, problems: int, seed: int) -> Iterator[cases.Case]:
    """Small ones whose tensors end where their memory does."""
    guards.ZONE = 0
    draw = random.Random(f"{seed} {op}")
    for number in range(problems):
        template = {name: draw.choice(values) for name, values in cases.choices(op).items()}
        template |= {name: cases.GROUPS[template[name]](draw.randrange(3)) for name in ("c_in", "channels", "T")}
        template["config"] = 1 + number % (len(cases.CONFIGS) - 1)  # each as often
        rows = 1 if template["packed"] else draw.randrange(1, 4)
        yield cases.Case(**template, B=rows, d=draw.randrange(1, 9), spoilt=None, seed=number)


@triton.jit
def wrong_copy_kernel(x, y, n, BLOCK: tl.constexpr):
    """Reads and writes behind the end, and what nobody has written."""
    i = tl.arange(0, BLOCK)
    tl.store(y + i + n, tl.load(x + i))


def _run_wrong(tool: str) -> None:
    if tool == "racecheck":  # Triton places its barriers itself. Each thread reads another warp's word: its own came from a register
        source = """extern "C" __global__ void race_kernel(int* y) {
            __shared__ int s[128]; s[threadIdx.x] = threadIdx.x; y[threadIdx.x] = s[127 - threadIdx.x];
        }"""
        kernel = torch.cuda._compile_kernel(source, "race_kernel")
        kernel(grid=(1, 1, 1), block=(128, 1, 1), args=[torch.zeros(128, dtype=torch.int32, device="cuda")])
    else:
        x = torch.empty(1024, device="cuda")
        wrong_copy_kernel[(1,)](x, torch.zeros(1024, device="cuda"), 1024 if tool == "memcheck" else 0, 1024)


if __name__ == "__main__":
    sys.exit(main())
