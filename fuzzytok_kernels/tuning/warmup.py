"""`fuzzytok warmup`: tune this GPU, for the default list of problems, for one, or for those of a model."""

import argparse
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fuzzytok_kernels.support import facts
from fuzzytok_kernels.tuning import Problem, record_problems, rounded_steps
from fuzzytok_kernels.tuning.arguments import add_problem_arguments, problem_from
from fuzzytok_kernels.tuning.lookup import user_folder
from fuzzytok_kernels.tuning.measure import Job
from fuzzytok_kernels.tuning.problem import describable
from fuzzytok_kernels.tuning.tuner import MOST, MOST_QUICK, job_of, tune

# B, T, C_in, C_out, K: the paper's four sizes, long ones, narrow and wide channels, other kernel sizes.
_COMMON = ((8, 256, 256, 256, 3), (32, 2048, 256, 256, 3))
_WIDE = (*_COMMON, (32, 2048, 512, 512, 3), (16, 1000, 320, 192, 5))
_MORE = (*_COMMON, (32, 1024, 256, 256, 3), (32, 2048, 512, 512, 3), (64, 4096, 128, 128, 3), (32, 2048, 64, 64, 3),
         (32, 2048, 250, 250, 3), (8, 256, 60, 60, 3))  # fmt: skip  # the last two have rows that descriptors cannot read
_LONG = ((64, 2048, 256, 256, 3), (128, 2048, 256, 256, 3))  # steps of training runs: served by other entries, 5 % slower by a fit
_MOST = (
    *_MORE, *_LONG, (1, 128, 256, 256, 3), (16, 512, 256, 256, 3), (8, 8192, 1024, 1024, 3), (8, 256, 64, 64, 3), (8, 512, 512, 512, 3),
    (8, 512, 1024, 1024, 3), (32, 1024, 128, 128, 3), (32, 2048, 128, 256, 3), (32, 2048, 256, 128, 3), (32, 2048, 256, 256, 2),
    (8, 512, 256, 256, 2), (32, 2048, 256, 256, 5), (16, 1000, 320, 192, 5), (8, 256, 256, 256, 5), (16, 2048, 512, 512, 7),
    (32, 2048, 256, 256, 1), (8, 256, 256, 256, 1), (8, 8192, 1, 64, 3), (32, 2048, 16, 16, 3),
    # Unlike channels and few steps: what is not stored is served by the configs that are, so these should be many.
    (4, 128, 128, 128, 3), (8, 256, 128, 512, 3), (8, 256, 512, 128, 3), (32, 2048, 64, 256, 3), (32, 2048, 256, 64, 3),
    (4, 256, 64, 256, 1), (16, 512, 512, 64, 5), (4, 256, 1024, 64, 3), (4, 256, 64, 1024, 3), (16, 2048, 96, 96, 5),
    (16, 2048, 384, 384, 3), (4, 1024, 768, 768, 3), (2, 256, 96, 160, 4), (16, 512, 160, 96, 2), (4, 512, 704, 112, 5),
)  # fmt: skip
_BLOCKS = (*_COMMON, *_LONG, (1, 128, 256, 256, 3), (16, 512, 256, 256, 3), (32, 1024, 256, 256, 3), (32, 2048, 512, 512, 3),
           (64, 4096, 128, 128, 3), (8, 512, 512, 512, 3), (8, 8192, 1024, 1024, 3), (8, 256, 128, 512, 3),
           (8, 256, 512, 128, 3), (4, 128, 128, 128, 3), (32, 2048, 256, 64, 3))  # fmt: skip
_GATED = ((8, 256, 256, 512, 3), (32, 2048, 256, 512, 3))

_PLAIN = ("causal_conv1d", "causal_conv1d_input_grad", "causal_conv1d_weight_grad")
_BLOCK = ("causal_conv1d_fused", "causal_conv1d_activation_grad")
_DEFAULT: tuple[tuple[str, str, tuple[str, ...], str, tuple], ...] = (  # dtype, layout, ops, epilogue, shapes
    ("bf16", "last", _PLAIN, "none", _MOST),
    ("bf16", "first", _PLAIN, "none", _MORE),
    ("fp16", "last", _PLAIN, "none", _COMMON),
    *((dtype, "last", _PLAIN, "none", _WIDE) for dtype in ("tf32", "fp32")),
    *((dtype, "first", _PLAIN, "none", _COMMON) for dtype in ("tf32", "fp32")),
    ("bf16", "last", ("causal_conv1d_input_grad",), "residual", _BLOCKS),
    ("bf16", "last", _BLOCK, "gelu", _BLOCKS),
    *(("bf16", "last", _BLOCK, epilogue, _COMMON) for epilogue in ("relu", "silu", "gelu_tanh")),
    *(("bf16", "last", _BLOCK, epilogue, _GATED) for epilogue in ("glu", "tanh_sigmoid")),
    *((dtype, layout, _BLOCK, "gelu", _COMMON) for dtype, layout in (("bf16", "first"), ("tf32", "last"), ("fp32", "last"))),
)


def default_jobs(descriptors: bool) -> list[Job]:
    """The list that a warm-up without arguments tunes, for a GPU with or without descriptors."""
    jobs = []
    for dtype, layout, ops, epilogue, shapes in _DEFAULT:
        size = 2 if dtype in ("fp16", "bf16") else 4
        for op in ops:
            for B, T, c_in, c_out, K in shapes:
                aligned = descriptors and describable(c_in, c_out, K, epilogue, size, T, dilation=2)
                jobs.append(Job(Problem(op, dtype, layout, aligned, epilogue, K, c_in, c_out, rounded_steps(B * T)), B, T, dilation=2))
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
    if chosen.model is not None and not all(chosen.model.partition(":")):
        parser.error(f"--model is {chosen.model!r}; expected MODULE:CALLABLE")
    if not torch.cuda.is_available():
        parser.exit(1, "fuzzytok warmup: tuning measures on a GPU, and there is none\n")
    started, folder = time.monotonic(), chosen.out or user_folder()
    try:
        model = None if chosen.model is None else _imported(chosen.model)
    except (ImportError, AttributeError) as error:
        parser.exit(1, f"fuzzytok warmup: {error}\n")
    jobs = _jobs(chosen) if model is None else [job_of(problem) for problem in _problems_of(model)]
    if not jobs:
        parser.exit(1, f"fuzzytok warmup: nothing in {chosen.model} ran an op that is tuned; does it run on the GPU?\n")
    try:
        entries = tune(jobs, folder, MOST_QUICK if chosen.quick else MOST)
    except OSError as error:
        parser.exit(1, f"fuzzytok warmup: {error}\n")
    gains = [entry.default_us / entry.time_us for entry in entries if entry.default_us and entry.time_us]
    gain = f", {statistics.geometric_mean(gains):.2f} times as fast as the default" if gains else ""
    print(f"{len(entries)} of {len(jobs)} problems are tuned, after {time.monotonic() - started:.0f} s{gain}; stored in {folder}")
    return 0 if len(entries) == len(jobs) else 1


def _jobs(chosen: argparse.Namespace) -> list[Job]:
    if chosen.op is not None:
        problem, dilation, B, T = problem_from(chosen)
        return [Job(problem, B, T, dilation)]
    return default_jobs(facts(torch.device("cuda", torch.cuda.current_device())).descriptors)


def _imported(name: str) -> Callable[[], object]:
    """The callable "module:name"; the module may lie in the current folder. Raises ImportError or AttributeError."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    model = getattr(importlib.import_module(module), attribute)
    if not callable(model):
        raise ImportError(f"{name} is a {type(model).__name__}; expected what can be called without arguments")
    return model


def _problems_of(model: Callable[[], object]) -> list[Problem]:
    with record_problems() as problems:
        model()
    return sorted(problems)
