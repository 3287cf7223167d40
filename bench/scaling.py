"""`python3 -m bench.scaling`: what sequence parallel and the mean of the gradients cost a training step on 1 to 1,024 GPUs, as a table.

A model, not a measurement. Its terms: the times of the kernels as `tuning_cache/` has them, measured on one GPU; messages and collectives
within a host as bench.links measured them on 2 and 4 GPUs, on 8 by the same step again; InfiniBand as stated; the bytes, by the formula
that tests/test_distributed.py::test_bytes_sent holds against the messages. It is of the tokenizer's blocks alone: whatever else a model has
is computed without an exchange and raises the share.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from bench.results import FOLDER
from fuzzytok_kernels.distributed import history_bytes

TIMES = Path(__file__).parents[1] / "tuning_cache" / "sm90" / "nvidia_h100_80gb_hbm3"
DILATIONS, K, C = (1, 2, 4) * 3, 3, 256  # the paper's tokenizer, in bf16
KERNELS = {"fused": "gelu", "activation_grad": "gelu", "input_grad": "residual", "weight_grad": "none"}  # of a block, and their epilogues
GPUS, HOST = (2, 4, 8, 16, 64, 256, 1024), 8
STEPS, GOAL = 65536, 0.95


Points = list[tuple[float, float]]


def between(points: Points, x: float) -> float:
    """On the straight lines between points in order; before the first its value, for a launch takes that whatever it does."""
    if x <= points[0][0]:
        return points[0][1]
    (x0, y0), (x1, y1) = next((pair for pair in pairwise(points) if x <= pair[1][0]), points[-2:])
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


class Host:
    """Microseconds between the GPUs of a host by what is sent, as measured; the launch of NCCL's kernel is in them."""

    name = "NVLink 4, measured"

    def __init__(self) -> None:
        stored = json.loads((FOLDER / "nvidia_h100_80gb_hbm3" / "scaling.json").read_text(encoding="utf-8"))["links"]
        self._points: dict[tuple[str, int], Points] = {}
        for line in stored:
            self._points.setdefault((line["name"], line["ranks"]), []).append((line["bytes"], line["us"]))

    def message(self, size: float) -> float:
        return between(self._points["two messages", 2], size) / 2

    def collective(self, name: str, size: float, ranks: int) -> float:
        """Of `size` bytes in all. Eight ranks were not measured: from four to them it grows as from two to four."""
        if ranks == HOST:
            return 2 * self.collective(name, size, HOST // 2) - self.collective(name, size, HOST // 4)
        return between(self._points[name, ranks], size)


class Network(NamedTuple):
    """What is stated: `latency` microseconds a message, and its bytes at `bandwidth` a microsecond and direction."""

    name: str
    latency: float
    bandwidth: float

    def message(self, size: float) -> float:
        return self.latency + size / self.bandwidth

    def all_reduce(self, size: float, ranks: int) -> float:
        return 2 * (self.latency * math.ceil(math.log2(ranks)) + size * (ranks - 1) / ranks / self.bandwidth)


LINKS = Host(), Network("InfiniBand NDR, a port a GPU, stated", 25.0, 50e3)
PARAMETERS = len(DILATIONS) * (K * C * C + C)
MEMORY = 2.5e6  # bytes a microsecond that a copy reads and writes, stated
GAPS = 26.0  # us between kernels, where streams wait for one another, more where they exchange; fitted to the rows of 2 and 4 GPUs
FSDP = 46.0  # us: FSDP2's own kernels in a step, as one unit; measured
ANEW = 148.0  # us: a convolution's kernels for its history alone; measured at 65,536 steps, the shortest kernels' times gave 18


class Kernels:
    """Microseconds of each kernel of a block by the steps that it computes, between measured ones on a straight line."""

    def __init__(self) -> None:
        self._points = {op: sorted(_measured(op, epilogue)) for op, epilogue in KERNELS.items()}

    def time(self, op: str, steps: int) -> float:
        return between(self._points[op], steps)

    def forward(self, steps: int) -> float:
        return self.time("fused", steps)

    def backward(self, steps: int) -> float:
        return sum(self.time(op, steps) for op in KERNELS if op != "fused")

    def step(self, steps: int) -> float:
        """Forward and backward of the stack."""
        return len(DILATIONS) * (self.forward(steps) + self.backward(steps))


def _measured(op: str, epilogue: str) -> Points:
    stored = json.loads((TIMES / f"causal_conv1d_{op}.json").read_text(encoding="utf-8"))
    wanted = {"dtype": "bf16", "layout": "last", "aligned": True, "epilogue": epilogue, "kernel_size": K, "c_in": C, "c_out": C}
    return [(entry["steps"], entry["time_us"]) for entry in stored["entries"] if wanted.items() <= entry.items()]


# ---- microseconds that a step takes longer on several ranks than on one; a row of T steps on each


def once_a_stack(kernels: Kernels, link: Host | Network, T: int, receptive_field: int) -> float:
    """The bytes of the receptive field, one each, which all ranks wait for; its steps computed anew; z's gradient copied behind zeros."""
    history = receptive_field - 1
    sent = history_bytes((T, T), min(history, T), 1)  # by one rank, to its right
    copied = 2 * 2 * C * T / MEMORY
    return link.message(sent) + kernels.step(T + history) - kernels.step(T) + copied


def once_a_convolution(kernels: Kernels, link: Host | Network, T: int) -> float:
    """What of each history and its gradient is not hidden, and the kernels for the first steps: of two histories at most."""
    total = len(DILATIONS) * ANEW
    for dilation in DILATIONS:
        message = link.message(history_bytes((T, T), min((K - 1) * dilation, T), 2 * C))
        total += max(0.0, message - kernels.forward(T)) + max(0.0, message - kernels.backward(T))
    return total


def mean(kernels: Kernels, ranks: int, T: int) -> float:
    """Of the gradients in fp32: the first block's in a message at the end, those of all others in one beside the first block's backward.

    Across hosts each GPU sums its part of those of its own.
    """
    last = PARAMETERS // len(DILATIONS)
    beside = max(0.0, _all_reduce(4 * (PARAMETERS - last), ranks) - kernels.backward(T))
    return beside + _all_reduce(4 * last, ranks)


def _all_reduce(size: float, ranks: int) -> float:
    host, network = LINKS
    if ranks <= HOST:
        return host.collective("all-reduce", size, ranks)
    inside = sum(host.collective(name, size, HOST) for name in ("reduce-scatter", "all-gather"))
    return inside + network.all_reduce(size / HOST, ranks // HOST)


def fsdp(ranks: int) -> float:
    """All-gather of the parameters (bf16) and sum of their gradients (fp32), as one unit, of which nothing is hidden; and its own kernels.

    With a unit a block it hides nearly all of its messages, and took 465 us more on 2 GPUs: by its own kernels, and by the share of the GPU
    that NCCL's take. Parameters are sharded within a host and replicated across hosts: `fully_shard` on a mesh of two dimensions.
    """
    (host, network), inside = LINKS, min(ranks, HOST)
    gathered, summed = host.collective("all-gather", 2 * PARAMETERS, inside), host.collective("reduce-scatter", 4 * PARAMETERS, inside)
    return FSDP + gathered + summed + (network.all_reduce(4 * PARAMETERS / HOST, ranks // HOST) if ranks > HOST else 0.0)


def with_gradients(kernels: Kernels, link: Host | Network, T: int, receptive_field: int, cost: Callable[[int], float]) -> float:
    """One exchange a stack and what the gradients cost, by T."""
    return once_a_stack(kernels, link, T, receptive_field) + cost(T) + GAPS


def shortest(kernels: Kernels, extra: Callable[[int], float]) -> int:
    """The fewest steps a rank from which on the efficiency is GOAL; `extra(T)` is what a step takes longer."""
    below = [T for T in range(256, 1 << 20, 256) if kernels.step(T) / (kernels.step(T) + extra(T)) < GOAL]
    return max(below, default=0) + 256


def main() -> None:
    kernels = Kernels()
    field = 1 + sum((K - 1) * dilation for dilation in DILATIONS)
    alone = kernels.step(STEPS)
    print(f"{len(DILATIONS)} blocks, C={C}, K={K}, bf16, a row of {STEPS:,} bytes a rank: {alone:,.0f} us of kernels in a training step.")
    for link in LINKS:
        print(f"{link.name}: {link.message(0):.0f} us a message.")
    goal = f"steps a rank for {GOAL:.0%}"
    print(f"\n| GPUs | exchange: one a stack | one a convolution | mean of gradients | efficiency | {goal} ", end="")
    print(f"| FSDP2 instead | efficiency | {goal} |\n|{'---|' * 9}")
    print("| 1 | 0 us | 0 us | 0 us | 100.0% | any | 0 us | 100.0% | any |")
    for ranks in GPUS:
        link = LINKS[ranks > HOST]
        stack, each = once_a_stack(kernels, link, STEPS, field), once_a_convolution(kernels, link, STEPS)
        print(f"| {ranks:,} | {stack:.0f} us | {each:.0f} us ", end="")
        for cost in (partial(mean, kernels), lambda ranks, T: fsdp(ranks)):
            extra = partial(with_gradients, kernels, link, receptive_field=field, cost=partial(cost, ranks))
            share = alone / (alone + extra(STEPS))
            print(f"| {cost(ranks, STEPS):.0f} us | {share:.1%} | {shortest(kernels, extra):,} ", end="")
        print("|")
    print()
    for link in LINKS:
        each = once_a_convolution(kernels, link, STEPS)
        most = max(n for n in range(1, 1 << 16, 64) if once_a_stack(kernels, link, STEPS, n) <= each)
        print(f"{link.name}: one exchange a stack is the faster up to a receptive field of {most:,} steps, divided by the rows of a batch.")


if __name__ == "__main__":
    main()
