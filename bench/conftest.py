"""Data shared by the rows of a shape, kernels compiled beforehand, and what the JSON says of the machine."""

import platform
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench import precompile
from bench.grid import Case
from bench.measure import DEVICE, Data
from bench.results import slug
from bench.roofline import ceilings
from fuzzytok_kernels.tuning.gpu import versions


def pytest_collection_finish(session: pytest.Session) -> None:
    if DEVICE == "cuda":
        cases: list[Any] = [item.callspec.params["case"] for item in session.items if isinstance(item, pytest.Function)]
        precompile.compile_kernels(cases)


@pytest.fixture(scope="session")
def drawn() -> Callable[[Case], Data]:
    """The data of a case, kept until one of another shape, dtype or layout asks; rows that follow each other share it."""
    last: dict[tuple, Data] = {}

    def data(case: Case) -> Data:
        key = case.shape, case.dtype, case.layout
        if key not in last:
            last.clear()
            torch.manual_seed(0)
            last[key] = Data(case, Data.copies_of(case))
        return last[key]

    return data


@pytest.hookimpl
def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """What the figures depend on, and nothing that names the machine."""
    measured = ceilings()
    machine_info.clear()
    machine_info.update(
        slug=slug(),
        gpu=torch.cuda.get_device_name() if DEVICE == "cuda" else None,
        versions={"python": platform.python_version(), **versions()},
        ceilings=measured._asdict() if measured else None,
    )


@pytest.hookimpl
def pytest_benchmark_update_commit_info(config: Any, commit_info: dict[str, Any]) -> None:
    """Which commit, and no more."""
    for name in commit_info.keys() - {"id", "dirty"}:
        del commit_info[name]


@pytest.hookimpl(wrapper=True)
def pytest_benchmark_generate_json(benchmarks: list) -> Iterator[None]:
    """Without the row at which a run was interrupted: it has no facts, and its empty list of times kept all others from being stored."""
    benchmarks[:] = [row for row in benchmarks if row.extra_info]
    return (yield)


@pytest.hookimpl
def pytest_benchmark_update_json(config: Any, benchmarks: list, output_json: dict[str, Any]) -> None:
    """Each row's summary and facts, without every single time and without the parameters that `extra_info` repeats."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
        for name in ("params", "param", "options"):
            row.pop(name, None)
