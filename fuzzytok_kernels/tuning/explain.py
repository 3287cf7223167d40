"""`fuzzytok explain`: which tuning file and entry serves a problem of a batch, and why the others do not."""

import argparse
import os
import warnings
from collections.abc import Iterator, Sequence

from fuzzytok_kernels.tuning import lookup, store
from fuzzytok_kernels.tuning.arguments import add_problem_arguments, problem_from
from fuzzytok_kernels.tuning.gpu import KNOWN, Gpu, versions
from fuzzytok_kernels.tuning.problem import Problem, distance
from fuzzytok_kernels.tuning.space import Config, default_config
from fuzzytok_kernels.tuning.store import Entry


def main(arguments: Sequence[str]) -> int:
    """Print the explanation; 0."""
    parser = argparse.ArgumentParser(prog="fuzzytok explain", description=__doc__)
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="as torch.cuda.get_device_name() gives it, or an architecture's, as sm80; the GPU at hand if not given",
    )
    add_problem_arguments(parser)
    options = parser.parse_args(arguments)
    known = known_gpus()
    gpu = known.get(options.gpu) if options.gpu else Gpu.current(0)
    if gpu is None:
        missing = f"no tuning file tells what {options.gpu!r} is" if options.gpu else "there is no GPU here: name one with --gpu"
        parser.error(f"{missing}; known are: {', '.join(known)}")
    problem, *_ = problem_from(options, gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they would say is printed
        print("\n".join(_explanation(gpu, problem)))
    return 0


def known_gpus() -> dict[str, Gpu]:
    """Common GPUs and those that tuning files were written for, by name; an architecture's default by the architecture's."""
    known = {gpu.name: gpu for gpu in KNOWN}
    for folder in lookup.folders().values():
        for path in sorted(folder.glob("*/*/*.json")) if folder and os.path.isdir(folder) else ():
            try:
                gpu, _ = store.header(path)
            except (OSError, ValueError, RecursionError):
                continue
            known[gpu.arch if gpu.name == "generic" else gpu.name] = gpu
    return known


def _explanation(gpu: Gpu, problem: Problem) -> Iterator[str]:
    yield f"gpu         {gpu}"
    exact = f"{problem.op} dtype={problem.dtype} layout={problem.layout} aligned={problem.aligned} epilogue={problem.epilogue}"
    yield f"problem     {exact} {_sizes(problem)}"
    for name, folder in lookup.folders().items():
        if folder is None:
            yield f"file        none: {name} is not set"
    for source in lookup.sources(gpu, problem.op):
        yield f"file        {source.path}"
        entries, refusal = store.read(source.path, gpu, problem.op)
        yield from (f"  refused   {line}" for line in (refusal or "").splitlines())
        if entries:
            yield f"  entries   {len(entries)}, {_nearest(entries, problem, source.farther)}"
    choice = lookup.choose(gpu, problem)
    if choice is None:
        yield "served by   the default config, for no entry is like the problem"
        yield f"config      {_fields(default_config(problem))}"
        yield f"to tune it  {lookup.warmup_command(problem)}"
        return
    entry = choice.entry
    yield f"served by   {choice.source.path}"
    yield f"entry       {_sizes(entry.problem)}"
    yield f"its time    {entry.time_us} us, the default's {entry.default_us} us" if entry.time_us else "its time    not measured"
    yield f"config      {_fields(choice.config)}"
    if choice.config != entry.config:
        yield f"  rather than the entry's, by the model of the time: {_fields(entry.config)}"
    _, theirs = store.header(choice.source.path)
    for name, here in versions().items():
        if theirs.get(name) != here:
            yield f"  version   {name} was {theirs.get(name)}, is {here} here"


def _nearest(entries: list[Entry], problem: Problem, farther: int) -> str:
    """What a file has for a problem, or how the entry that is most like it differs."""
    entry = store.nearest(entries, problem)
    if entry:
        far = distance(entry.problem, problem)
        return f"nearest {_sizes(entry.problem)}: {far:.2f} doublings away" + (
            f", and {farther} more for not being measured here" if farther else ""
        )
    fewest = min((_differences(entry, problem) for entry in entries), key=lambda differences: len(differences))
    return f"none like it; the closest: {'; '.join(fewest)}"


def _differences(entry: Entry, expected: Problem) -> list[str]:
    had = entry.problem.kind
    return [f"{name} is {had[name]!r}, expected {value!r}" for name, value in expected.kind.items() if had[name] != value]


def _sizes(problem: Problem) -> str:
    return f"K={problem.kernel_size} C_in={problem.c_in} C_out={problem.c_out} B*T={problem.steps}"


def _fields(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config._asdict().items())
