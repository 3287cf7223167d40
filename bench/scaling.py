"""`python -m bench.scaling`: what sequence parallel and FSDP2 cost a training step on 1 to 1,024 GPUs, as a table.

A model, not a measurement. Its terms: the times of the kernels as `tuning_cache/` has them, measured on one GPU; the bytes, by the formula
that tests/test_distributed.py::test_bytes_sent holds against the messages; bandwidth and latency of the links, which are stated (`LINKS`)
and not measured. It is of the tokenizer's blocks alone: whatever else a model has is computed without an exchange and raises the share.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from fuzzytok_kernels.distributed import history_bytes

TIMES = Path(__file__).parents[1] / "tuning_cache" / "sm90" / "nvidia_h100_80gb_hbm3"
DILATIONS, K, C = (1, 2, 4) * 3, 3, 256  # the paper's tokenizer, in bf16
KERNELS = {"fused": "gelu", "activation_grad": "gelu", "input_grad": "residual", "weight_grad": "none"}  # of a block, and their epilogues
GPUS, HOST = (2, 4, 8, 16, 64, 256, 1024), 8
STEPS, GOAL = 65536, 0.95


class Link(NamedTuple):
    """What a message takes: `latency` microseconds, kernel launch included, and its bytes at `bandwidth` a microsecond and direction."""

    name: str
    latency: float
    bandwidth: float

    def message(self, size: float) -> float:
        return self.latency + size / self.bandwidth

    def collective(self, size: float, ranks: int) -> float:
        """An all-gather or reduce-scatter of `size` bytes in all."""
        return self.latency * math.ceil(math.log2(ranks)) + size * (ranks - 1) / ranks / self.bandwidth


LINKS = Link("NVLink 4", 10.0, 450e3), Link("InfiniBand NDR, a port a GPU", 25.0, 50e3)


class Kernels:
    """Microseconds of each kernel of a block by the steps that it computes, between measured ones on a straight line."""

    def __init__(self) -> None:
        self._points = {op: sorted(_measured(op, epilogue)) for op, epilogue in KERNELS.items()}

    def time(self, op: str, steps: int) -> float:
        points = self._points[op]
        if steps <= points[0][0]:
            return points[0][1]  # a launch, whatever it computes
        (x0, y0), (x1, y1) = next((pair for pair in pairwise(points) if steps <= pair[1][0]), points[-2:])
        return y0 + (y1 - y0) * (steps - x0) / (x1 - x0)

    def forward(self, steps: int) -> float:
        return self.time("fused", steps)

    def backward(self, steps: int) -> float:
        return sum(self.time(op, steps) for op in KERNELS if op != "fused")

    def step(self, steps: int) -> float:
        """Forward and backward of the stack."""
        return len(DILATIONS) * (self.forward(steps) + self.backward(steps))


def _measured(op: str, epilogue: str) -> list[tuple[int, float]]:
    stored = json.loads((TIMES / f"causal_conv1d_{op}.json").read_text(encoding="utf-8"))
    wanted = {"dtype": "bf16", "layout": "last", "aligned": True, "epilogue": epilogue, "kernel_size": K, "c_in": C, "c_out": C}
    return [(entry["steps"], entry["time_us"]) for entry in stored["entries"] if wanted.items() <= entry.items()]


# ---- microseconds that a step takes longer on several ranks than on one; a row of T steps on each


def once_a_stack(kernels: Kernels, link: Link, T: int, receptive_field: int) -> float:
    """The bytes of the receptive field, one each, which all ranks wait for; and its steps computed anew."""
    history = receptive_field - 1
    sent = history_bytes((T, T), min(history, T), 1)  # by one rank, to its right
    return link.message(sent) + kernels.step(T + history) - kernels.step(T)


def once_a_convolution(kernels: Kernels, link: Link, T: int) -> float:
    """What of each history and its gradient is not hidden, and the first steps computed again: kernels as short as there are."""
    total = 0.0
    for dilation in DILATIONS:
        message = link.message(history_bytes((T, T), min((K - 1) * dilation, T), 2 * C))
        total += max(0.0, message - kernels.forward(T)) + max(0.0, message - kernels.backward(T))
        total += kernels.forward(0) + kernels.backward(0) + kernels.time("weight_grad", 0)
    return total


def fsdp(kernels: Kernels, T: int, ranks: int) -> tuple[float, int]:
    """What of the all-gathers (bf16) and sums of gradients (fp32) is not hidden, with as many blocks in a unit as hide most: and how many.

    Parameters are sharded within a host and replicated across hosts: `fully_shard` on a mesh of two dimensions.
    """
    (inside, hosts), blocks = (min(ranks, HOST), max(1, ranks // HOST)), len(DILATIONS)
    best = math.inf, 0
    for units in (9, 3, 1):
        count = blocks // units
        parameters = count * (K * C * C + C)
        gather = LINKS[0].collective(2 * parameters, inside)
        summed = LINKS[0].collective(4 * parameters, inside) + 2 * LINKS[1].collective(4 * parameters / inside, hosts)
        left = max(0.0, gather - count * kernels.forward(T)) + max(0.0, gather + summed - count * kernels.backward(T))
        best = min(best, (gather + summed + (units - 1) * left, count))  # the first and the last have nothing to hide behind
    return best


def _stack_and_fsdp(kernels: Kernels, link: Link, T: int, ranks: int, receptive_field: int) -> float:
    return once_a_stack(kernels, link, T, receptive_field) + fsdp(kernels, T, ranks)[0]


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
        print(f"{link.name}, stated: {link.latency:.0f} us a message, {link.bandwidth / 1e3:.0f} GB/s a direction.")
    goal = f"steps a rank for {GOAL:.0%}"
    print(f"\n| GPUs | exchange: one a stack | one a convolution | efficiency | {goal} ", end="")
    print(f"| FSDP2, not hidden | blocks a unit | efficiency with it | {goal} |\n|{'---|' * 9}")
    print(f"| 1 | 0 us | 0 us | 100.0% | any | 0 us | {len(DILATIONS)} | 100.0% | any |")
    for ranks in GPUS:
        link = LINKS[ranks > HOST]
        stack, each = once_a_stack(kernels, link, STEPS, field), once_a_convolution(kernels, link, STEPS)
        sharded, blocks = fsdp(kernels, STEPS, ranks)
        least = shortest(kernels, partial(once_a_stack, kernels, link, receptive_field=field))
        both = shortest(kernels, partial(_stack_and_fsdp, kernels, link, ranks=ranks, receptive_field=field))
        print(
            f"| {ranks:,} | {stack:.0f} us | {each:.0f} us | {alone / (alone + stack):.1%} | {least:,} "
            f"| {sharded:.0f} us | {blocks} | {alone / (alone + stack + sharded):.1%} | {both:,} |"
        )
    print()
    for link in LINKS:
        each = once_a_convolution(kernels, link, STEPS)
        most = max(n for n in range(1, 1 << 16, 64) if once_a_stack(kernels, link, STEPS, n) <= each)
        print(f"{link.name}: one exchange a stack is the faster up to a receptive field of {most:,} steps, divided by the rows of a batch.")


if __name__ == "__main__":
    main()
