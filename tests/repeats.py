"""`make repeats`: forward and gradients 10,000 times under load from a second stream, the same bits each time, in several processes.

    FUZZYTOK_TEST_DEVICE=cuda PYTHONPATH=. python3 tests/repeats.py [--times N]

Every op of cases.py, in three dtypes. A process prints a digest of its results; those of three more, which start afresh, must be the same.
"""

import argparse
import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator

import cases
import torch
import verdicts
from torch import Tensor

_PROCESSES, _IN_EACH = 3, 100  # others, and how often they repeat


def main() -> int:
    """1 if any result differed or was not repeated as often, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[2].partition("\n")[0])
    parser.add_argument("--times", type=int, default=10_000)
    times = parser.parse_args().times
    if times == _IN_EACH:
        return 1 if any(differs for *_, differs in _repeated(times)) else 0
    started, digests, differing = time.monotonic(), {}, []
    others = [_another_process() for _ in range(_PROCESSES)]
    try:
        for name, digest, differs in _repeated(times):
            digests[name] = digest
            differing += [name] * differs
            print(f"    {'DIFFERED' if differs else 'the same'} {times:,} times, {time.monotonic() - started:.0f} s", flush=True)
        for other in others:
            other.wait()
    except KeyboardInterrupt:
        print("stopped")
    compared = [_digests(other) for other in others if other.poll() is not None]
    for other in others:
        other.kill()
    took, complete = time.monotonic() - started, len(digests) == len(_cases()) and len(compared) == _PROCESSES
    apart = [name for name, digest in digests.items() if any(other.get(name) != digest for other in compared)]
    print(f"{len(differing)} differed from their first ({', '.join(differing)}), {len(apart)} between processes ({', '.join(apart)})")
    print(f"{len(digests)} launches repeated {times:,} times, in {len(compared)} processes more {_IN_EACH} times each, in {took:.0f} s")
    return 0 if complete and not differing and not apart else 1


def _repeated(times: int) -> Iterator[tuple[str, str, bool]]:
    """Each launch's name, the digest of its results, and whether they were not the same every time; printed as it goes."""
    side, noise = torch.cuda.Stream(), torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    for case in _cases():
        args = cases.SUBJECTS[case.op].arguments(case, cases.Tensors(case))
        op = getattr(torch.ops.fuzzytok, case.op).default
        with verdicts.precision(case.dtype):
            first = _bits(verdicts.call(op, case.op, args))
            off = torch.zeros((), dtype=torch.bool, device="cuda")
            for i in range(times):
                if i % 4 == 0:
                    with torch.cuda.stream(side):
                        noise @ noise[:, : 256 + i % 768]
                for got, want in zip(_bits(verdicts.call(op, case.op, args)), first, strict=True):
                    off |= (got != want).any()
        name = f"{case.op} {case.dtype} {case.layout}"
        digest = hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in first)).hexdigest()[:16]
        side.synchronize()
        print(f"{digest}  {name}", flush=True)
        yield name, digest, off.item()


def _cases() -> list[cases.Case]:
    common = dict(
        others="channels-last", weight="tap-major", bias="contiguous", residual="none", packed=False, state=False, K=3, config=0,
        c_in=128, channels=128, B=8, d=4, spoilt=None, seed=0,
    )  # fmt: skip
    return [
        cases.Case(
            op=op, dtype=dtype, layout=layout, activation=cases.choices(op)["activation"][-1], T=1 if "update" in op else 1000, **common
        )
        for op in cases.SUBJECTS
        for dtype, layout in (("bf16", "channels-last"), ("fp32", "channels-first"), ("tf32", "channels-last"))
    ]


def _bits(results: tuple[Tensor, ...]) -> list[Tensor]:
    """As integers, so that a NaN equals itself."""
    return [value.contiguous().view(torch.int16 if value.itemsize == 2 else torch.int32) for value in results]


def _another_process() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, __file__, "--times", str(_IN_EACH)], stdout=subprocess.PIPE, text=True)


def _digests(process: subprocess.Popen) -> dict[str, str]:
    lines = process.communicate()[0].splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


if __name__ == "__main__":
    sys.exit(main())
