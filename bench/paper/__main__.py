"""`python3 -m bench.paper prepare|table1|table2|radical|sweep|report [--smoke]`: the paper's evaluation, one command a table.

Runs lie in bench/paper/work, tables and the report in bench/paper/results; a command that is stopped, or whose time is up, goes on
where it was when it is given again. table2, radical and sweep may run several times at once, one process a GPU: they share the runs out.
table2 trains at the rates that a sweep in the same results found best, where there is one: give it when the sweep is over.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from bench.paper import radical_table, report, sweep, table1, table2
from bench.paper.config import ConfigurationError, Settings, load_settings
from bench.paper.packages import MissingPackageError
from bench.paper.prepare import CORPORA, prepare, prepare_smoke
from bench.paper.runs import Place
from bench.results import slug
from fuzzytok_kernels.tuning.gpu import versions

FOLDER = Path(__file__).parent
COMMANDS = ("prepare", "table1", "table2", "radical", "sweep", "report")
_SHARED = ("table2", "sweep", "radical")  # several processes may work on them at once
Stored = dict[str, Any]  # the tables by name
Collected = tuple[dict[str, Any], str | None]  # figures, and what is left to do


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (MissingPackageError, FileNotFoundError, ModuleNotFoundError, ConfigurationError) as error:
        raise SystemExit(f"bench.paper: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument(
        "--smoke", action="store_true", help="everything tiny, on the help texts of Python's standard library: minutes on a CPU"
    )
    parser.add_argument("--corpus", choices=list(CORPORA), action="append", help="only this one; may be given twice (default: both)")
    parser.add_argument("--seeds", type=int, help="only the first so many seeds")
    parser.add_argument("--train-mib", type=float, help="bytes that each run trains on, in MiB; runs of another size start anew")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="stop after about so long, to go on with the same command")
    parser.add_argument("--work", type=Path, default=FOLDER / "work", help="for packages, corpora and runs (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="for tables and the report (default: bench/paper/results/<GPU>, or smoke)")
    return parser


def _run(options: argparse.Namespace) -> None:
    corpora = ["smoke"] if options.smoke else options.corpus or list(CORPORA)
    if options.command == "prepare":
        prepare_smoke(options.work) if options.smoke else prepare(options.work, corpora)
        return
    folder = options.results or FOLDER / "results" / ("smoke" if options.smoke else slug())
    if options.command == "report":
        print(report.write(folder))
        return
    if options.smoke and options.command != "table1":
        prepare_smoke(options.work)
    begin = time.monotonic()
    collect = _worked(options, corpora, begin, report.read(folder))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        left = _store(folder, options.command, collect, begin)
        print(report.write(folder))
    if left:
        print(f"bench.paper: {left}; the same command goes on from there", file=sys.stderr)


def _worked(options: argparse.Namespace, corpora: list[str], begin: float, stored: Stored) -> Callable[[Stored], Collected]:
    """Do the work of a command. What it returns makes the command's figures of the tables as they are stored when they are written."""
    if options.command == "table1":
        measured = table1.measure()
        return lambda stored: (measured, None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = Place(options.work / "runs" / slug(), device, begin + options.budget_seconds)
    if options.command == "sweep":
        swept = sweep.work(options.work, corpora[0], _settings(options), place, _figures(stored, "sweep"))
        return lambda stored: sweep.collected(swept)
    rates = sweep.best(_figures(stored, "sweep"))
    found = table2.found_of(options.work, corpora, _settings(options), place, rates, _figures(stored, "table2"))
    if options.command == "table2":
        table2.work(found)
        return lambda stored: table2.collected(found, _figures(stored, "table2"))
    radical_table.work(found)
    rows, left = radical_table.collected(found)
    return lambda stored: (_figures(stored, "radical") | rows, left)


def _figures(stored: Stored, name: str) -> dict[str, Any]:
    return stored.get(name, {}).get("figures", {})


def _settings(options: argparse.Namespace) -> Settings:
    settings = load_settings("smoke" if options.smoke else "full")
    if options.train_mib:
        settings = settings._replace(train_mib=options.train_mib)
    if options.seeds:
        settings = settings._replace(seeds={corpus: seeds[: options.seeds] for corpus, seeds in settings.seeds.items()})
    return settings


def _store(folder: Path, name: str, collect: Callable[[Stored], Collected], begin: float) -> str | None:
    """Write the table, and return what is left to do."""
    stored = report.read(folder)
    figures, left = collect(stored)
    before = stored.get(name, {}).get("facts", {}) if name in _SHARED else {}  # of other calls and processes
    facts = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads",
        "versions": versions(),
        "commits": list(dict.fromkeys([*before.get("commits", ()), _commit()])),
        "seconds": before.get("seconds", 0.0) + time.monotonic() - begin,
        "left": left,
    }
    unfinished = folder / f"{name}.unfinished"
    unfinished.write_text(json.dumps({"facts": facts, "figures": figures}, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(folder / f"{name}.json")
    return left


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, cwd=FOLDER, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
