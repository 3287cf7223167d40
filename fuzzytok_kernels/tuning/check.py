"""`fuzzytok check`: race this GPU's stored winners against the default again; 1 if one has become slower or wrong.

With --all, verify instead every config that any problem could be given, on shapes that no block divides; Ctrl-C says how to go on.
"""

import argparse
import math
from collections.abc import Sequence

from fuzzytok_kernels.tuning import lookup
from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.space import OPS, default_config
from fuzzytok_kernels.tuning.store import Entry, path_of, read
from fuzzytok_kernels.tuning.tuner import compilers, job_of, racer
from fuzzytok_kernels.tuning.verify import verify_all
from fuzzytok_kernels.tuning.worker import WorkerError

_SLOWER = 1.03  # of the default's time; less is noise
_RACES = 3  # that a winner must lose: one of 247 lost its first by 9 % on the GPU where it had won by 3 minutes before


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fuzzytok check` and return its exit status."""
    parser = argparse.ArgumentParser(prog="fuzzytok check", description=__doc__)
    parser.add_argument("--all", action="store_true", help="verify every config of the search space, for every op, dtype and layout")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="with --all: pass over the first N, of a run that was stopped")
    chosen = parser.parse_args(arguments)
    gpu = Gpu.current(0)
    if gpu is None:
        parser.exit(1, "fuzzytok check: winners are measured on a GPU, and there is none\n")
    if chosen.all:
        return verify_all(gpu, chosen.skip)
    winners = [entry for entry in _entries(gpu) if entry.config != default_config(entry.problem)]
    bad = 0
    with compilers(gpu) as compile, racer() as race:
        compiled = [compile(job_of(entry.problem), entry.config) for entry in winners]
        for entry, future in zip(winners, compiled, strict=True):
            try:
                for _ in range(_RACES):
                    default_us, winner_us = race(0, job_of(entry.problem), entry.config, future.result(), gpu.shared_memory)
                    verdict = "wrong" if winner_us == math.inf else "slower" if winner_us > _SLOWER * default_us else "ok"
                    if verdict != "slower":
                        break
                figures = f"{winner_us:9.1f} us, default {default_us:9.1f} us"
            except WorkerError as error:
                verdict, figures = "failed", str(error)
            bad += verdict != "ok"
            print(f"{verdict:<7} {figures}  {entry.problem}", flush=True)
    print(f"{len(winners)} stored winners of {gpu.name}: {bad} slower, wrong or failed")
    return 1 if bad else 0


def _entries(gpu: Gpu) -> list[Entry]:
    folders = [folder for folder in lookup.folders().values() if folder is not None]
    return [entry for folder in folders for op in OPS for entry in read(path_of(folder, gpu, op), gpu, op)[0]]
