"""`fuzzytok warmup`: tune this GPU, for the default list of problems, for one, or for those of a model."""

import argparse
import importlib
import statistics
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
    (32, 2048, 256, 256, 1), (8, 256, 256, 256, 1),
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
    parser.add_argument("--model", metavar="MODULE:CALLABLE", help="call this, forward and backward, and tune the problems it meets")
    parser.add_argument("--quick", action="store_true", help=f"{MOST_QUICK} candidates a problem instead of {MOST}")
    parser.add_argument("--out", type=Path, default=None, help="the folder for the results (default: the user's own)")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(1, "fuzzytok warmup: tuning measures on a GPU, and there is none\n")
    if chosen.op is not None:
        problem, dilation, B, T = problem_from(chosen)
        jobs = [Job(problem, B, T, dilation)]
    elif chosen.model is not None:
        jobs = [job_of(problem) for problem in _problems_of(chosen.model)]
    else:
        jobs = default_jobs(facts(torch.device("cuda", torch.cuda.current_device())).descriptors)
    started = time.monotonic()
    folder = chosen.out or user_folder()
    entries = tune(jobs, folder, MOST_QUICK if chosen.quick else MOST)
    gains = [entry.default_us / entry.time_us for entry in entries if entry.default_us and entry.time_us]
    gain = f", {statistics.geometric_mean(gains):.2f} times as fast as the default" if gains else ""
    print(f"{len(entries)} of {len(jobs)} problems tuned in {time.monotonic() - started:.0f} s{gain}; stored in {folder}")
    return 0 if len(entries) == len(jobs) else 1


def _problems_of(name: str) -> list[Problem]:
    module, _, attribute = name.partition(":")
    call = getattr(importlib.import_module(module), attribute)
    with record_problems() as problems:
        call()
    return sorted(problems)
