"""`python -m bench.nearest`: what the nearest stored config loses against a tuned one, on random problems that no file has."""

import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fuzzytok_kernels.reference import GATES
from fuzzytok_kernels.tuning import Problem, lookup, tuner
from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.measure import Job
from fuzzytok_kernels.tuning.space import OPS, Config, default_config
from fuzzytok_kernels.tuning.store import Entry
from fuzzytok_kernels.tuning.worker import Worker

PROBLEMS, SEED = 20, 7
_LARGEST = 1 << 36  # C_in * C_out * B*T: 0.4 TFLOP at K = 3


def main() -> None:
    """Print a line a problem, then the geometric means."""
    gpu = Gpu.current(0)
    if gpu is None:
        raise SystemExit("bench.nearest: configs are measured on a GPU, and there is none")
    jobs = list(_jobs(random.Random(SEED)))
    with tempfile.TemporaryDirectory() as folder:
        tuned = {entry.problem: entry for entry in tuner.tune(jobs, Path(folder))}
    nearest, defaults = [], []
    with tuner.compilers(gpu) as compile, tuner.racer() as race:
        for job in jobs:
            choice = lookup.choose(gpu, job.problem)
            config = choice.config if choice else default_config(job.problem)
            entry = tuned[job.problem]
            loss = _loss(job, config, entry, race, compile(job, config).result(), gpu)
            nearest.append(loss)
            defaults.append(_share(entry) ** -1)
            print(f"{loss:.3f}  default {defaults[-1]:.3f}  {job.problem}  served by {choice and choice.entry.problem}", flush=True)
    print(
        f"time against the tuned config's, geometric mean of {len(jobs)}: nearest {statistics.geometric_mean(nearest):.3f}, "
        f"worst {max(nearest):.3f}; default {statistics.geometric_mean(defaults):.3f}"
    )


def _jobs(draw: random.Random) -> Iterator[Job]:
    found = 0
    while found < PROBLEMS:
        c_in, c_out = (8 * round(2 ** draw.uniform(3, 7)) for _ in range(2))
        steps, dtype, layout = 2 ** draw.randint(9, 17), draw.choice(["bf16", "bf16", "fp16"]), draw.choice(["last", "last", "first"])
        if c_in * c_out * steps <= _LARGEST:
            found += 1
            op = draw.choice(list(OPS))
            epilogue = draw.choice([name for name in OPS[op].epilogues if name not in GATES])
            yield tuner.job_of(Problem(op, dtype, layout, True, epilogue, draw.randint(1, 7), c_in, c_out, steps))


def _loss(job: Job, config: Config, tuned: Entry, race: Worker, used: object, gpu: Gpu) -> float:
    """The time of `config` over that of the tuned one; each as a share of the default's, which was timed beside it."""
    if config == tuned.config:
        return 1.0
    if config == default_config(job.problem):
        return 1 / _share(tuned)
    default_us, config_us = race(0, job, config, used, gpu.shared_memory)
    return config_us / default_us / _share(tuned)


def _share(entry: Entry) -> float:
    assert entry.time_us is not None and entry.default_us is not None, "just measured"
    return entry.time_us / entry.default_us


if __name__ == "__main__":
    main()
