"""`python -m bench [pytest's options]`: run the rows, store them under `bench/results/`, write the report. Installs nothing."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import report
from bench.results import FOLDER, slug


def main(options: Sequence[str]) -> int:
    """Pytest's exit status; the report is written of the rows that ran even where others failed."""
    path = FOLDER / slug() / "bench.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    fixed = ["-q", "--tb=short", "--durations=12", "--benchmark-columns=median,rounds", f"--benchmark-json={path}"]
    status = int(pytest.main([str(Path(__file__).parent), "-p", "no:cacheprovider", *fixed, *options]))
    if path.is_file() and path.stat().st_size:
        print(report.write(path))
        print(f"\n{path.parent}: bench.json, report.md and pictures")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
