"""`torchrun --nproc-per-node N -m bench.links`: microseconds of a message and of NCCL's collectives on 2, 4, ... N GPUs, measured.

A captured graph of many, one after another, is replayed: what is in it is the device's share, the launch of NCCL's kernel included. A
message goes to and fro, so that each waits for the one before.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from bench.sequence_parallel import begin, groups, leave, microseconds, write

SIZES = (42, 1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 23, 1 << 26, 1 << 28)  # bytes; of a collective, of all ranks together
IN_A_GRAPH, ROUNDS = 20, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file to add a line of JSON to for each measurement")
    options = parser.parse_args()
    device = begin()
    for ranks, mesh in groups(device).items():
        for name, call in _calls(mesh).items():
            for size in SIZES:
                us = _timed(partial(call, torch.zeros(-(-size // (4 * ranks)) * ranks, device=device)), device)
                write({"ranks": ranks, "name": name, "bytes": size, "us": us}, options.out)
    leave()


def _calls(mesh: DeviceMesh) -> dict[str, Callable[[Tensor], Any]]:
    group, rank, ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()

    def to_and_fro(whole: Tensor) -> None:
        for source in (0, 1):
            way = dist.isend if rank == source else dist.irecv
            for work in dist.batch_isend_irecv([dist.P2POp(way, whole, group=group, group_peer=1 - rank)]):
                work.wait()

    def all_gather(whole: Tensor) -> None:
        dist.all_gather_into_tensor(whole, whole.chunk(ranks)[rank], group=group)

    def reduce_scatter(whole: Tensor) -> None:
        dist.reduce_scatter_tensor(whole.chunk(ranks)[rank], whole, group=group)

    def all_reduce(whole: Tensor) -> None:
        dist.all_reduce(whole, group=group)

    collectives: dict[str, Callable[[Tensor], Any]] = {"all-gather": all_gather, "reduce-scatter": reduce_scatter, "all-reduce": all_reduce}
    return {"two messages": to_and_fro, **collectives} if ranks == 2 else collectives if ranks > 2 else {}


def _timed(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, the median of the rounds on the slowest rank."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(IN_A_GRAPH):
                call()
        rounds = [microseconds(graph.replay, 1, device) for _ in range(1 + ROUNDS)]
    slowest = torch.tensor(statistics.median(rounds[1:]) / IN_A_GRAPH, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


if __name__ == "__main__":
    main()
