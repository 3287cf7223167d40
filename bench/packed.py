"""`python -m bench.packed`: packed batches beside dense ones of as many tokens, in one run; each is checked before it is timed."""

import statistics
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure import DEVICE, Round, checked
from fuzzytok_kernels import causal_conv1d
from fuzzytok_kernels.tuning import timer

CHANNELS, K, DILATION = (256, 3, 4) if DEVICE == "cuda" else (32, 3, 4)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BARS = {512: 1.20, 4096: 1.03}  # packed over dense, by the mean length
# Tokens and mean lengths. Of the larger batch a GPU takes 16 rounds of tiles, of the smaller 4: what is lost by a round more shows there.
CASES = ((65_536, 128), (65_536, 512), (65_536, 4096), (262_144, 512), (262_144, 4096)) if DEVICE == "cuda" else ((2_048, 128),)
ROUNDS = 15
KINDS = {"plain": None, "gelu + residual": "gelu"}
_BOUND = 1e-2  # of a relative error in the L2 norm: a few roundings of bf16


class Batch(NamedTuple):
    """Random tensors, and where the sequences of x (B, C, T) lie, if not a row each."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    grad_y: Tensor
    cu_seqlens: Tensor | None


class Call:
    """One call of a kind on a batch of its own; it keeps its results, so that no two calls' memory is shared."""

    def __init__(self, batch: Batch, activation: str | None, backward: bool) -> None:
        self.batch, self.activation, self.backward = batch, activation, backward
        self.results: tuple[Tensor, ...] = ()

    def __call__(self) -> None:
        x, weight, bias, grad_y, cu_seqlens = self.batch
        leaves = [value.detach().requires_grad_(self.backward) for value in (x, weight, bias)]
        residual = leaves[0] if self.activation else None
        y: Tensor = causal_conv1d(*leaves, dilation=DILATION, activation=self.activation, residual=residual, cu_seqlens=cu_seqlens)
        self.results = (y, *torch.autograd.grad(y, leaves, grad_y)) if self.backward else (y,)


def main() -> None:
    """Print a markdown table with a row for each batch, kind and pass, then its bars."""
    print(f"C={CHANNELS}, K={K}, d={DILATION}, {str(DTYPE).removeprefix('torch.')}, channels-last, on {_device()}\n")
    print("| tokens | mean length | block | pass | dense, us | equal lengths packed, us | unequal packed, us | packed / dense | bar |")
    print("|---|---|---|---|---|---|---|---|---|")
    missed = 0
    for tokens, length in CASES:
        bar = BARS.get(length)
        for kind, activation in KINDS.items():
            for backward in (False, True):
                dense, equal, unequal = _times(tokens, length, activation, backward)
                ratio = max(equal, unequal) / dense
                verdict = ""
                if bar is not None and DEVICE == "cuda":
                    missed += ratio > bar
                    verdict = f"{bar:.2f} {'met' if ratio <= bar else 'MISSED'}"
                name = "forward + backward" if backward else "forward"
                times = f"{dense:.1f} | {equal:.1f} | {unequal:.1f} | {ratio:.3f}"
                print(f"| {tokens} | {length} | {kind} | {name} | {times} | {verdict} |", flush=True)
    print(f"\n{missed} bars missed")


def _times(tokens: int, length: int, activation: str | None, backward: bool) -> Iterator[float]:
    """Microseconds of the dense batch, and of as many tokens in sequences of equal and of random lengths: rounds in turn."""
    N = tokens // length
    equal = torch.full((N,), length)
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(N))[: N - 1].sort().values + 1
    unequal = torch.tensor([0, *cuts.tolist(), tokens]).diff()
    rounds = []
    for lengths in (None, equal, unequal):
        calls = [Call(batch, activation, backward) for batch in _batches(tokens, N, lengths)]
        calls[0]()
        _check(calls[0])
        rounds.append(Round(calls))  # type: ignore[arg-type]
    for _ in range(ROUNDS if DEVICE == "cuda" else 2):
        for each in rounds:
            each()
    return (statistics.median(each.milliseconds) * 1e3 / len(each.calls) for each in rounds)


def _batches(tokens: int, N: int, lengths: Tensor | None) -> Iterator[Batch]:
    size = torch.empty(0, dtype=DTYPE).element_size()
    for _ in range(max(2, -(-timer.COLD_BYTES // (2 * tokens * CHANNELS * size))) if DEVICE == "cuda" else 2):
        shape = (N, tokens // N, CHANNELS) if lengths is None else (1, tokens, CHANNELS)
        x, grad_y = (torch.randn(shape, device=DEVICE, dtype=DTYPE).mT for _ in range(2))
        weight = (torch.randn(K, CHANNELS, CHANNELS, device=DEVICE, dtype=DTYPE) / (K * CHANNELS) ** 0.5).permute(1, 2, 0)
        cu_seqlens = None if lengths is None else torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32, device=DEVICE)
        yield Batch(x, weight, torch.randn(CHANNELS, device=DEVICE, dtype=DTYPE), grad_y, cu_seqlens)


def _check(call: Call) -> None:
    """The first call's y and grad_x against those of dense calls, a sequence each, in fp64 on the CPU, for the first few sequences.

    The weight's gradient, a sum over all, against PyTorch's products over all steps, where no activation comes between.
    """
    x, weight, bias, grad_y = (value.cpu() for value in call.batch[:4])
    cu_seqlens = torch.tensor([0, x.shape[2]]) if call.batch.cu_seqlens is None else call.batch.cu_seqlens.cpu()
    results = {name: value.detach() for name, value in zip(("y", "grad_x", "grad_weight", "grad_bias"), call.results, strict=False)}
    got, wanted = {}, {}
    for n, (start, end) in enumerate(pairwise(cu_seqlens[:4].tolist())):
        leaf = x[:1, :, start:end].double().requires_grad_()
        y = _dense(leaf, weight.double(), bias.double(), call.activation)
        (gradient,) = torch.autograd.grad(y, leaf, grad_y[:1, :, start:end].double())
        for name, value in (("y", y.detach()), ("grad_x", gradient)):
            if name in results and end > start:
                got[f"{name} {n}"], wanted[f"{name} {n}"] = results[name][:1, :, start:end].cpu(), value
    if call.backward and call.activation is None:
        steps = torch.arange(x.shape[2])
        begins = cu_seqlens[torch.searchsorted(cu_seqlens, steps, right=True) - 1]
        for k in range(K):
            seen = (steps - k * DILATION >= begins).to(call.batch.x.device)
            rows = call.batch.x.roll(k * DILATION, 2) * seen
            got[f"grad_weight {k}"] = results["grad_weight"][:, :, k].cpu()
            wanted[f"grad_weight {k}"] = torch.einsum("bot,bct->oc", call.batch.grad_y.float(), rows.float()).double().cpu()
    checked(got, wanted, dict.fromkeys(wanted, _BOUND))


def _dense(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> Tensor:
    result: Tensor = causal_conv1d(x, weight, bias, dilation=DILATION, activation=activation, residual=x if activation else None)
    return result


def _device() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "the CPU, which says nothing of a GPU"


if __name__ == "__main__":
    main()
