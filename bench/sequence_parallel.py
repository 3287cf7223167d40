"""`torchrun --nproc-per-node N -m bench.sequence_parallel`: a training step of FuzzyTokenizer on a row that N ranks share, measured.

Weak scaling: every rank holds as many bytes, and the step of one rank that exchanges nothing is what the others are held against, so that
its time and theirs are taken in turns in one run. Each form is checked first: z of all ranks is that of one.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from fuzzytok_kernels import CausalConv1d, FuzzyTokenizer
from fuzzytok_kernels.distributed import TimeParallel, history_bytes

PLANS = {"one a stack": lambda: TimeParallel(), "one a convolution": lambda: {"blocks.*.conv": TimeParallel()}}
ALONE = "none"
ROUNDS, WARM_UP = 15, 3


def main() -> None:
    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # which nothing here changes in place
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[2048, 16384, 65536] if on_gpu else [512, 4096], help="bytes a rank")
    parser.add_argument("--dim", type=int, default=256 if on_gpu else 64)
    options = parser.parse_args()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    for line in table(options.steps, options.dim, torch.device("cuda" if on_gpu else "cpu")):
        if dist.get_rank() == 0:
            print(line, flush=True)
    dist.destroy_process_group()


def table(steps: Sequence[int], dim: int, device: torch.device) -> Iterator[str]:
    """Its lines, on every rank."""
    dtype, ranks = torch.bfloat16 if device.type == "cuda" else torch.float32, dist.get_world_size()
    forms = {ALONE: _tokenizer(dim, device, dtype, None, False)}
    for name, plan in PLANS.items():
        forms |= {f"{name}{', FSDP2' * sharded}": _tokenizer(dim, device, dtype, plan(), sharded) for sharded in (False, True)}
    yield f"| bytes a rank, {ranks} ranks | exchange | ms a step | bytes/s | efficiency | bytes sent |\n|{'---|' * 6}"
    for T in steps:
        _check(forms, T, device)
        times = _times(forms, T, device)
        for name, seconds in times.items():
            cells = f"{seconds * 1e3:.3f}", f"{ranks * T / seconds / 1e6:.2f} M", f"{times[ALONE] / seconds:.1%}"
            yield f"| {T:,} | {name} | {' | '.join(cells)} | {_bytes_sent(forms[name], name, T, dtype):,} |"


def _tokenizer(dim: int, device: torch.device, dtype: torch.dtype, plan: object, sharded: bool) -> FuzzyTokenizer:
    torch.manual_seed(0)
    tokenizer = FuzzyTokenizer(dim)
    tokenizer.load_state_dict({name: value.contiguous() for name, value in tokenizer.state_dict().items()}, assign=True)
    tokenizer = tokenizer.to(device, dtype)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    if plan is not None:
        parallelize_module(tokenizer, mesh, plan)  # type: ignore[arg-type]
    if sharded:
        _, *others = tokenizer.blocks  # the first, the embedding and its norm may run as one op, and are sharded with the rest
        for module in (*others, tokenizer):
            fully_shard(module, mesh=mesh)
    return tokenizer


def _ids(T: int, device: torch.device) -> Tensor:
    """This rank's bytes of the row."""
    generator = torch.Generator().manual_seed(T)
    whole = torch.randint(256, (1, T * dist.get_world_size()), generator=generator, dtype=torch.uint8)
    return whole[:, T * dist.get_rank() : T * (dist.get_rank() + 1)].to(device)


@torch.no_grad()
def _check(forms: dict[str, FuzzyTokenizer], T: int, device: torch.device) -> None:
    """On the last rank's bytes and all of the history before them, against the form that has them all. Raises where they differ."""
    mine = _ids(T, device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    field = forms[ALONE].receptive_field
    seen = torch.cat(parts[: dist.get_rank() + 1], 1)[:, -(T + field - 1) :]
    wanted = forms[ALONE](seen)[:, -T:]
    for name, form in forms.items():
        if name != ALONE:
            torch.testing.assert_close(form(mine), wanted, rtol=2e-2, atol=2e-2, msg=f"{name}: z is not that of one rank")


def _times(forms: dict[str, FuzzyTokenizer], T: int, device: torch.device) -> dict[str, float]:
    """Median seconds of a step of each, in turns; a step begins on all ranks at once and ends with the last."""
    ids = _ids(T, device)
    rounds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(WARM_UP + ROUNDS):
        for name, form in forms.items():
            rounds[name].append(_seconds(partial(_step, form, ids), device))
    return {name: statistics.median(values[WARM_UP:]) for name, values in rounds.items()}


def _step(form: nn.Module, ids: Tensor) -> None:
    z = form(ids)
    z.backward(torch.ones_like(z))
    form.zero_grad()


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    def finish() -> None:
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()

    finish()
    begin = time.perf_counter()
    call()
    finish()
    return time.perf_counter() - begin


def _bytes_sent(form: FuzzyTokenizer, name: str, T: int, dtype: torch.dtype) -> int:
    """By all ranks in a step."""
    lengths = (T,) * dist.get_world_size()
    if name == ALONE:
        return 0
    if name.startswith("one a stack"):
        return history_bytes(lengths, form.receptive_field - 1, 1)
    histories = [(conv.kernel_size - 1) * conv.dilation for conv in form.modules() if isinstance(conv, CausalConv1d)]
    a_step = form.embedding.embedding_dim * dtype.itemsize
    return 2 * sum(history_bytes(lengths, history, a_step) for history in histories)


if __name__ == "__main__":
    main()
