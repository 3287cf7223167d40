"""The tuner: compiles candidates on all cores, races each against the default, stores every winner at once."""

import contextlib
import datetime
import functools
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from fuzzytok_kernels.private_triton import GPUTarget
from fuzzytok_kernels.tuning import Config, Problem
from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.lookup import user_folder
from fuzzytok_kernels.tuning.measure import Job
from fuzzytok_kernels.tuning.space import candidates, default_config
from fuzzytok_kernels.tuning.store import Entry, merge, path_of, read
from fuzzytok_kernels.tuning.worker import Worker, WorkerError, cores, pool

MOST, MOST_QUICK = 10, 4  # candidates a problem
LEAST_GAIN = 0.98  # a winner takes at most this share of the default's time; less is noise
_MEASURED = {"inputs": "fresh random, rotating over 192 MB, at most 32 sets", "timer": "median of CUDA graph replays"}


def job_of(problem: Problem) -> Job:
    """A job for a problem that only says how many steps there are: sequences of 2,048 steps."""
    T = min(problem.steps, 2048)
    return Job(problem, problem.steps // T, T, dilation=2)


def tune(jobs: Iterable[Job], directory: Path, most: int = MOST, device: int = 0) -> list[Entry]:
    """Tune `jobs` on GPU number `device` and store the winners below `directory`; those stored with as many candidates are kept.

    A job whose default cannot be compiled or gives wrong results has no entry. Raises OSError if the directory cannot be written.
    """
    gpu = Gpu.current(device)
    if gpu is None:
        raise RuntimeError("tuning measures on a GPU, and there is none")
    writable(directory)
    jobs, measured = list(jobs), {**_MEASURED, "date": datetime.date.today().isoformat()}
    with _alone(gpu), compilers(gpu) as compile, racer() as race:
        stored = {op: read(path_of(directory, gpu, op), gpu, op)[0] for op in {job.problem.op for job in jobs}}  # by another rank, perhaps
        done = {entry.problem: entry for entries in stored.values() for entry in entries if (entry.tried or 0) >= most}
        open_jobs = {job.problem: job for job in jobs if job.problem not in done}.values()
        plans = {job: [default_config(job.problem), *candidates(job.problem, most, gpu)] for job in open_jobs}
        compiled = {job: {config: compile(job, config) for config in configs} for job, configs in plans.items()}
        with tqdm(total=sum(map(len, plans.values())), unit="config") as progress:
            for job, futures in compiled.items():
                progress.set_description(f"{job.problem.op.removeprefix('causal_')} {job.problem.dtype}")
                entry = _winner(job, futures, functools.partial(race, device), gpu, most, progress)
                if entry is not None:
                    done[entry.problem] = entry
                    merge(directory, gpu, entry.problem.op, [entry], measured)
    return [done[job.problem] for job in jobs if job.problem in done]


def tune_now(device: int, problem: Problem) -> Config:
    """Tune one problem at its first call, under `FUZZYTOK_AUTOTUNE=1`, and store the result in the user's folder."""
    entries = tune([job_of(problem)], user_folder(), device=device)
    return entries[0].config if entries else default_config(problem)


def _winner(job: Job, compiled: dict[Config, Future], race: Callable[..., tuple], gpu: Gpu, most: int, progress: tqdm) -> Entry | None:
    """The fastest of a job's configs, of which the first is the default; None where that could not be compiled or timed."""
    default = next(iter(compiled))
    times, used = [], {}
    for config, future in compiled.items():
        with contextlib.suppress(WorkerError):
            used[config] = future.result()
            if config != default:
                times.append((config, *race(job, config, used[config], gpu.shared_memory)))
        progress.update()
    times = [(config, default_us, us) for config, default_us, us in times if math.isfinite(default_us) and not math.isnan(us)]
    if default not in used or not times:
        return None
    default_us = statistics.median(default_us for _, default_us, _ in times)
    share, best = min((config_us / ours, config) for config, ours, config_us in times)
    if share > LEAST_GAIN:
        share, best = 1.0, default
    return Entry(job.problem, best, share * default_us, default_us, used[best].shared, most)


def writable(directory: Path) -> None:
    """Raise OSError, with the folder's name, if nothing can be stored below `directory`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(f"tuning results cannot be stored in {directory}: {error.strerror}") from error


def racer() -> contextlib.closing[Worker]:
    """A process for `measure.race`."""
    return contextlib.closing(Worker("fuzzytok_kernels.tuning.measure:race"))


@contextlib.contextmanager
def compilers(gpu: Gpu, spared: int = 2) -> Iterator[Callable[[Job, Config], Future]]:
    """A function that compiles a job with a config, on one of as many processes as there are cores, into a future of its `Resources`.

    `spared` cores are left alone: unless told, one for a racing process, one for this.
    """
    with pool("fuzzytok_kernels.tuning.compile:resources", max(1, cores() - spared)) as submit:
        yield lambda job, config: submit(job.problem, config, target_of(gpu), job.T)


def target_of(gpu: Gpu) -> GPUTarget:
    """What Triton calls the architecture of `gpu`."""
    return GPUTarget("cuda", int(gpu.arch[2:]), 32) if gpu.arch.startswith("sm") else GPUTarget("hip", gpu.arch, 64)


def _alone(gpu: Gpu) -> FileLock:
    """Keeps the ranks of a job, whatever folders they name, from timing on one model of GPU at once."""
    return FileLock(Path(tempfile.gettempdir()) / f"fuzzytok_kernels-{os.getuid()}-{gpu.slug}.lock")
