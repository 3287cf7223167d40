"""Several processes, one a GPU, share the runs of a command: each takes the next that no other holds, by locks in the runs' folders."""

import sys
import traceback
from collections.abc import Callable, Iterable

from filelock import FileLock, Timeout

from bench.paper.config import ConfigurationError
from bench.paper.runs import Outcome
from bench.paper.train import OutOfTimeError


def work_off(jobs: Iterable[tuple[Outcome, Callable[[], object]]]) -> None:
    """Do the jobs that no other process does or did, until there are none, the time is up or Ctrl-C. One that fails costs itself alone."""
    for outcome, job in jobs:
        try:
            with FileLock(outcome.lock, timeout=0):
                outcome.read()
                job()
        except Timeout:
            continue
        except (OutOfTimeError, KeyboardInterrupt) as stop:
            print(f"bench.paper: {outcome.run.name} stopped: {stop or 'interrupted'}", file=sys.stderr)
            return
        except ConfigurationError:
            raise
        except Exception:
            print(f"bench.paper: {outcome.run.name} failed", file=sys.stderr)
            traceback.print_exc()
