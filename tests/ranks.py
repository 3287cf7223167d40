"""Processes that form a process group, spawned once for many checks: gloo on the CPU, NCCL where there are GPUs enough.

Over NCCL the GPUs should have nothing else to do, `python -m pytest -s tests/test_distributed.py` without `-n`: with 12 process groups on
4 GPUs no check was done after 60 s. A message needs its kernels on two GPUs at the same time, and processes take turns on a GPU. What keeps
a rank busy for more than 20 s is on stderr.
"""

import faulthandler
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from modes import DEVICE, ON_CUDA
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

GPUS = torch.cuda.device_count() if ON_CUDA else 0
RANKS = 4 if GPUS >= 4 or not ON_CUDA else min(2, GPUS)
SECONDS = 300 if ON_CUDA else 60  # for a check, of which one compiles 100 kernels; a rank that waits for one which failed gives up at half


def mesh_of(size: int) -> DeviceMesh:
    """The ranks' mesh of this size, with one dimension: all of them, or each half on its own."""
    return _meshes[size]


def mesh_of_two_by(size: int) -> DeviceMesh:
    """(2, size), named "data" and "model"."""
    return _meshes[2 * size, 2]


_meshes: dict[Any, DeviceMesh] = {}


class Ranks:
    """`run(check, *args)` calls a function of a module on every rank, and raises what the first of them raised."""

    def __init__(self) -> None:
        self._processes: list[Any] = []

    def run(self, check: Callable, *args: Any) -> list:
        if not self._processes:
            self._start()
        for queue in self._questions:
            queue.put((check, args))
        answers: dict[int, Any] = {}
        errors = []
        while len(answers) < RANKS:
            try:
                rank, result, error = self._answers.get(timeout=SECONDS)
            except Exception:  # queue.Empty: a rank has died, or hangs
                errors.append(f"no answer from ranks {sorted(set(range(RANKS)) - set(answers))} within {SECONDS} s")
                break
            answers[rank] = result
            errors += [f"rank {rank}: {error}"] if error else []
        if errors:
            self.stop()  # the others may be in the middle of a message
            raise AssertionError("\n".join(errors))
        return [answers[rank] for rank in range(RANKS)]

    def _start(self) -> None:
        context = mp.get_context("spawn" if ON_CUDA else "forkserver")
        if not ON_CUDA:  # PyTorch is imported once for all
            context.set_forkserver_preload(["dtensor_checks", "sequence_checks"])
        self._folder = tempfile.TemporaryDirectory()
        self._questions = [context.Queue() for _ in range(RANKS)]
        self._answers = context.Queue()
        arguments = [(rank, f"{self._folder.name}/store", question, self._answers) for rank, question in enumerate(self._questions)]
        self._processes = [context.Process(target=_serve, args=args, daemon=True) for args in arguments]
        for process in self._processes:
            process.start()

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


def _serve(rank: int, store: str, questions: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.backends.cudnn.allow_tf32 = False
    if ON_CUDA:
        torch.cuda.set_device(rank)
    how = dict(init_method=f"file://{store}", timeout=timedelta(seconds=SECONDS // 2), world_size=RANKS, rank=rank)
    dist.init_process_group("nccl" if ON_CUDA else "gloo", **how)
    _meshes[RANKS] = init_device_mesh(DEVICE.type, (RANKS,))
    if RANKS == 4:
        _meshes[4, 2] = init_device_mesh(DEVICE.type, (2, 2), mesh_dim_names=("data", "model"))
        _meshes[2] = _meshes[4, 2]["model"]
    for group in (group for mesh in _meshes.values() for group in mesh.get_all_groups()):
        dist.all_reduce(torch.zeros(1, device=DEVICE), group=group)  # all ranks make a communicator of NCCL together
    while True:
        check, args = questions.get()
        torch.manual_seed(0)
        faulthandler.dump_traceback_later(20, repeat=True)  # compiling, or waiting for a rank
        try:
            answers.put((rank, check(*args), None))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
