"""`make bench-check`: fail if a row of ours lost more than 5% against the stored baseline, by its ratio to the GEMM of the same run."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import BASELINES, FOLDER, Run, slug

LOSS = 0.05


def main(arguments: Sequence[str]) -> int:
    """Print every row; 1 if one lost or is missing, or there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m bench.check", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=FOLDER / slug() / "bench.json", help="a bench.json (default: this machine's)")
    parser.add_argument("--update", action="store_true", help="store this run as the baseline instead")
    options = parser.parse_args(arguments)
    if not options.run.is_file():
        parser.error(f"there is no {options.run}: run `make bench` first")
    run = Run.load(options.run)
    ratios = ratios_of(run)
    baseline = BASELINES / f"{run.slug}.json"
    if not ratios:
        print("no row has a GEMM to compare with: baselines are a GPU's")
        return 1
    if options.update:
        _store(baseline, run, ratios)
        print(f"stored {len(ratios)} rows in {baseline.relative_to(BASELINES.parent)}")
        return 0
    if not baseline.is_file():
        print(f"there is no baseline of {run.slug}: store this run with --update")
        return 1
    return _compare(ratios, json.loads(baseline.read_text(encoding="utf-8"))["ratios"])


def ratios_of(run: Run) -> dict[str, float]:
    """Our time over that of the bf16 GEMM of the same size, for each row on the device that has one."""
    ratios = {}
    for row in run.rows.values():
        case = row.case
        gemm = run.time("main", case.op, "gemm", case.shape)
        if case.rival == "ours" and case.section != "host" and gemm:
            ratios[str(case)] = row.microseconds / gemm
    return ratios


def _compare(ratios: dict[str, float], stored: dict[str, float]) -> int:
    bad = 0
    for name in sorted(ratios.keys() | stored.keys()):
        before, now = stored.get(name), ratios.get(name)
        lost = before is not None and (now is None or now > before * (1 + LOSS))
        bad += lost
        change = f"{now / before - 1:+7.1%}" if before and now else "    new" if now else "missing"
        print(f"{_number(before)} {_number(now)} {change} {'LOST' if lost else '    '} {name}")
    print(f"{len(ratios)} rows, ours / GEMM: {bad} lost more than {LOSS:.0%} or missing")
    return 1 if bad else 0


def _number(value: float | None) -> str:
    return "      " if value is None else f"{value:6.3f}"


def _store(path: Path, run: Run, ratios: dict[str, float]) -> None:
    path.parent.mkdir(exist_ok=True)
    stored: dict[str, Any] = {"gpu": run.gpu, "date": run.date, "commit": run.commit, "versions": run.versions}
    stored["ratios"] = {name: round(ratio, 4) for name, ratio in sorted(ratios.items())}
    path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
