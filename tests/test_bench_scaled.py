"""bench.scaled: what it makes of the lines of a run, and that it judges the bar."""

import json
from pathlib import Path

import pytest
from modes import not_interpreted

from bench import scaled
from bench.sequence_parallel import ALONE, MAIN, STACK, Row

pytestmark = not_interpreted
MACHINE = {"gpu": "a GPU", "slug": "a_gpu", "torch": "2", "triton": "3", "nccl": "2.28", "date": "2026-01-01"}


def stored(tmp_path: Path, *lines: dict) -> Path:
    path = tmp_path / "scaling.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def rows(us: float, in_turns: float = 1000) -> list[dict]:
    """Two pairs; of the second one GPU is slower than the others also on its own."""
    found = [Row(1, MAIN, ALONE, "replayed", [1000, 1000, 1000, 1100]), Row(2, MAIN, STACK, "replayed", [us, us, 1100, 1100])]
    found += [Row(2, MAIN, ALONE, "replayed", [in_turns, 1000, 1000, 1100])]
    found += [Row(1, 2 * MAIN, ALONE, "replayed", [2000] * 4), Row(2, MAIN, STACK, "profiled", [], [(100, 60, 900), (60, 20, 900)] * 2)]
    return [row._asdict() for row in found]


@pytest.mark.parametrize(
    ("us", "in_turns", "verdict"),
    [(1040, 1000, "95.2% | 95.2% | met"), (1250, 1000, "80.0% | 80.0% | missed"), (1080, 1100, "92.6% | 95.2% | missed")],
)
def test_the_bar_is_of_the_worst_pair_and_of_both_ways(us, in_turns, verdict, tmp_path):
    """1,100 us, where its GPUs alone take 1,000 and 1,100, are 95.2 %; a clock that was slower in turns does not meet the bar."""
    machine, files, links = scaled.read([stored(tmp_path, MACHINE, *rows(us, in_turns))])
    assert f">= 95% | {verdict} |" in scaled.report(machine, files, links)


def test_figures(tmp_path):
    _, (times,), _ = scaled.read([stored(tmp_path, MACHINE, *rows(1250))])
    assert times.strong(2, 2 * MAIN, STACK) == pytest.approx(2000 / 1250 / 2)
    assert times.exchanged(2, MAIN, STACK) == (60, 20, 860)
    assert times.weak(4, MAIN, STACK) is times.exchanged(1, MAIN, ALONE) is None


def test_a_message_is_half_of_two(tmp_path):
    link = {"ranks": 2, "name": "two messages", "bytes": 1000, "us": 20.0}
    _, _, links = scaled.read([stored(tmp_path, MACHINE, link)])
    assert "| 2 | message | 10.0 | 0 |" in "\n".join(scaled._links(links))


def test_what_was_not_measured_is_said(tmp_path):
    machine, files, links = scaled.read([stored(tmp_path, MACHINE, Row(1, MAIN, ALONE, "launched", [1.0])._asdict())])
    assert "|  |  | not measured |" in scaled.report(machine, files, links)


def test_files_of_two_machines_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected those of one GPU, torch and NCCL$"):
        scaled.read([stored(tmp_path, MACHINE, MACHINE | {"gpu": "another"})])
