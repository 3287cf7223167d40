"""`python -m fuzzytok_kernels.tuning.architectures FOLDER`: a config for each problem of the default list on GPUs that nobody measured.

The likeliest candidate that is known to fit: compiled without a GPU, within its shared memory, without a spilled register.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from tqdm import tqdm

from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.measure import Job
from fuzzytok_kernels.tuning.space import OPS, Config, candidates, default_config
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
_TRIED = 3  # candidates a problem, the default behind them


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files; 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="tuning_cache")
    folder = parser.parse_args(arguments).folder
    for gpu in ARCHITECTURES:
        with compilers(gpu) as compile:
            plans = {job: [*candidates(job.problem, _TRIED), default_config(job.problem)] for job in default_jobs(gpu.descriptors)}
            compiled = {job: {config: compile(job, config) for config in configs} for job, configs in plans.items()}
            entries = [_first_that_fits(job, futures, gpu) for job, futures in tqdm(compiled.items(), desc=gpu.arch)]
        for op in OPS:
            merge(folder, gpu, op, [entry for entry in entries if entry and entry.problem.op == op], {"how": "compiled, not measured"})
    return 0


def _first_that_fits(job: Job, compiled: dict[Config, Future], gpu: Gpu) -> Entry | None:
    for config, future in compiled.items():
        try:
            used = future.result()
        except WorkerError:  # the compiler failed on it
            continue
        if used.shared <= gpu.shared_memory and not used.spills:
            return Entry(job.problem, config, shared=used.shared)
    return None


if __name__ == "__main__":
    raise SystemExit(main())
