"""`python3 -m bench.model [--only block,...]`: the fused block, and a model of such blocks, against PyTorch's; prints the table of bars."""

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import torch

from bench.measure import WrongResultError
from bench.model import report
from bench.model.attempts import Figures, attempted, free
from bench.model.sections import MEASURES, compile_kernels
from bench.results import FOLDER, slug
from fuzzytok_kernels.tuning.gpu import versions


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(prog="bench.model", description=__doc__)
    parser.add_argument("--only", type=chosen, default=list(MEASURES), help=f"some of {','.join(MEASURES)}; all if not given")
    sections = parser.parse_args(arguments).only
    if not torch.cuda.is_available():
        raise SystemExit("bench.model: speed and memory are measured on a GPU, and there is none")
    folder = FOLDER / slug()
    try:
        print(measure(sections, folder))
    except WrongResultError as error:
        for name in ("model.json", "model.md"):
            (folder / name).unlink(missing_ok=True)
        raise SystemExit(f"bench.model: no speeds, since a result is wrong: {error}") from error


def chosen(text: str) -> list[str]:
    """The sections that `text` names, in their own order."""
    names = text.split(",")
    if unknown := set(names) - set(MEASURES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: expected some of {','.join(MEASURES)}")
    return [name for name in MEASURES if name in names]


def measure(sections: Sequence[str], folder: Path) -> str:
    """Measure `sections` and write into `folder` what is known as soon as it is, so that a run cut short leaves figures. The report."""
    seconds: dict[str, float] = {}
    figures: dict[str, Figures] = {}
    facts = {"date": date.today().isoformat(), "gpu": torch.cuda.get_device_name(), "versions": versions()}

    def keep(name: str) -> None:
        for part in MEASURES[name]():
            figures[name] = part
            report.write({**facts, "seconds": seconds, "sections": figures}, folder)

    with _clock("compiling", seconds):
        compile_kernels(sections)
    with contextlib.suppress(KeyboardInterrupt):  # what was measured by then is written
        for name in sections:
            with _clock(name, seconds):
                failed = attempted(functools.partial(keep, name))
                if failed and name not in figures:
                    figures[name] = failed
                free()
    return report.write({**facts, "seconds": seconds, "sections": figures}, folder)


@contextlib.contextmanager
def _clock(name: str, seconds: dict[str, float]) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin
    print(f"{name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
