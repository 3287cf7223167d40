"""The cost model of bench.scaling: it returns what was measured where something was, and behaves as what it models."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from modes import not_interpreted

from bench import hidden, scaling
from bench.results import FOLDER

pytestmark = not_interpreted
NVLINK, INFINIBAND = scaling.LINKS
FIELD = 43


@pytest.fixture(scope="module")
def kernels() -> scaling.Kernels:
    return scaling.Kernels()


@pytest.mark.parametrize(("op", "epilogue"), scaling.KERNELS.items())
def test_times_are_the_measured_ones_and_lie_between_them(op, epilogue, kernels):
    points = sorted(scaling._measured(op, epilogue))
    assert len(points) >= 4
    for (steps, time), (more_steps, more_time) in pairwise(points):
        assert kernels.time(op, steps) == pytest.approx(time)
        assert time < kernels.time(op, (steps + more_steps) // 2) < more_time
    assert kernels.time(op, 0) == points[0][1]
    assert kernels.time(op, 4 * points[-1][0]) > 3 * points[-1][1]


def test_what_is_measured_and_what_is_stated():
    stored = json.loads((FOLDER / "nvidia_h100_80gb_hbm3" / "scaling.json").read_text("utf-8"))["links"]
    us = {(line["name"], line["ranks"], line["bytes"]): line["us"] for line in stored}
    assert NVLINK.message(1 << 20) == us["two messages", 2, 1 << 20] / 2
    assert NVLINK.collective("all-gather", 1 << 22, 4) == us["all-gather", 4, 1 << 22]
    assert INFINIBAND.message(50e9) - INFINIBAND.latency == pytest.approx(1e6)  # 50 GB at 50 GB/s
    assert INFINIBAND.all_reduce(1e9, 1) == 0


@pytest.mark.parametrize("link", scaling.LINKS, ids=lambda link: link.name)
def test_the_shortest_is_where_the_goal_is_met(link, kernels):
    def efficiency(T: int) -> float:
        return kernels.step(T) / (kernels.step(T) + scaling.once_a_stack(kernels, link, T, FIELD))

    least = scaling.shortest(kernels, lambda T: scaling.once_a_stack(kernels, link, T, FIELD))
    assert efficiency(least) >= scaling.GOAL > efficiency(least - 256)


def test_more_ranks_cost_more(kernels):
    for cost in (lambda ranks: scaling.mean(kernels, ranks, scaling.STEPS), scaling.fsdp):
        costs = [cost(ranks) for ranks in scaling.GPUS]
        assert costs == sorted(costs)


def test_gradients_are_hidden_as_far_as_there_is_something_to_compute(kernels):
    """All but the last message's; of no steps, nothing."""
    costs = [scaling.mean(kernels, 2, T) for T in (0, scaling.STEPS, 16 * scaling.STEPS)]
    whole, last = (NVLINK.collective("all-reduce", 4 * size, 2) for size in (scaling.PARAMETERS, scaling.PARAMETERS / 9))
    assert whole >= costs[0] > costs[1] == costs[2] == last


def test_the_table(capsys):
    """It is the README's, whose kernel times are therefore those of the files in `tuning_cache/`."""
    scaling.main()
    printed = capsys.readouterr().out
    table = "".join(line for line in printed.splitlines(keepends=True) if line.startswith("|"))
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [row[0].removeprefix("| ") for row in rows[1:]] == ["1", "2", "4", "8", "16", "64", "256", "1,024"]
    assert len({len(row) for row in rows}) == 1
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8").replace("µs", "us").replace(" %", "%")
    assert table in readme, "the README's table is of other kernel times: python3 -m bench.scaling prints the new one"
    alone = int(printed.partition(" us of kernels")[0].rpartition(" ")[2].replace(",", ""))
    assert f"bytes a rank: {alone / 1e3:.2f} ms of kernels" in readme


@pytest.mark.parametrize(
    ("messages", "kernels", "wanted"),
    [
        ([], [], (0, 0, 0)),
        ([(0, 10)], [], (10, 0, 10)),
        ([(0, 10)], [(2, 4), (3, 5), (9, 12)], (10, 4, 12)),
        ([(0, 10), (5, 15), (20, 21)], [(0, 30)], (16, 16, 30)),
        ([(10, 20)], [(0, 10), (20, 25)], (10, 0, 25)),
    ],
)
def test_what_of_the_exchange_is_hidden(messages, kernels, wanted):
    assert hidden.exchanged(messages, kernels) == wanted
    assert hidden.exchanged(reversed(messages), reversed(kernels)) == wanted
