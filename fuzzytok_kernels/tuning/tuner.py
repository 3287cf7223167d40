"""The tuner: compiles candidates on all cores, races each against the default, stores every winner at once."""

import contextlib
import datetime
import os
import statistics
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from fuzzytok_kernels.tuning import Config, Problem
from fuzzytok_kernels.tuning.compile import Resources
from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.lookup import user_folder
from fuzzytok_kernels.tuning.measure import Job
from fuzzytok_kernels.tuning.space import candidates, default_config
from fuzzytok_kernels.tuning.store import Entry, merge, path_of, read
from fuzzytok_kernels.tuning.worker import Worker, WorkerError

MOST, MOST_QUICK = 14, 4  # candidates a problem
LEAST_GAIN = 0.98  # a winner takes at most this share of the default's time; less is noise
_MEASURED = {"inputs": "fresh random, cold L2", "timer": "median of CUDA graph replays"}


def job_of(problem: Problem) -> Job:
    """A job for a problem that only says how many steps there are: sequences of 2,048 steps."""
    T = min(problem.steps, 2048)
    return Job(problem, problem.steps // T, T, dilation=2)


def tune(jobs: Iterable[Job], directory: Path, most: int = MOST) -> list[Entry]:
    """Tune `jobs` on the current GPU and store the winners below `directory`; those stored with as many candidates are kept.

    Raises OSError if the directory cannot be written.
    """
    gpu = Gpu.current(0)
    if gpu is None:
        raise RuntimeError("tuning measures on a GPU, and there is none")
    stored = {op: read(path_of(directory, gpu, op), gpu, op)[0] for op in {job.problem.op for job in jobs}}
    done = {entry.problem: entry for entries in stored.values() for entry in entries if (entry.tried or 0) >= most}
    open_jobs = list({job.problem: job for job in jobs if job.problem not in done}.values())
    plans = {job: [default_config(job.problem), *candidates(job.problem, most)] for job in open_jobs}
    measured = {**_MEASURED, "date": datetime.date.today().isoformat()}
    with _alone(gpu), compilers(gpu) as compile, racer() as race, tqdm(total=sum(map(len, plans.values())), unit="config") as progress:
        compiled = {job: {config: compile(job, config) for config in configs} for job, configs in plans.items()}
        for job, futures in compiled.items():
            progress.set_description(f"{job.problem.op.removeprefix('causal_')} {job.problem.dtype}")
            entry = _winner(job, futures, race, gpu, most, progress)
            if entry is not None:
                done[entry.problem] = entry
                merge(directory, gpu, entry.problem.op, [entry], measured)
    return [done[job.problem] for job in jobs if job.problem in done]


def tune_now(device: int, problem: Problem) -> Config:
    """Tune one problem at its first call, under `FUZZYTOK_AUTOTUNE=1`, and store the result in the user's folder."""
    entries = tune([job_of(problem)], user_folder())
    return entries[0].config if entries else default_config(problem)


def _winner(job: Job, compiled: dict[Config, Future], race: Worker, gpu: Gpu, most: int, progress: tqdm) -> Entry | None:
    """The fastest of a job's configs, of which the first is the default; None where that could not be timed."""
    (default, default_used), *others = compiled.items()
    default_times, shares = [], {}
    for config, future in others:
        with contextlib.suppress(WorkerError):
            default_us, config_us = race(job, config, future.result(), gpu.shared_memory)
            default_times.append(default_us)
            shares[config] = config_us / default_us
        progress.update()
    progress.update()  # the default, which raced them all
    if not default_times:
        return None
    default_us = statistics.median(default_times)
    best = min(shares, key=lambda config: shares[config])
    if shares[best] > LEAST_GAIN:
        return Entry(job.problem, default, default_us, default_us, default_used.result().shared, most)
    return Entry(job.problem, best, shares[best] * default_us, default_us, compiled[best].result().shared, most)


def racer() -> contextlib.closing[Worker]:
    """A process for `measure.race`."""
    return contextlib.closing(Worker("fuzzytok_kernels.tuning.measure:race"))


@contextlib.contextmanager
def compilers(gpu: Gpu) -> Iterator[Callable[[Job, Config], Future]]:
    """A function that compiles a job with a config, on one of as many processes as there are cores, into a future of its `Resources`."""
    nvidia = gpu.arch.startswith("sm")
    target = GPUTarget("cuda", int(gpu.arch[2:]), 32) if nvidia else GPUTarget("hip", gpu.arch, 64)
    workers: list[Worker] = []
    mine = threading.local()

    def compile(job: Job, config: Config) -> Resources:
        if not hasattr(mine, "worker"):
            mine.worker = Worker("fuzzytok_kernels.tuning.compile:resources")
            workers.append(mine.worker)
        return mine.worker(job.problem, config, target, job.T)

    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2))  # one core for the racing process, one for this
    try:
        yield lambda job, config: pool.submit(compile, job, config)
    finally:
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


def _alone(gpu: Gpu) -> FileLock:
    """Keeps the ranks of a job from timing on one GPU at once."""
    user_folder().mkdir(parents=True, exist_ok=True)
    return FileLock(user_folder() / f".{gpu.slug}.lock")
