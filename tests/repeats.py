"""`make repeats`: forward and gradients 10,000 times under load from a second stream, the same bits each time, in several processes.

    FUZZYTOK_TEST_DEVICE=cuda PYTHONPATH=. python3 tests/repeats.py [--times N]

Every op of cases.py, in two dtypes. A process prints a digest of its results; those of three more, which start afresh, must be the same.
"""

import argparse
import hashlib
import subprocess
import sys
import time

import cases
import torch
import verdicts
from torch import Tensor

_PROCESSES, _IN_EACH = 3, 100  # others, and how often they repeat


def main() -> int:
    """1 if any result differed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[2].partition("\n")[0])
    parser.add_argument("--times", type=int, default=10_000)
    times = parser.parse_args().times
    started = time.monotonic()
    digests, differing = _repeated(times)
    others = [] if times == _IN_EACH else [_in_another_process() for _ in range(_PROCESSES)]
    for name, digest in digests.items():
        print(f"{digest}  {name}")
    if others:
        apart = [name for name, digest in digests.items() if any(other.get(name) != digest for other in others)]
        took = time.monotonic() - started
        print(f"{len(digests)} launches repeated {times:,} times, in {_PROCESSES} processes more {_IN_EACH} times each, in {took:.0f} s")
        print(f"{len(differing)} differed from their first ({', '.join(differing)}), {len(apart)} between processes ({', '.join(apart)})")
        differing = [*differing, *apart]
    return 1 if differing else 0


def _repeated(times: int) -> tuple[dict[str, str], list[str]]:
    """The digest of each launch's results, and the names of those that were not the same every time."""
    side, noise = torch.cuda.Stream(), torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    digests, differing = {}, []
    for case in _cases():
        args = cases.SUBJECTS[case.op].arguments(case, cases.Tensors(case))
        op = getattr(torch.ops.fuzzytok, case.op).default
        with verdicts.precision(case.dtype):
            first = _bits(op(*args))
            off = torch.zeros((), dtype=torch.bool, device="cuda")
            for i in range(times):
                if i % 4 == 0:
                    with torch.cuda.stream(side):
                        noise @ noise[:, : 256 + i % 768]
                for got, want in zip(_bits(op(*args)), first, strict=True):
                    off |= (got != want).any()
        name = f"{case.op} {case.dtype} {case.layout}"
        digests[name] = hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in first)).hexdigest()[:16]
        if off.item():
            differing.append(name)
        side.synchronize()
    return digests, differing


def _cases() -> list[cases.Case]:
    common = dict(
        others="channels-last", weight="tap-major", bias="contiguous", residual="none", packed=False, state=False, K=3, config=0,
        c_in=128, channels=128, T=1000, B=8, d=4, spoilt=None, seed=0,
    )  # fmt: skip
    return [
        cases.Case(op=op, dtype=dtype, layout=layout, activation=cases.choices(op)["activation"][-1], **common)
        for op in cases.SUBJECTS
        for dtype, layout in (("bf16", "channels-last"), ("fp32", "channels-first"))
    ]


def _bits(results: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """As integers, so that a NaN equals itself."""
    results = results if isinstance(results, tuple) else (results,)
    return [value.contiguous().view(torch.int16 if value.itemsize == 2 else torch.int32) for value in results]


def _in_another_process() -> dict[str, str]:
    command = [sys.executable, __file__, "--times", str(_IN_EACH)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


if __name__ == "__main__":
    sys.exit(main())
