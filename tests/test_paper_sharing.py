"""How the processes of `bench.paper` share runs, and what becomes of a run when one of them ends."""

import math
import time

import pytest
from filelock import FileLock
from modes import DEVICE, not_interpreted
from paper_inputs import small_bundle, small_run

from bench.paper.config import ConfigurationError
from bench.paper.runs import Outcome, Place
from bench.paper.sharing import work_off

pytestmark = not_interpreted


def some_outcomes(folder, count=3, deadline=math.inf) -> list[Outcome]:
    bundle = small_bundle()
    return [Outcome(small_run(bundle, seed=seed), bundle, Place(folder, DEVICE, deadline), {}) for seed in range(count)]


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path):
    found, done = some_outcomes(tmp_path), []
    with FileLock(found[1].lock):
        work_off([(each, lambda each=each: done.append(each.run.seed)) for each in found])
    assert done == [0, 2]
    work_off([(each, lambda each=each: done.append(each.run.seed)) for each in found])
    assert done == [0, 2, 0, 1, 2]  # nobody holds one any more


def test_what_another_process_did_is_not_done_again(tmp_path):
    theirs, ours = (some_outcomes(tmp_path, 1)[0] for _ in range(2))
    theirs.figure("test", lambda: 1.5)
    work_off([(ours, lambda: ours.figure("test", lambda: pytest.fail("done twice")))])
    assert ours.figures == {"test": 1.5}


def test_a_run_that_fails_costs_itself_alone(tmp_path, capsys):
    found, done = some_outcomes(tmp_path), []

    def job(each):
        if each.run.seed == 1:
            raise RuntimeError("CUDA error: made up")
        done.append(each.run.seed)

    work_off([(each, lambda each=each: job(each)) for each in found])
    assert done == [0, 2] and "fuzzytok-29-s1 failed" in capsys.readouterr().err
    with pytest.raises(ConfigurationError):
        work_off([(found[0], lambda: Outcome(small_run(small_bundle(), clip=2.0), small_bundle(), found[0].place, {}))])


@pytest.mark.parametrize("stop", ["time", "ctrl-c"])
def test_the_rest_is_left_when_the_time_is_up_or_a_user_stops(tmp_path, stop, capsys):
    found, done = some_outcomes(tmp_path, deadline=0 if stop == "time" else math.inf), []

    def job(each):
        if stop == "ctrl-c":
            raise KeyboardInterrupt
        each.figure("test", lambda: done.append(1))

    work_off([(each, lambda each=each: job(each)) for each in found])
    assert done == [] and "fuzzytok-29-s0 stopped" in capsys.readouterr().err


def test_what_takes_longer_than_is_left_does_not_begin(tmp_path):
    (each,) = some_outcomes(tmp_path, 1, deadline=time.monotonic() + 30)
    work_off([(each, lambda: each.figure("test", lambda: 1.0, seconds=60.0)), (each, lambda: pytest.fail("began"))])
    assert each.figures == {}


def test_a_run_whose_weights_are_gone_begins_anew_unless_it_was_whole(tmp_path):
    first = some_outcomes(tmp_path, 1)[0]
    first.train()
    first.figure("test", lambda: 1.5)
    first.figure("memory", lambda: {"16x1024": 1.0})  # wants no weights
    again = some_outcomes(tmp_path, 1)[0]
    assert set(again.figures) == {"training", "test", "memory"}
    (first.folder / "weights.pt").unlink()
    assert set(some_outcomes(tmp_path, 1)[0].figures) == {"memory"}
    for name in ("robustness", "causality", "radical"):
        first.figure(name, lambda: {})
    assert some_outcomes(tmp_path, 1)[0].whole
