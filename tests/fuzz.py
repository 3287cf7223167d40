"""`make fuzz`: thousands of random problems of every op on a GPU, in several processes; a failing one shrinks to a line.

    FUZZYTOK_TEST_DEVICE=cuda PYTHONPATH=. python3 tests/fuzz.py [--cases N] [--minutes M] [--seed S] [--case LINE]

Each template (what is compiled: cases.py) is drawn from the seed and gets its sizes from hypothesis, which also shrinks what fails. A
lost CUDA context ends its process and costs the rest of one template.
"""

import argparse
import collections
import os
import random
import secrets
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import cases
import torch
import verdicts
from hypothesis import HealthCheck, given, seed, settings
from modes import DEVICE, ON_CUDA
from tqdm import tqdm

from fuzzytok_kernels.tuning.worker import Worker, WorkerError

EACH = 25  # cases a template
_SETTINGS = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def main() -> int:
    """1 if any case failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[2].partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=8.0, help="no template is begun after that (default: 8)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--case", type=cases.from_text, help="run this one alone")
    chosen = parser.parse_args()
    if chosen.case:
        verdicts.check(chosen.case)
        print("passed")
        return 0
    templates = list(_templates(random.Random(chosen.seed), -(-chosen.cases // EACH)))
    print(f"seed {chosen.seed}: {len(templates)} templates, {EACH} cases each, on {DEVICE}", flush=True)
    passed, failures, started = collections.Counter(), [], time.monotonic()
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2)) as pool:
        futures = {pool.submit(_in_a_process, template, chosen.seed + i): template for i, template in enumerate(templates)}
        for future in tqdm(futures, smoothing=0):
            if time.monotonic() - started > 60 * chosen.minutes:
                pool.shutdown(wait=False, cancel_futures=True)
            _count(future, futures[future], passed, failures)
    for op, count in passed.items():
        print(f"{count:7,} passed  {op}")
    for failure in failures:
        print(failure)
    took = time.monotonic() - started
    print(f"{sum(passed.values()):,} cases passed, {len(failures)} templates failed, in {took:.0f} s; seed {chosen.seed}")
    return 1 if failures else 0


def run_template(template: dict[str, Any], start: int) -> tuple[int, str | None]:
    """How many of a template's cases passed, and the line of the smallest that did not."""
    passed, failed, lost = 0, None, False

    @seed(start)
    @settings(max_examples=EACH, **_SETTINGS)
    @given(case=cases.sizes(template))
    def check(case: cases.Case) -> None:
        nonlocal passed, failed, lost
        assert not lost, "nothing can be said without a context"
        try:
            verdicts.check(case)
        except Exception as error:
            lost = _context_is_lost()
            failed = f"FAILED {type(error).__name__}: {str(error).partition(chr(10))[0]}\n    --case '{case}'"
            raise
        passed += failed is None

    try:
        check()
    except BaseException:  # hypothesis raises groups, too
        if failed is None:
            raise
    return passed, failed


def _context_is_lost() -> bool:
    try:
        if ON_CUDA:
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _templates(draw: random.Random, count: int) -> Any:
    """As many of each op."""
    configured = len(cases.CONFIGS)
    for _, op in zip(range(count), _forever(cases.SUBJECTS), strict=False):
        template = {name: draw.choice(values) for name, values in cases.choices(op).items()}
        if ON_CUDA:  # what the look-up says hangs on the sizes, and each answer is another kernel to compile
            template["config"] = draw.randrange(1, configured)
        yield template


def _forever(values: Any) -> Any:
    while True:
        yield from values


_mine = threading.local()


def _in_a_process(template: dict[str, Any], start: int) -> tuple[int, str | None]:
    if not hasattr(_mine, "worker"):
        _mine.worker = Worker("fuzz:run_template", timeout=300)
    passed, failed = _mine.worker(template, start)
    if failed and ON_CUDA:
        _mine.worker.close()  # its context may be lost
    return passed, failed


def _count(future: Future, template: dict[str, Any], passed: collections.Counter, failures: list[str]) -> None:
    if future.cancelled():
        return
    try:
        count, failed = future.result()
    except WorkerError as error:
        count, failed = 0, f"FAILED {error}\n    template {template}"
    passed[template["op"]] += count
    if failed:
        failures.append(failed)


if __name__ == "__main__":
    sys.exit(main())
