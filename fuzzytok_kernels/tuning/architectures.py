"""`python -m fuzzytok_kernels.tuning.architectures FOLDER`: a config for each problem of the default list on GPUs that nobody measured.

The likeliest candidate that is known to fit: compiled without a GPU, within its shared memory, without a spilled register.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from tqdm import tqdm

from fuzzytok_kernels.tuning.compile import Resources
from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.measure import Job
from fuzzytok_kernels.tuning.space import OPS, candidates, default_config
from fuzzytok_kernels.tuning.store import Entry, merge
from fuzzytok_kernels.tuning.tuner import compilers
from fuzzytok_kernels.tuning.warmup import default_jobs
from fuzzytok_kernels.tuning.worker import WorkerError

# Multiprocessors of a common card, and the least shared memory that a program may ask for on any card of the architecture.
ARCHITECTURES = (
    Gpu("generic", "sm80", 108, 166_912), Gpu("generic", "sm86", 84, 101_376), Gpu("generic", "sm89", 128, 101_376),
    Gpu("generic", "sm90", 132, 232_448), Gpu("generic", "sm100", 148, 232_448), Gpu("generic", "sm120", 170, 101_376),
    Gpu("generic", "gfx942", 304, 65_536),
)  # fmt: skip
_COMMON = {(65536, 64), (262144, 128), (2048, 256), (65536, 256), (65536, 512), (65536, 250), (2048, 60)}  # steps, C_in
_TRIED = 3  # candidates a problem, the default behind them


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files; 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="tuning_cache")
    folder = parser.parse_args(arguments).folder
    for gpu in ARCHITECTURES:
        entries = _fitting(gpu, [job for job in default_jobs(gpu.descriptors) if _common(job)])
        for op in OPS:
            merge(folder, gpu, op, [entry for entry in entries if entry.problem.op == op], {"how": "compiled, not measured"})
    return 0


def _common(job: Job) -> bool:
    """Whether a job is one of those whose configs can serve all others of its kind, too."""
    problem = job.problem
    return problem.layout == "last" and problem.dtype != "fp16" and problem.kernel_size == 3 and (problem.steps, problem.c_in) in _COMMON


def _fitting(gpu: Gpu, jobs: list[Job]) -> list[Entry]:
    """For each job the first of its configs that fits `gpu`; none for a job that even the default does not suit."""
    choices = {job: [*candidates(job.problem, _TRIED, gpu), default_config(job.problem)] for job in jobs}
    entries = []
    with compilers(gpu) as compile, tqdm(total=len(jobs), desc=gpu.arch) as progress:
        while choices := {job: configs for job, configs in choices.items() if configs}:
            compiled = {job: compile(job, configs[0]) for job, configs in choices.items()}
            for job, future in compiled.items():
                config = choices[job].pop(0)
                if used := _fits(future, gpu):
                    entries.append(Entry(job.problem, config, shared=used.shared))
                    del choices[job]
                    progress.update()
    return entries


def _fits(compiled: Future, gpu: Gpu) -> Resources | None:
    try:
        used = compiled.result()
    except WorkerError:  # the compiler failed on it
        return None
    return used if used.shared <= gpu.shared_memory and not used.spills else None


if __name__ == "__main__":
    raise SystemExit(main())
