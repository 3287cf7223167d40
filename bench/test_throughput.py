"""The rows. Each is checked against the reference in fp64 before it is timed; a wrong one fails and has no time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.grid import Case, cases, companion
from bench.measure import BUDGET_MS, DEVICE, Calls, Data, Round, extra_info, host_medians, switches
from bench.roofline import ceilings
from fuzzytok_kernels.tuning import timer
from fuzzytok_kernels.tuning.gpu import versions

_CASES = cases(on_gpu=DEVICE == "cuda")
_HOST = [case for case in _CASES if case.section == "host"]
_MACHINE: dict[str, Any] = {"gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else None, "versions": versions()}


@pytest.mark.parametrize("case", [case for case in _CASES if case.section != "host"], ids=str)
def test_throughput(case: Case, benchmark: Any, drawn: Callable[[Case], Data]) -> None:
    """On the device: the median round, by the device's own clock. What pytest-benchmark prints is that of the host, a whole round."""
    limits = ceilings()
    with switches(case):
        calls = Calls(case, drawn(case))
        configs = calls.configs()
        one_round = Round(calls.all)
        one_round()
        error = calls.error()
        rounds = timer.rounds(one_round.milliseconds.pop(), BUDGET_MS)
        other = companion(case)
        in_turn = Round(Calls(other, Data(other, len(calls.copies))).all) if other else None
        benchmark.pedantic(one_round, setup=in_turn, rounds=rounds)
    info = extra_info(case, one_round.microseconds(), limits, in_turn.microseconds() if in_turn else None)
    benchmark.extra_info.update(info, calls=len(calls.all), copies=len(calls.copies), error=error, configs=configs, **_MACHINE)


@pytest.mark.parametrize("case", _HOST, ids=str)
def test_host(case: Case, benchmark: Any) -> None:
    """On the host: the median time in which an eager call returns. What pytest-benchmark prints is that of one call of it alone."""
    with switches(case), torch.set_grad_enabled(case.op == "forward_backward"):
        calls = Calls(case, Data(case, 1))
        configs = calls.configs()
        error = calls.error()
        benchmark.pedantic(calls.copies[0])
        medians = host_medians(tuple(other for other in _HOST if other == case._replace(rival=other.rival)))
    benchmark.extra_info.update(extra_info(case, medians[case.rival], None), error=error, configs=configs, **_MACHINE)
