"""`fuzzytok warmup`: tune this GPU, for the default list of problems, for one, or for those of a model."""

import argparse
import importlib
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fuzzytok_kernels.support import facts
from fuzzytok_kernels.tuning import Problem, record_problems, rounded_steps
from fuzzytok_kernels.tuning.arguments import add_problem_arguments, problem_from
from fuzzytok_kernels.tuning.lookup import user_folder
from fuzzytok_kernels.tuning.measure import Job
from fuzzytok_kernels.tuning.space import OPS
from fuzzytok_kernels.tuning.tuner import MOST, MOST_QUICK, job_of, tune

# B, T, C_in, C_out, K: the paper's four sizes, long ones, narrow and wide channels, other kernel sizes.
_COMMON = ((8, 256, 256, 256, 3), (32, 2048, 256, 256, 3))
_HALF = (*_COMMON, (32, 1024, 256, 256, 3), (32, 2048, 512, 512, 3), (64, 4096, 128, 128, 3), (32, 2048, 64, 64, 3),
         (32, 2048, 250, 250, 3), (8, 256, 60, 60, 3))  # fmt: skip  # the last two have rows that descriptors cannot read
_BF16 = (
    *_HALF, (1, 128, 256, 256, 3), (16, 512, 256, 256, 3), (8, 8192, 1024, 1024, 3), (8, 256, 64, 64, 3), (8, 512, 512, 512, 3),
    (8, 512, 1024, 1024, 3), (32, 1024, 128, 128, 3), (32, 2048, 128, 256, 3), (32, 2048, 256, 128, 3), (32, 2048, 256, 256, 2),
    (8, 512, 256, 256, 2), (32, 2048, 256, 256, 5), (16, 1000, 320, 192, 5), (8, 256, 256, 256, 5), (16, 2048, 512, 512, 7),
    (32, 2048, 256, 256, 1), (8, 256, 256, 256, 1), (8, 8192, 1, 64, 3), (32, 2048, 16, 16, 3),
)  # fmt: skip
_DEFAULT = {("bf16", "last"): _BF16, ("fp16", "last"): _HALF, ("tf32", "last"): _COMMON, ("fp32", "last"): _COMMON}
_DEFAULT |= {("bf16", "first"): _HALF, ("fp16", "first"): _COMMON, ("tf32", "first"): _COMMON, ("fp32", "first"): _COMMON}


def default_jobs(descriptors: bool) -> list[Job]:
    """The list that a warm-up without arguments tunes, for a GPU with or without descriptors."""
    jobs = []
    for (dtype, layout), shapes in _DEFAULT.items():
        row = 16 // (2 if dtype in ("fp16", "bf16") else 4)
        for op in OPS:
            for B, T, c_in, c_out, K in shapes:
                aligned = descriptors and c_in % row == 0 and c_out % row == 0
                jobs.append(Job(Problem(op, dtype, layout, aligned, K, c_in, c_out, rounded_steps(B * T)), B, T, dilation=2))
    return jobs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fuzzytok warmup` and return its exit status."""
    parser = argparse.ArgumentParser(prog="fuzzytok warmup", description=__doc__)
    add_problem_arguments(parser)
    parser.add_argument("--model", metavar="MODULE:CALLABLE", help="call this, without arguments, and tune the problems that it meets")
    parser.add_argument("--quick", action="store_true", help=f"{MOST_QUICK} candidates a problem instead of {MOST}")
    parser.add_argument("--out", type=Path, default=None, help="the folder for the results (default: the user's own)")
    chosen = parser.parse_args(arguments)
    if (chosen.op is None) != (chosen.shape is None) or (chosen.op is not None and chosen.model is not None):
        parser.error("name a problem by --op and --shape, or a --model, or neither")
    if not torch.cuda.is_available():
        parser.exit(1, "fuzzytok warmup: tuning measures on a GPU, and there is none\n")
    started, folder = time.monotonic(), chosen.out or user_folder()
    try:
        jobs = _jobs(chosen)
        entries = tune(jobs, folder, MOST_QUICK if chosen.quick else MOST)
    except (OSError, ImportError, AttributeError) as error:
        parser.exit(1, f"fuzzytok warmup: {error}\n")
    gains = [entry.default_us / entry.time_us for entry in entries if entry.default_us and entry.time_us]
    gain = f", {statistics.geometric_mean(gains):.2f} times as fast as the default" if gains else ""
    print(f"{len(entries)} of {len(jobs)} problems are tuned, after {time.monotonic() - started:.0f} s{gain}; stored in {folder}")
    return 0 if len(entries) == len(jobs) else 1


def _jobs(chosen: argparse.Namespace) -> list[Job]:
    if chosen.op is not None:
        problem, dilation, B, T = problem_from(chosen)
        return [Job(problem, B, T, dilation)]
    if chosen.model is not None:
        return [job_of(problem) for problem in _problems_of(chosen.model)]
    return default_jobs(facts(torch.device("cuda", torch.cuda.current_device())).descriptors)


def _problems_of(name: str) -> list[Problem]:
    """What the callable "module:name" meets; the module may lie in the current folder. Raises ImportError or AttributeError."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    call = getattr(importlib.import_module(module), attribute)
    with record_problems() as problems:
        call()
    return sorted(problems)
