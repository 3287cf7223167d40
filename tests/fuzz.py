"""`make fuzz`: thousands of random problems of every op on a GPU, in several processes; a failing one shrinks to a line.

    FUZZYTOK_TEST_DEVICE=cuda PYTHONPATH=. python3 tests/fuzz.py [--cases N] [--minutes M] [--seed S] [--case LINE]

Each template (what is compiled: cases.py) is drawn from the seed and gets its sizes from hypothesis, which also shrinks what fails. A
lost CUDA context ends its process and costs the rest of one template. One process a core, and all GPUs that there are, in turn.
"""

import argparse
import collections
import itertools
import math
import random
import secrets
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as TimeIsUp
from typing import Any

import cases
import torch
import verdicts
from hypothesis import HealthCheck, given, seed, settings
from modes import DEVICE, ON_CUDA
from tqdm import tqdm

from fuzzytok_kernels.tuning.worker import Worker, WorkerError, cores, end

EACH = 25  # cases a template
_SHRINKING = 30.0  # seconds at most
_SETTINGS = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def main() -> int:
    """1 if any case failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[2].partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=8.0, help="what has not ended by then is given up (default: 8)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--case", type=cases.from_text, help="run this one alone")
    chosen = parser.parse_args()
    if chosen.case:
        verdicts.check(chosen.case)
        print("passed")
        return 0
    templates = list(_templates(random.Random(chosen.seed), -(-chosen.cases // EACH)))
    print(f"seed {chosen.seed}: {len(templates)} templates, {EACH} cases each, on {DEVICE}", flush=True)
    passed, failures, started = collections.Counter(), 0, time.monotonic()
    pool = ThreadPoolExecutor(cores())
    futures = {pool.submit(_in_a_process, template, chosen.seed + i): template for i, template in enumerate(templates)}
    try:
        for future in tqdm(as_completed(futures, timeout=60 * chosen.minutes), total=len(futures), smoothing=0):
            failures += _count(future, futures[future], passed)
    except TimeIsUp:
        print(f"stopped after {chosen.minutes} minutes")
    end(pool, _workers)
    for op, count in passed.items():
        print(f"{count:7,} passed  {op}")
    took = time.monotonic() - started
    print(f"{sum(passed.values()):,} cases passed, {failures} templates failed, in {took:.0f} s; seed {chosen.seed}")
    return 1 if failures else 0


def run_template(template: dict[str, Any], start: int, gpu: int = 0) -> tuple[int, str | None]:
    """How many of a template's cases passed, and the line of the smallest that did not."""
    passed, failed, lost, shrinking_ends = 0, None, False, math.inf
    if ON_CUDA:
        torch.cuda.set_device(gpu)

    @seed(start)
    @settings(max_examples=EACH, **_SETTINGS)
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
_workers: list[Worker] = []
_gpus = itertools.cycle(range(torch.cuda.device_count() if ON_CUDA else 1))


def _in_a_process(template: dict[str, Any], start: int) -> tuple[int, str | None]:
    if not hasattr(_mine, "worker"):
        _mine.worker, _mine.gpu = Worker("fuzz:run_template", timeout=300), next(_gpus)
        _workers.append(_mine.worker)
    passed, failed = _mine.worker(template, start, _mine.gpu)
    if failed and ON_CUDA:
        _mine.worker.close()  # its context may be lost
    return passed, failed


def _count(future: Future, template: dict[str, Any], passed: collections.Counter) -> bool:
    """Whether it failed, which is printed at once."""
    try:
        count, failed = future.result()
    except WorkerError as error:
        count, failed = 0, f"FAILED {error}\n    template {template}"
    passed[template["op"]] += count
    if failed:
        tqdm.write(failed)
        sys.stdout.flush()
    return failed is not None


if __name__ == "__main__":
    sys.exit(main())
