"""`python -m fuzzytok_kernels.tuning.matrix`: compile every kernel and shipped config for every supported GPU, without having it.

Prints a table, and below it each config that breaks a rule: it compiles; its shared memory fits; its local memory is within a budget; its
products run on the tensor cores, and no register is loaded anew that one still reads. Exit status 1 if any does. Turing is in the table to
show why the package leaves it to PyTorch.

The budget is 32 bytes a thread under the Triton that a GPU's files were made with, which is no spill in a loop, and under another 512: each
version gives out registers in its own way, which costs time and never results.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fuzzytok_kernels import byte_launch, launch
from fuzzytok_kernels.private_triton import GPUTarget
from fuzzytok_kernels.streaming import launch as streaming
from fuzzytok_kernels.tuning.compile import Resources, resources_of
from fuzzytok_kernels.tuning.gpu import Gpu, versions
from fuzzytok_kernels.tuning.lookup import shipped_folder
from fuzzytok_kernels.tuning.measure import Job
from fuzzytok_kernels.tuning.space import OPS, Config, default_config
from fuzzytok_kernels.tuning.store import header, path_of, read
from fuzzytok_kernels.tuning.tuner import compilers, job_of, target_of
from fuzzytok_kernels.tuning.warmup import default_jobs
from fuzzytok_kernels.tuning.worker import WorkerError, pool

LEFT_OUT = Gpu("the paper's T4", "sm75", 40, 65_536)
_BUDGET, _BUDGET_ELSEWHERE = 32, 512  # bytes of local memory a thread; see Resources.spills for the first
_WITHOUT_FILES = (LEFT_OUT, Gpu("generic", "gfx90a", 208, 65_536))


class Row(NamedTuple):
    """What the configs of one GPU take, and what is wrong with them."""

    gpu: Gpu
    used: list[Resources]
    faults: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if any config breaks a rule, else 0."""
    parser = argparse.ArgumentParser(prog="python -m fuzzytok_kernels.tuning.matrix", description=__doc__)
    parser.add_argument("--most", type=int, help="configs a GPU, spread over all that there are (default: all)")
    most = parser.parse_args(arguments).most
    rows = [_compiled(gpu, _spread(sorted(_launches(gpu)), most)) for gpu in sorted(gpus(), key=_age)]
    print(_table(rows))
    faults = [f"{row.gpu.arch} {fault}" for row in rows for fault in row.faults]
    print("\n".join(faults or [f"{sum(len(row.used) for row in rows)} configs compiled, none breaks a rule"]))
    return 1 if faults else 0


def gpus() -> set[Gpu]:
    """Those with shipped files, and those supported without."""
    return {header(path)[0] for path in shipped_folder().glob("*/*/*.json")} | {*_WITHOUT_FILES}


def _launches(gpu: Gpu) -> set[tuple[Job, Config]]:
    """What may run on `gpu`: what its files say of their problems, and the default for those of the common list.

    One of all that compile to the same kernels: neither of those knows a size, but for whether it is a multiple of 16.
    """
    entries = [entry for op in OPS for entry in read(path_of(shipped_folder(), gpu, op), gpu, op)[0]]
    launches = [(job_of(entry.problem), entry.config) for entry in entries]
    launches += [(job, default_config(job.problem)) for job in default_jobs(gpu.descriptors)]
    distinct = {}
    for job, config in launches:
        problem = job.problem
        distinct[problem[:6], problem.c_in % 16, problem.c_out % 16, job.T % 16, config] = job, config
    return set(distinct.values())


def _spread(launches: list[tuple[Job, Config]], most: int | None) -> list[tuple[Job, Config]]:
    """At most `most` of them, evenly: they are sorted by op, dtype, layout and epilogue, so that each of these has its share."""
    step = max(1.0, len(launches) / most) if most else 1.0
    return [launches[int(i * step)] for i in range(round(len(launches) / step))]


def untuned(name: str, target: GPUTarget) -> Resources:
    """What one of UNTUNED takes. In a process of its own, see `compile.resources`."""
    return resources_of(UNTUNED[name], target)


def _packed() -> None:
    weight = _weight(64, 64)
    for T in (64, 4096):  # through pointers, and descriptors where there are any
        x, boundaries = torch.zeros(1, T, 64, dtype=torch.bfloat16).mT, torch.tensor([0, 20, T], dtype=torch.int32)
        launch.causal_conv1d_fused(x, weight, None, x, None, boundaries, 1, "gelu")
        launch.causal_conv1d_activation_grad(x, x, weight, None, None, boundaries, 1, "gelu")
        launch.causal_conv1d_input_grad(x, weight, 1, x, boundaries)
        launch.causal_conv1d_weight_grad(x, x, 3, 1, boundaries)


def _stateful() -> None:
    weight, state = _weight(64, 64), torch.zeros(1, 64, 2, dtype=torch.bfloat16)
    for T in (64, 4096):  # through pointers, and descriptors where there are any
        launch.causal_conv1d_fused(torch.zeros(1, T, 64, dtype=torch.bfloat16).mT, weight, None, None, state, None, 1, "silu")


def _bytes() -> None:
    ids, embedding, weight = torch.zeros(1, 64, dtype=torch.uint8), torch.zeros(256, 64, dtype=torch.bfloat16), _weight(64, 64)
    byte_launch.byte_causal_conv1d(ids, embedding, weight, None, 1, "gelu")
    byte_launch.byte_causal_conv1d_grad(_sequence(64), ids, embedding, weight, None, 1, "gelu")


def _streams() -> None:
    x, weight, bias, state = (
        _sequence(64),
        _weight(64, 64),
        torch.zeros(64, dtype=torch.bfloat16),
        torch.zeros(1, 2, 64, dtype=torch.bfloat16),
    )
    streaming.causal_conv1d_update(x, state.mT, weight, bias, x, torch.zeros(1, dtype=torch.int64), None, 1, "gelu")
    positions = torch.zeros(1, dtype=torch.int64)
    streaming.residual_stack_update(x[:, :, :1], state, positions, None, [weight], [bias], [1], "gelu")


def _sequence(channels: int) -> Tensor:
    return torch.zeros(1, 64, channels, dtype=torch.bfloat16).mT


def _weight(c_out: int, c_in: int) -> Tensor:
    return torch.zeros(3, c_out, c_in, dtype=torch.bfloat16).permute(1, 2, 0)


# What no problem of the tuner stands for.
UNTUNED: dict[str, Callable[[], None]] = {
    "packed batches": _packed,
    "initial states": _stateful,
    "look-ups by byte": _bytes,
    "streams": _streams,
}


def _compiled(gpu: Gpu, launches: Iterable[tuple[Job, Config]]) -> Row:
    row = Row(gpu, [], [])
    budget = _budget(gpu)
    with compilers(gpu, spared=0) as compile, pool("fuzzytok_kernels.tuning.matrix:untuned", 1) as submit:
        futures = [(f"{job.problem} with {config}", compile(job, config)) for job, config in launches]
        futures += [(name, submit(name, target_of(gpu))) for name in UNTUNED]
        for name, future in tqdm(futures, desc=gpu.arch):
            try:
                used = future.result()
            except WorkerError as error:
                row.faults.append(f"does not compile ({error}): {name}")
                continue
            row.used.append(used)
            row.faults.extend(f"{fault}: {name}" for fault in _faults(used, gpu, budget))
    return row


def _budget(gpu: Gpu) -> int:
    made_with = {header(path)[1].get("triton") for op in OPS if (path := path_of(shipped_folder(), gpu, op)).exists()}
    return _BUDGET if versions()["triton"] in made_with else _BUDGET_ELSEWHERE


def _faults(used: Resources, gpu: Gpu, budget: int) -> list[str]:
    if gpu == LEFT_OUT:
        return [f"has {used.products}, so that it need not be left out"] if used.products else []
    faults = []
    if used.shared > gpu.shared_memory:
        faults.append(f"{used.shared:,} bytes of shared memory, where there are {gpu.shared_memory:,}")
    if used.local > budget:
        faults.append(f"{used.local} bytes of local memory")
    if not used.products:
        faults.append("no product on the tensor cores")
    if used.overwrites:
        faults.append("registers loaded anew while a product may still read them")
    if used.serialized:
        faults.append("a call, as of an assertion, around which each product waits for the last")
    return faults


def _table(rows: Iterable[Row]) -> str:
    lines = [
        f"| triton {versions()['triton']} | configs | shared memory, of | registers | local memory | products |",
        "|---|---|---|---|---|---|",
    ]
    for gpu, used, _ in rows:
        counts = {name: sum(each.products == name for each in used) for name in sorted({each.products for each in used}, reverse=True)}
        products = ", ".join(f"{name or 'none: PyTorch runs there'} {count}" for name, count in counts.items())
        shared, registers, local, *_ = map(max, zip(*used, strict=True)) if used else (0, 0, 0)
        lines.append(f"| {gpu.arch} {gpu.name} | {len(used)} | {shared:,} of {gpu.shared_memory:,} | {registers} | {local} | {products} |")
    return "\n".join(lines)


def _age(gpu: Gpu) -> tuple:
    """NVIDIA's first, the oldest first."""
    return not gpu.arch.startswith("sm"), int(gpu.arch[2:]) if gpu.arch.startswith("sm") else 0, gpu.arch, gpu.name


if __name__ == "__main__":
    raise SystemExit(main())
