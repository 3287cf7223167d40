"""Triton kernels compiled in several processes before the rows run one by one, so that a cold cache costs less time on the GPU."""

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from bench.grid import PAPER_FORMS, Case


def compile_kernels(cases: Sequence[Case]) -> None:
    """Run what of `cases` has Triton kernels of this repository once each, which leaves them in Triton's cache on disk."""
    wanted = list({_key(case): case for case in cases if _has_kernels(case)}.values())
    wanted.sort(key=lambda case: case.rival != "naive")  # the slowest to compile first
    in_processes(_run_once, wanted)


def in_processes(run: Callable[[Any], object], items: Sequence) -> None:
    """`run(item)` of each, in several processes. What goes wrong is left for the timing itself to say."""
    workers = min(8, len(items), os.cpu_count() or 1)
    if workers < 2:
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            list(pool.map(functools.partial(_quietly, run), items))
        except BrokenProcessPool:
            print("a compiling process died; what is timed compiles for itself", file=sys.stderr)


def _quietly(run: Callable[[Any], object], item: Any) -> None:
    try:
        run(item)
        torch.cuda.synchronize()
    except Exception:  # the row itself will say so
        return


def _has_kernels(case: Case) -> bool:
    if case.rival == "ours":
        return case.op == "forward_backward" and case.section != "host"  # runs all three kernels; each shape has it
    return case.rival in PAPER_FORMS


def _key(case: Case) -> tuple:
    """What a kernel depends on: neither the dilation nor, for the paper's, the batch and time."""
    if case.rival in PAPER_FORMS:
        return case.rival, case.shape.c_in, case.shape.c_out, case.shape.K, case.shape.T % 16
    return case.dtype, case.layout, case.shape._replace(d=1)


def _run_once(case: Case) -> None:
    from bench.measure import Call, Data, switches
    from bench.rivals import RIVALS

    with switches(case):
        Call(RIVALS[case.rival](case.shape), case.op, Data(case, 1).copies[0])()
