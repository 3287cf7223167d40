"""`make fuzz`: thousands of random problems of every op on a GPU, in several processes; a failing one shrinks to a line.

    FUZZYTOK_TEST_DEVICE=cuda PYTHONPATH=. python3 tests/fuzz.py [--cases N] [--each N] [--minutes M] [--seed S] [--case LINE]

Each template (what is compiled: cases.py) is drawn from the seed and gets its sizes from hypothesis, which also shrinks what fails. A
lost CUDA context ends its process and costs the rest of one template. One process a core, and all GPUs that there are, in turn.
"""

import argparse
import contextlib
import itertools
import math
import random
import secrets
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import cases
import torch
import verdicts
from hypothesis import HealthCheck, given, seed, settings
from modes import DEVICE, ON_CUDA

from fuzzytok_kernels.tuning.worker import Worker, WorkerError, cores, end

_AT_ONCE = 25  # cases between two counts
_EVERY = 10.0  # seconds: how often what there is so far is printed
_SHRINKING = 30.0  # seconds at most
_SETTINGS = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def main() -> int:
    """1 if any case failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[2].partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--each", type=int, default=100, help="cases a template (default: 100)")
    parser.add_argument("--minutes", type=float, default=8.0, help="what has not ended by then is given up (default: 8)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--case", type=cases.from_text, help="run this one alone")
    chosen = parser.parse_args()
    if chosen.case:
        verdicts.check(chosen.case)
        print("passed")
        return 0
    templates = list(_templates(random.Random(chosen.seed), -(-chosen.cases // chosen.each)))
    print(f"seed {chosen.seed}: {len(templates)} templates, {chosen.each} cases each, on {DEVICE}", flush=True)
    tally, pool = Tally(chosen.seed), ThreadPoolExecutor(cores())
    runs = [pool.submit(_in_a_process, template, chosen.seed + 1000 * i, chosen.each, tally) for i, template in enumerate(templates)]
    ends = time.monotonic() + 60 * chosen.minutes
    with contextlib.suppress(KeyboardInterrupt):
        while wait(runs, timeout=min(_EVERY, ends - time.monotonic())).not_done and time.monotonic() < ends:
            print(tally, flush=True)  # whatever may end this, its last line counts
    tally.closed, left = True, sum(not run.done() for run in runs)
    for op, count in tally.passed.items():
        print(f"{count:7,} passed  {op}")
    print(f"{tally}{f'; {left} templates were not ended' * (left > 0)}", flush=True)
    end(pool, _workers)
    return 1 if tally.failed else 0


class Tally:
    """What came out so far, from all processes."""

    def __init__(self, seed: int) -> None:
        self.seed, self.begun, self._lock = seed, time.monotonic(), threading.Lock()
        self.passed, self.failed, self.closed = dict.fromkeys(cases.SUBJECTS, 0), 0, False

    def add(self, op: str, passed: int, failed: str | None) -> None:
        with self._lock:
            self.passed[op] += passed
            self.failed += failed is not None

    def __str__(self) -> str:
        took = time.monotonic() - self.begun
        return f"{sum(self.passed.values()):,} cases passed, {self.failed} templates failed, in {took:.0f} s; seed {self.seed}"


def run_template(template: dict[str, Any], start: int, count: int, gpu: int = 0) -> tuple[int, str | None]:
    """How many of `count` of a template's cases passed that have not before, and the line of the smallest that did not."""
    passed, failed, lost, shrinking_ends = 0, None, False, math.inf
    if ON_CUDA:
        torch.cuda.set_device(gpu)

    @seed(start)
    @settings(max_examples=count, **_SETTINGS)
    @given(case=cases.sizes(template))
    def check(case: cases.Case) -> None:
        nonlocal passed, failed, lost, shrinking_ends
        if lost or time.monotonic() > shrinking_ends:
            return  # nothing can be said without a context, and hypothesis alone would shrink for minutes
        try:
            verdicts.check(case)
        except Exception as error:
            lost, shrinking_ends = _context_is_lost(), min(shrinking_ends, time.monotonic() + _SHRINKING)
            failed = f"FAILED {type(error).__name__}: {str(error).partition(chr(10))[0]}\n    --case '{case}'"
            raise
        passed += failed is None and str(case) not in _passed  # every draw begins with the smallest
        _passed.add(str(case))

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


_passed: set[str] = set()  # in a process of its own
_mine = threading.local()
_workers: list[Worker] = []
_gpus = itertools.cycle(range(torch.cuda.device_count() if ON_CUDA else 1))


def _in_a_process(template: dict[str, Any], start: int, count: int, tally: Tally) -> None:
    """Until one fails, which is printed at once."""
    if not hasattr(_mine, "worker"):
        _mine.worker, _mine.gpu = Worker("fuzz:run_template", timeout=300), next(_gpus)
        _workers.append(_mine.worker)
    for begin in range(0, count, _AT_ONCE):
        try:
            passed, failed = _mine.worker(template, start + begin, min(_AT_ONCE, count - begin), _mine.gpu)
        except WorkerError as error:
            if tally.closed:
                return
            passed, failed = 0, f"FAILED {error}\n    template {template}"
        tally.add(template["op"], passed, failed)
        if failed:
            print(failed, flush=True)
            if ON_CUDA:
                _mine.worker.close()  # its context may be lost
            return


if __name__ == "__main__":
    sys.exit(main())
