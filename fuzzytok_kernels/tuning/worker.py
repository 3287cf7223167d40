"""A function called in a process of its own, so that a compiler abort or a lost CUDA context costs one call.

Not `multiprocessing`: its spawn runs the user's script again, and its fork does not survive CUDA.
"""

import contextlib
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from typing import Any


class WorkerError(RuntimeError):
    """The call raised, crashed or took too long; the message says which."""


class Worker:
    """Calls `function`, named "module:function", in another process, started at the first call and again after a crash."""

    def __init__(self, function: str, timeout: float = 120.0) -> None:
        self._function, self._timeout = function, timeout
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None

    def __call__(self, *args: Any) -> Any:
        """The function's result for `args`, both pickled.

        Raises:
            WorkerError: the call raised, the process died, or it was killed after `timeout` seconds.
        """
        try:
            connection = self._connection or self._start()
            connection.send(args)
            if not connection.poll(self._timeout):
                raise WorkerError(f"no answer within {self._timeout:.0f} s")
            succeeded, result = connection.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise WorkerError(f"the process died ({str(error) or 'it gave no reason'})") from error
        except BaseException:
            self.close()
            raise
        if not succeeded:
            raise WorkerError(result)
        return result

    def kill(self) -> None:
        """End the process, from any thread: the call that waits for it raises."""
        if process := self._process:
            process.kill()

    def close(self) -> None:
        """End the process, which no call waits for."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _start(self) -> Connection:
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fuzzytok_kernels.tuning.worker", self._function, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # a crashing compiler prints its whole module
            start_new_session=True,  # Ctrl-C is the caller's, who says what there is before it ends this
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                "FUZZYTOK_AUTOTUNE": "0",
                "PYTHONSAFEPATH": "1",
            },
        )
        theirs.close()
        return self._connection


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def pool(function: str, processes: int) -> Iterator[Callable[..., Future]]:
    """Calls `function` in as many processes at once, each call into a future. What has not ended when the caller leaves is given up."""
    workers: list[Worker] = []
    mine = threading.local()

    def call(*args: Any) -> Any:
        if not hasattr(mine, "worker"):
            mine.worker = Worker(function)
            workers.append(mine.worker)
        return mine.worker(*args)

    threads = ThreadPoolExecutor(processes)
    try:
        yield lambda *args: threads.submit(call, *args)
    finally:
        end(threads, workers)


def end(threads: ThreadPoolExecutor, workers: Sequence[Worker]) -> None:
    """Give up what `threads` call of `workers`, one each."""
    threads.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.kill()
    threads.shutdown()
    for worker in workers:
        worker.close()


def _serve(name: str, descriptor: int) -> None:
    module, _, attribute = name.partition(":")
    connection = Connection(descriptor)
    function = getattr(importlib.import_module(module), attribute)
    while True:
        try:
            args = connection.recv()
        except EOFError:  # the parent is gone
            return
        try:
            answer = True, function(*args)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
        connection.send(answer)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
