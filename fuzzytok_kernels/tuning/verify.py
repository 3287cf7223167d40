"""`fuzzytok check --all`: every config that any problem could be given, verified on hostile shapes."""

import contextlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed

import torch
from tqdm import tqdm

from fuzzytok_kernels.tuning import Config, Problem, rounded_steps
from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.measure import Job
from fuzzytok_kernels.tuning.problem import DTYPES, LAYOUTS, describable
from fuzzytok_kernels.tuning.space import OPS, default_config, fitting
from fuzzytok_kernels.tuning.worker import WorkerError, cores, pool

# B, T, C_in, C_out, K, dilation: no block divides them; T below the history; a dilation of all of T. Each row is compiled once.
_SHAPES = (
    ((2, 300, 272, 208, 3, 7), (3, 5, 272, 208, 3, 4), (1, 131, 272, 208, 3, 131)),
    ((2, 300, 261, 202, 3, 7), (3, 5, 261, 202, 3, 4)),  # rows that no descriptor reads
)


def verify_all(gpu: Gpu, skip: int = 0) -> int:
    """Print what is wrong as it is found, and then how many were verified; 1 if any is wrong or was not tried, else 0.

    In an order that mixes ops, dtypes and layouts: a run that is stopped has tried some of each, and another goes on behind it.
    """
    plan = list(runs(gpu))
    random.Random(0).shuffle(plan)
    plan = plan[skip:]
    verified, too_large, wrong, told = Counter[str](), 0, 0, set[Future]()
    with contextlib.ExitStack() as stack:
        futures = _verified(stack, gpu, plan)
        try:
            for future in (bar := tqdm(as_completed(futures), total=len(plan), unit="config")):
                jobs, config = futures[future]
                try:
                    errors = future.result()
                except WorkerError as reason:
                    wrong += 1
                    tqdm.write(f"FAILED  {reason}: {jobs} with {config}")
                else:
                    too_large += errors.count(None)
                    for job, error in zip(jobs, errors, strict=True):
                        if error is not None and error <= 1:
                            verified[job.problem.op] += 1
                        elif error is not None:
                            wrong += 1
                            tqdm.write(f"WRONG   {error:.3g} of the allowed error: {job} with {config}")
                told.add(future)
                bar.set_postfix_str(f"{sum(verified.values()):,} runs right, {wrong} wrong, {too_large} too large", refresh=False)
        except KeyboardInterrupt:
            pass
        left = [number for number, future in enumerate(futures, skip) if future not in told]
        if left:
            print(f"stopped; {len(left):,} of {len(plan):,} configs were left: go on with --skip {left[0]}")
        for op, count in verified.items():
            print(f"{count:7,} runs right  {op}, {len(OPS[op].configs)} configs")
        print(f"{sum(verified.values()):,} runs right on {gpu.name}, {wrong} wrong; {too_large} asked for more than it has", flush=True)
    return 1 if wrong or left else 0


def _verified(stack: contextlib.ExitStack, gpu: Gpu, plan: Sequence[tuple[list[Job], Config]]) -> dict[Future, tuple[list[Job], Config]]:
    """The errors of each of `plan`, to come: from a process a core, on all GPUs like `gpu` in turn."""
    gpus = [device for device in range(torch.cuda.device_count()) if Gpu.current(device) == gpu]
    processes = -(-cores() // len(gpus))
    submit = [stack.enter_context(pool("fuzzytok_kernels.tuning.measure:verify", processes)) for _ in gpus]
    return {submit[i % len(gpus)](gpus[i % len(gpus)], *run): run for i, run in enumerate(plan)}


def runs(gpu: Gpu) -> Iterator[tuple[list[Job], Config]]:
    """Each config with each dtype and layout on each shape that it suits; the epilogues take turns, so that each meets every path."""
    for op, (_, configs, epilogues) in OPS.items():
        for number, config in enumerate(sorted({*configs, *_defaults(gpu, op)})):
            for turn, (dtype, layout) in enumerate((dtype, layout) for dtype in DTYPES for layout in LAYOUTS):
                for shapes in _SHAPES:
                    jobs = [_job(gpu, op, dtype, layout, epilogues[(number + turn) % len(epilogues)], shape) for shape in shapes]
                    if jobs := [job for job in jobs if fitting(job.problem, [config], gpu)]:
                        yield jobs, config


def _defaults(gpu: Gpu, op: str) -> set[Config]:
    shapes = [shape for row in _SHAPES for shape in row]
    kinds = [(dtype, layout, epilogue) for dtype in DTYPES for layout in LAYOUTS for epilogue in OPS[op].epilogues]
    return {default_config(_job(gpu, op, *kind, shape).problem) for kind in kinds for shape in shapes}


def _job(gpu: Gpu, op: str, dtype: str, layout: str, epilogue: str, shape: tuple[int, ...]) -> Job:
    B, T, c_in, c_out, K, dilation = shape
    size = 4 if dtype in ("tf32", "fp32") else 2
    aligned = gpu.descriptors and describable(c_in, c_out, K, epilogue, size, T, dilation)
    return Job(Problem(op, dtype, layout, aligned, epilogue, K, c_in, c_out, rounded_steps(B * T)), B, T, dilation)
