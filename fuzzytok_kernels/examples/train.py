"""Train a byte language model on a file, on any number of ranks: parameters sharded by FSDP2, rows and time by the ranks.

    torchrun --nproc-per-node 4 -m fuzzytok_kernels.examples.train --file=text --checkpoints=folder --time-ranks=2

Started again with the same folder it goes on at the last checkpoint, with whatever number of ranks it has then: a step draws its bytes by
its own number, so that it is the same on any of them, to rounding. If a rank dies, `torchrun` ends the others and says which it was; if
one hangs, the others give up after `--timeout` seconds.
"""

import argparse
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from fuzzytok_kernels.distributed import TimeParallel
from fuzzytok_kernels.nn import ByteLM, bits_per_byte


@record
def main() -> None:
    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # which nothing here changes in place
    options = _options()
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("run it under torchrun: torchrun --nproc-per-node=1 -m fuzzytok_kernels.examples.train ...")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(timeout=timedelta(seconds=options.timeout))  # NCCL on GPUs, gloo on the CPU
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows, steps = options.batch * options.time_ranks / ranks, options.length / options.time_ranks
    if ranks % options.time_ranks or not rows.is_integer() or not steps.is_integer():
        raise SystemExit(
            f"--batch={options.batch} and --length={options.length} do not divide among {ranks} ranks, {options.time_ranks} a row"
        )
    print(f"rank {rank} of {ranks}: process {os.getpid()}\n", end="", flush=True)  # one write: torchrun's ranks share the stream
    mesh = init_device_mesh(device.type, (ranks // options.time_ranks, options.time_ranks), mesh_dim_names=("data", "time"))
    model = _model(options.dim, device)
    parallelize_module(model, mesh["time"], TimeParallel())
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    everyone = init_device_mesh(device.type, (ranks,))
    _, *others = model.tokenizer.blocks  # the first, the embedding and its norm may run as one op, and are sharded with the rest
    for module in (*others, model):
        fully_shard(module, mesh=everyone, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    begun = _resume(options.checkpoints, model, optimizer)
    text = torch.frombuffer(bytearray(options.file.read_bytes()), dtype=torch.uint8)
    for step in range(begun + 1, options.steps + 1):
        ids, targets = (_part(value, mesh).to(device) for value in _batch(text, step, options.batch, options.length))
        loss = bits_per_byte(model(ids), targets)
        loss.backward()  # FSDP averages over the ranks, which have as many bytes each
        optimizer.step()
        optimizer.zero_grad()
        bits = loss.detach()
        dist.all_reduce(bits)
        if rank == 0:
            print(f"step {step}: {bits.item() / ranks:.4f} bits per byte", flush=True)
        if step % options.every == 0 or step == options.steps:
            _save(options.checkpoints, step, model, optimizer)
    dist.destroy_process_group()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--file", type=Path, required=True, help="what to train on, any bytes")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder to write them to, and to go on from")
    parser.add_argument("--time-ranks", type=int, default=1, help="ranks that share a row of bytes; the rest of them share the batch")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--batch", type=int, default=32, help="rows in a step, of all ranks together")
    parser.add_argument("--length", type=int, default=2048, help="bytes in a row, of all ranks together")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a rank waits for another")
    options = parser.parse_args()
    for name in ("time_ranks", "every", "batch", "length", "dim"):
        if getattr(options, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected at least 1")
    if (size := options.file.stat().st_size) <= options.length:
        raise SystemExit(f"--file={options.file} has {size} bytes; expected more than the {options.length} of --length")
    return options


def _model(dim: int, device: torch.device) -> ByteLM:
    torch.manual_seed(0)  # the same on all ranks
    model = ByteLM(dim)
    contiguous = {name: value.contiguous() for name, value in model.state_dict().items()}  # FSDP2 takes no others
    model.load_state_dict(contiguous, assign=True)
    return model.to(device)


def _batch(text: Tensor, step: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Windows at random, as the number of the step has it, and the same a byte later: (rows, length) each."""
    starts = torch.randint(len(text) - length, (rows,), generator=torch.Generator().manual_seed(step))
    windows = text[starts[:, None] + torch.arange(length + 1)]
    return windows[:, :-1], windows[:, 1:]


def _part(value: Tensor, mesh: dist.DeviceMesh) -> Tensor:
    for dim, name in enumerate(("data", "time")):
        value = value.chunk(mesh[name].size(), dim)[mesh[name].get_local_rank()]
    return value


# ---- checkpoints: a folder a step, complete once it has the file that torch.distributed.checkpoint writes last


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def _save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    dcp.save(_states(model, optimizer), checkpoint_id=folder / f"step-{step:08}")


def _resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The step of the last complete checkpoint, once model and optimizer are as they were there; 0 if there is none."""
    found = max(folder.glob("step-*/.metadata"), default=None)
    if found is None:
        return 0
    states = _states(model, optimizer)
    dcp.load(states, checkpoint_id=found.parent)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    step = int(found.parent.name.removeprefix("step-"))
    if dist.get_rank() == 0:
        print(f"resumed at step {step}", flush=True)
    return step


if __name__ == "__main__":
    main()
