"""`torchrun --nproc-per-node N -m bench.sequence_parallel`: a training step of ByteLM on rows that 1, 2, 4, ... N ranks share, measured.

A step is forward, loss, backward and the mean of the gradients over the ranks, without the optimiser: parameters in fp32 under autocast to
bf16, or FSDP2's mixed precision. Each form is checked first: its gradients are those of one rank that has all bytes. Then the forms are
timed in turns, a step that exchanges nothing among them; many steps lie between two events, so that what ranks wait for at their beginning
is none of it. On GPUs a step is a captured graph that is replayed, and, for the host's share, launched kernel by kernel. What matters most
is measured first, and profiled once nothing is timed any more. `python3 -m bench.scaled` makes the report.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from bench.hidden import Exchanged, after_the_first
from bench.measure import checked
from bench.results import slug
from fuzzytok_kernels import CausalConv1d
from fuzzytok_kernels.distributed import TimeParallel, average_gradients, history_bytes
from fuzzytok_kernels.nn import ByteLM, bits_per_byte
from fuzzytok_kernels.tuning.gpu import Gpu

STACK, CONVOLUTIONS = "one a stack", "one a convolution"
PLANS = {STACK: lambda: TimeParallel(), CONVOLUTIONS: lambda: {"tokenizer.blocks.*.conv": TimeParallel()}}
ALONE = "none"
# Where it exchanges, and what makes the mean of the gradients, if not `average_gradients`.
FORMS = (ALONE, STACK, CONVOLUTIONS, f"{STACK}, DDP", f"{STACK}, FSDP2", f"{STACK}, FSDP2, one unit")
ROUNDS, EAGER_ROUNDS, EAGER_STEPS, WARM_UP, PROFILED = 9, 3, 10, 12, 5  # DDP asks for 11 steps before a capture
SETTLING = 16  # rounds before the first: a step took 2,525 us on average of the first 0.6 s, 2,615 of the first 4; why is not known
MAIN = 65536  # bytes a rank, at which all forms are timed
WEAK, STRONG = (MAIN, 16384), (MAIN, 4 * MAIN)  # bytes a rank, and of all ranks together
ELSEWHERE = (ALONE, STACK)
GRADIENT_BOUND = 5e-2  # of the relative error in the L2 norm of what nine layers in bf16 leave


class Row(NamedTuple):
    """One measurement: microseconds a step on each rank, which all take the same steps at the same time."""

    ranks: int
    steps: int
    form: str
    how: str
    us: list[float]
    exchanged: list[Any] | None = None  # of a profile, on each rank


def main() -> None:
    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # which nothing here changes in place
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", help="bytes a rank; by default what weak and strong scaling need")
    parser.add_argument("--dim", type=int, default=256 if on_gpu else 64)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--out", type=Path, help="file to add a line of JSON to for each measurement")
    options = parser.parse_args()
    device = begin()
    write(machine(), options.out)
    for row in rows(options.steps, options.dim, options.forms, device):
        write(row._asdict(), options.out)
    leave()


def write(found: dict[str, Any], path: Path | None) -> None:
    """On the first rank: print what was found, and add it to the file."""
    if dist.get_rank() == 0:
        print(found, flush=True)
        if path:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


def machine() -> dict[str, str]:
    gpu = Gpu.current(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpu else ""
    found = {"gpu": gpu.name if gpu else "CPU", "slug": slug(), "torch": torch.__version__, "triton": triton.__version__, "nccl": nccl}
    return found | {"date": time.strftime("%Y-%m-%d")}


def begin() -> torch.device:
    """Joins the ranks that torchrun has started. Without a `device_id`, with which a later group may split another one and hang in it."""
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    return device


def leave() -> None:
    """Ends this process once all ranks are done, without NCCL's own end, which waited for ever where messages had been captured."""
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def groups(device: torch.device) -> dict[int, DeviceMesh]:
    """The mesh of this rank's row by its number of ranks: 1, 2, 4, ... Each has sent something, and so has its communicator."""
    ranks, meshes = 1, {}
    while ranks <= dist.get_world_size():
        whole = init_device_mesh(device.type, (dist.get_world_size() // ranks, ranks), mesh_dim_names=("rows", "time"))
        meshes[ranks] = whole["time"]
        dist.all_reduce(torch.zeros(1, device=device), group=meshes[ranks].get_group())
        ranks *= 2
    return meshes


def plan(steps: Sequence[int] | None, sizes: Iterable[int]) -> list[tuple[int, int]]:
    """Ranks and bytes a rank, in order."""
    weak = [(ranks, T) for T in steps or WEAK for ranks in sizes]
    strong = [] if steps else [(ranks, whole // ranks) for whole in STRONG for ranks in sizes]
    return list(dict.fromkeys(weak + strong))


def rows(steps: Sequence[int] | None, dim: int, forms: Sequence[str], device: torch.device) -> Iterator[Row]:
    """On every rank, in the same order."""
    meshes = groups(device)
    for measured in (_timed, _profiled) if device.type == "cuda" else (_timed,):
        for ranks, T in plan(steps, meshes):
            compared = [name for name in forms if steps or T == MAIN or name in ELSEWHERE]
            if measured is _profiled and (ranks == 1 or T != MAIN):
                continue
            with torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext():
                made = {name: Step(name, meshes[ranks], T, dim, device) for name in (compared if ranks > 1 else [ALONE])}
                yield from measured(made, ranks, T, device)


class Step:
    """A training step of a form on this rank's bytes, which leaves its gradients in `.grad`."""

    def __init__(self, name: str, mesh: DeviceMesh, T: int, dim: int, device: torch.device) -> None:
        self.group, self.device = mesh.get_group(), device
        where, _, self.mean = name.partition(", ")
        torch.manual_seed(0)
        self.model = ByteLM(dim)
        self.sharded = self.mean.startswith("FSDP2")
        if self.sharded:  # it takes no weights that are not contiguous
            self.model.load_state_dict({key: value.contiguous() for key, value in self.model.state_dict().items()}, assign=True)
        self.forward: Callable[[Tensor], Tensor] = self.model.to(device)
        if where != ALONE:
            parallelize_module(self.model, mesh, PLANS[where]())  # type: ignore[arg-type]
        if self.mean == "DDP":
            self.forward = DistributedDataParallel(self.model, process_group=self.group, gradient_as_bucket_view=True, bucket_cap_mb=4)
        elif self.sharded:
            _shard(self.model, mesh, self.mean == "FSDP2", device)
        elif where != ALONE:
            average_gradients(self.model, self.group)
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        whole = torch.randint(256, (1, T * ranks + 1), generator=torch.Generator().manual_seed(T), dtype=torch.uint8).to(device)
        begin, end = T * rank, T * (rank + 1)
        self.ids, self.targets = whole[:, begin:end].contiguous(), whole[:, begin + 1 : end + 1].contiguous()
        self.seen = whole[:, max(0, begin - self.model.tokenizer.receptive_field + 1) : end]

    def __call__(self) -> None:
        self.model.zero_grad()
        with self._autocast():
            loss = bits_per_byte(self.forward(self.ids), self.targets)
        loss.backward()

    def of_one_rank(self) -> None:
        """A step on the same bytes and all of the history before them: what all forms have to make of it, but for the mean over ranks."""
        self.model.zero_grad()
        with self._autocast():
            loss = bits_per_byte(self.forward(self.seen)[:, -self.ids.shape[1] :], self.targets)
        loss.backward()

    def results(self) -> dict[str, Tensor]:
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        return {name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone() for name, value in gradients.items()}  # type: ignore[union-attr]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda" and not self.sharded)


def _shard(model: ByteLM, mesh: DeviceMesh, blockwise: bool, device: torch.device) -> None:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    _, *others = model.tokenizer.blocks  # the first, the embedding and its norm may run as one op, and are sharded with the rest
    for module in (*(others if blockwise else ()), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def _check(steps: dict[str, Step]) -> None:
    """Raises where the gradients of a form are not those of one rank that has all bytes."""
    alone = steps[ALONE]
    alone.of_one_rank()
    wanted = alone.results()
    for value in wanted.values():
        summed = value.contiguous()
        dist.all_reduce(summed, group=alone.group)
        value.copy_(summed / dist.get_world_size(alone.group))
    for step in steps.values():
        if step is not alone:
            step()
            checked(step.results(), wanted, dict.fromkeys(wanted, GRADIENT_BOUND))


def _timed(steps: dict[str, Step], ranks: int, T: int, device: torch.device) -> Iterator[Row]:
    _check(steps)
    for name, us in _in_turns(dict(steps), EAGER_ROUNDS, EAGER_STEPS, EAGER_STEPS, device).items():
        yield Row(ranks, T, name, "launched", us)
    if device.type == "cuda":
        replays = _replays(steps)
        count = max(6, min(96, 3 * (1 << 19) // T))  # 60 ms from 16,384 bytes on; the tests have few
        for name, us in _in_turns(replays, ROUNDS, count, SETTLING * count // len(replays), device).items():
            yield Row(ranks, T, name, "replayed", us)


def _profiled(steps: dict[str, Step], ranks: int, T: int, device: torch.device) -> Iterator[Row]:
    for name, replay in _replays(steps).items():
        yield Row(ranks, T, name, "profiled", [], _profile(replay))


def _replays(steps: dict[str, Step]) -> dict[str, Callable[[], object]]:
    """The replay of each step as a captured graph, of those that can be one."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    replays: dict[str, Callable[[], object]] = {}
    for name, step in steps.items():
        try:
            replays[name] = _captured(step).replay
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    return replays


def _captured(step: Step) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Of this thread alone: NCCL's watchdog asks for its events meanwhile.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        step()
    return graph


def _in_turns(calls: dict[str, Callable[[], object]], rounds: int, count: int, first: int, device: torch.device) -> dict[str, list[float]]:
    """The median microseconds of a call of each, on every rank; a round is `count` of them, which begin on all ranks at once.

    A first one, of `first`, is not timed.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for calls_each in (first, *[count] * rounds):
        for name, call in calls.items():
            found[name].append(microseconds(call, calls_each, device))
    return {name: _gathered(statistics.median(values[1:])) for name, values in found.items()}


def microseconds(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Of a call, of `count` one after another, which begin on all ranks at once."""
    dist.barrier()
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) * 1e6 / count
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / count


def _profile(call: Callable[[], object]) -> list[Any]:
    """Of a step, on every rank. In a first one they wait for the last of them to profile."""
    dist.barrier()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(1 + PROFILED):
            call()
        torch.cuda.synchronize()
    return _gathered(Exchanged(*(value / PROFILED for value in after_the_first(profiler, 1 + PROFILED))))


def _gathered(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def bytes_sent(form: str, ranks: int, T: int, dim: int, itemsize: int) -> tuple[int, int]:
    """By all ranks in a step of one row: for the history, and for parameters and their gradients (in rings, as NCCL's are)."""
    where, _, mean = form.partition(", ")
    model, lengths = ByteLM(dim), (T,) * ranks
    parameters = sum(parameter.numel() for parameter in model.parameters())
    of_a_parameter = 0 if where == ALONE else 2 * itemsize + 4 if mean.startswith("FSDP2") else 8
    of_gradients = of_a_parameter * parameters * (ranks - 1)
    if where == STACK:
        return history_bytes(lengths, model.tokenizer.receptive_field - 1, 1), of_gradients
    histories = [(conv.kernel_size - 1) * conv.dilation for conv in model.modules() if isinstance(conv, CausalConv1d) and where != ALONE]
    return 2 * sum(history_bytes(lengths, history, dim * itemsize) for history in histories), of_gradients


if __name__ == "__main__":
    main()
