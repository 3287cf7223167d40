"""Where the config of a problem comes from, the first time that it is asked for."""

import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fuzzytok_kernels.tuning import store
from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.problem import Problem, distance
from fuzzytok_kernels.tuning.space import OPS, Config, default_config, fitting, predicted
from fuzzytok_kernels.tuning.store import Entry

_warned: set[str] = set()  # ops


class Source(NamedTuple):
    """A file that may serve a problem."""

    path: Path
    farther: int  # doublings by which its entries count as farther: another GPU's, and those that were never measured
    measured: bool = True


class Choice(NamedTuple):
    """What serves a problem."""

    source: Source
    entry: Entry  # the nearest
    config: Config
    exact: bool  # whether it was measured on this GPU for this very problem, or for it in the other 16-bit dtype


def find(device: int, problem: Problem) -> Config:
    """The config of `problem` on GPU number `device`, from the files or the default. Raises nothing, warns once of an op not tuned."""
    gpu = Gpu.current(device)
    if gpu is None:
        return default_config(problem)
    choice = choose(gpu, problem)
    if not (choice and choice.exact) and os.environ.get("FUZZYTOK_AUTOTUNE") == "1" and (tuned := _tuned_now(device, problem)):
        return tuned
    if choice:
        return choice.config
    if problem.op not in _warned:
        _warned.add(problem.op)
        warnings.warn(
            f"fuzzytok_kernels: {problem.op} is not tuned for {gpu.name} and runs with a default config; to tune it: "
            + warmup_command(problem),
            stacklevel=2,
        )
    return default_config(problem)


def choose(gpu: Gpu, problem: Problem) -> Choice | None:
    """The config of the entry for `problem`, or the one that serves it best by all that the nearest entry's file knows.

    None if no entry is like `problem`. The nearest of all sources, not of the first that has any: one problem that a user tuned would
    else serve, badly, all of another size.
    """
    nearest, least = None, float("inf")
    for source in sources(gpu, problem.op):
        entry = store.nearest(_entries(source.path, gpu, problem.op), problem)
        if entry and (far := source.farther + distance(entry.problem, problem)) < least:
            nearest, least = (source, entry), far
            if far == 0:
                return Choice(source, entry, entry.config, exact=True)
    if nearest is None:
        return None
    source, entry = nearest
    return Choice(source, entry, _expected_best(gpu, problem, source, entry), exact=False)


def _expected_best(gpu: Gpu, problem: Problem, source: Source, entry: Entry) -> Config:
    """The config that the model expects to be the fastest; the winner of a problem within a doubling is granted up to a third of its time.

    The nearest problem's winner alone loses 21 % (geometric mean of 21 random problems on an H100) where this loses 5. Another GPU's winner
    is granted as much: on an H200 those of the H100 lose 0.1 % (275 problems, worst 8 %), what the model alone expects 3.4 (worst 41). Of
    a GPU that was not measured only the configs in its file are known to fit.
    """
    known = {other.config for other in _entries(source.path, gpu, problem.op) if other.problem.kind == problem.kind}
    if source.farther == 0:
        known |= set(OPS[problem.op].configs)

    granted = max(0.0, 1 - distance(entry.problem, problem)) / 3 if source.measured else 0.0

    def time(config: Config) -> float:
        return predicted(problem, config, gpu.sm_count) * (1 - granted if config == entry.config else 1)

    return min(fitting(problem, known, gpu) or {default_config(problem)}, key=lambda config: (time(config), config != entry.config, config))


def sources(gpu: Gpu, op: str) -> Iterator[Source]:
    """The files that may serve `op` on `gpu`, whether they exist or not, in the order of the look-up."""
    for folder in folders().values():
        if folder is not None:
            yield Source(store.path_of(folder, gpu, op), farther=0)
    architecture = shipped_folder() / gpu.arch
    for path in sorted(architecture.glob(f"*/{op}.json")):
        if path.parent.name not in (gpu.slug, "generic"):
            yield Source(path, farther=1)
    if gpu.slug != "generic":
        yield Source(architecture / "generic" / f"{op}.json", farther=2, measured=False)


def folders() -> dict[str, Path | None]:
    """The folders of tuning files in the order of the look-up, each with its name for the user; None where it is not set."""
    own = os.environ.get("FUZZYTOK_TUNING_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return {
        "$FUZZYTOK_TUNING_DIR": Path(own) if own else None,
        "the user's cache": Path(cache) / "fuzzytok_kernels" / "tuning",
        "shipped": shipped_folder(),
    }


def user_folder() -> Path:
    """Where this machine's results are stored: the first of the user's own folders that is set."""
    return next(folder for folder in folders().values() if folder is not None)


def shipped_folder() -> Path:
    """The folder that comes with the package: inside it in a wheel, beside it in the repository, as an editable install sees it."""
    package = Path(__file__).parents[1]
    inside = package / "tuning_cache"
    return inside if inside.is_dir() else package.parent / "tuning_cache"


def warmup_command(problem: Problem) -> str:
    """The command that tunes `problem`; it knows B*T alone, and dilation has no influence."""
    shape = f"1,{problem.steps},{problem.c_in},{problem.c_out},{problem.kernel_size}"
    epilogue = "" if problem.epilogue == "none" else f" --activation {problem.epilogue}"
    return f"fuzzytok warmup --op {problem.op} --shape {shape} --dtype {problem.dtype} --layout {problem.layout} --dilation 1{epilogue}"


def forget() -> None:
    """Read files again at the next look-up."""
    _entries.cache_clear()


@functools.cache
def _entries(path: Path, gpu: Gpu, op: str) -> list[Entry]:
    return store.read(path, gpu, op)[0]


def _tuned_now(device: int, problem: Problem) -> Config | None:
    if torch.cuda.is_current_stream_capturing():
        return None  # timing would end up in the user's graph
    try:
        from fuzzytok_kernels.tuning.tuner import tune_now

        return tune_now(device, problem)
    except Exception as error:  # a forward pass must not fail because tuning did
        warnings.warn(f"fuzzytok_kernels could not tune {problem}: {error!r}", stacklevel=2)
        return None
