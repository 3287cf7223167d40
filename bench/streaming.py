"""`python3 -m bench.streaming`: a step of the tokenizer on its streaming state, against the same step in PyTorch; prints its bars."""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import checked
from fuzzytok_kernels import CausalConv1d, FuzzyTokenizer, StreamState, causal_conv1d, causal_conv1d_update
from fuzzytok_kernels.tuning import timer

BATCHES = (1, 8, 64)
BARS = {1: 30.0, 64: 40.0}  # microseconds a step
_FASTER, _FLAT = 2.5, 1.05
_REPLAYS, _ROUNDS = 40, 15
_BOUND = 2e-2  # of the relative error of z in bf16 after nine layers, which PyTorch's own forms come near


def convolutions(tokenizer: FuzzyTokenizer) -> list[CausalConv1d]:
    """One a block."""
    return [module for module in tokenizer.modules() if isinstance(module, CausalConv1d)]


class Padded:
    """A step as people write it today: each block's last inputs, oldest first, with the new one behind, through F.conv1d."""

    def __init__(self, tokenizer: FuzzyTokenizer, batch: int) -> None:
        self.tokenizer = tokenizer
        convs: list[Any] = [conv.to_conv1d() for conv in convolutions(tokenizer)]
        self.layers = [(conv.weight.detach(), conv.bias.detach(), conv.dilation[0]) for conv in convs]
        self.states = [w.new_zeros(batch, w.shape[1], (w.shape[2] - 1) * d) for w, _, d in self.layers]

    def __call__(self, ids: Tensor) -> Tensor:
        h = self.tokenizer.norm(self.tokenizer.embedding(ids.long())).mT  # (B, C, 1)
        for state, (weight, bias, dilation) in zip(self.states, self.layers, strict=True):
            known = torch.cat([state, h], 2)
            state.copy_(known[:, :, 1:])
            h = h + F.gelu(F.conv1d(known, weight, bias, dilation=dilation))
        return h.mT


class Ring:
    """The best form in PyTorch that we know: circular states, the taps side by side, one product a block with a weight packed before."""

    def __init__(self, tokenizer: FuzzyTokenizer, batch: int) -> None:
        self.tokenizer = tokenizer
        convs: list[Any] = convolutions(tokenizer)
        self.layers = [(conv.weight.permute(2, 1, 0).flatten(0, 1).contiguous(), conv.bias) for conv in convs]  # (K * C_in, C_out)
        weight = tokenizer.embedding.weight
        lengths = [(conv.kernel_size - 1) * conv.dilation for conv in convs]
        self.states = [weight.new_zeros(length, batch, weight.shape[1]) for length in lengths]
        self.position = torch.zeros((), dtype=torch.long, device=weight.device)
        self.shifts = [-conv.dilation * torch.arange(1, conv.kernel_size, device=weight.device) for conv in convs]  # (K - 1,) each

    def __call__(self, ids: Tensor) -> Tensor:
        h = self.tokenizer.norm(self.tokenizer.embedding(ids.long()))[:, 0]  # (B, C)
        for state, shifts, (weight, bias) in zip(self.states, self.shifts, self.layers, strict=True):
            taps = torch.cat([h[None], state[(self.position + shifts) % len(state)]])  # (K, B, C)
            state.index_copy_(0, (self.position % len(state))[None], h[None])
            h = h + F.gelu(torch.addmm(bias, taps.transpose(0, 1).flatten(1), weight))
        self.position += 1
        return h[:, None]


class Ours:
    """`FuzzyTokenizer.step`."""

    def __init__(self, tokenizer: FuzzyTokenizer, batch: int) -> None:
        self.tokenizer, self.state = tokenizer, tokenizer.init_state(batch)

    def __call__(self, ids: Tensor) -> Tensor:
        return self.tokenizer.step(ids, self.state)


class Step(NamedTuple):
    """Microseconds of a step."""

    replayed: float  # in a graph of its own, one replay behind the other
    together: float  # many steps in one graph


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(prog="bench.streaming", description=__doc__)
    parser.add_argument("--compiled", action="store_true", help="race the PyTorch forms under torch.compile too: a minute more")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("bench.streaming: speed is measured on a GPU, and there is none")
    tokenizer = FuzzyTokenizer().to("cuda", torch.bfloat16)
    forms: dict[str, Callable] = {"ours": Ours, "PyTorch, oldest first, F.conv1d": Padded, "PyTorch, circular, packed product": Ring}
    if options.compiled:
        forms |= {f"{name}, compiled": compiled(form) for name, form in list(forms.items())[1:]}
    with torch.no_grad():
        for batch in BATCHES:
            for name, form in forms.items():
                print(f"checked: B={batch}, {name}: relative error {error(tokenizer, form, batch):.1e}", file=sys.stderr, flush=True)
        steps = {batch: {name: measure(form(tokenizer, batch), batch) for name, form in forms.items()} for batch in BATCHES}
        print("\n".join([*step_table(steps), "", *bars(tokenizer, steps, flatness(tokenizer)), "", *others(tokenizer)]))


def compiled(form: Callable) -> Callable:
    """`form` with its call compiled by Inductor."""

    def make(tokenizer: FuzzyTokenizer, batch: int) -> Callable:
        step = form(tokenizer, batch)
        return torch.compile(lambda ids: step(ids))

    return make


def error(tokenizer: FuzzyTokenizer, form: Callable, batch: int, steps: int = 60) -> float:
    """The relative error of z over `steps` steps, beyond the receptive field, against forward in fp64; WrongResultError if too large."""
    ids = torch.randint(256, (batch, steps), dtype=torch.uint8, device=tokenizer.embedding.weight.device)
    step = form(tokenizer, batch)
    got = torch.cat([step(ids[:, t : t + 1]).clone() for t in range(steps)], 1)
    exact = FuzzyTokenizer(tokenizer.embedding.embedding_dim).double()
    exact.load_state_dict({name: value.cpu() for name, value in tokenizer.state_dict().items()})
    sampled = list(range(0, batch, max(1, batch // 4)))
    return checked({"z": got[sampled].cpu()}, {"z": exact(ids[sampled].cpu())}, {"z": _BOUND})


def measure(step: Callable[[Tensor], Tensor], batch: int, many: int = 32) -> Step:
    """The median over rounds of replays."""
    ids = torch.randint(256, (batch, 1), dtype=torch.uint8, device="cuda")
    alone, together = (timer.capture([lambda: step(ids)] * count) for count in (1, many))
    return Step(microseconds(alone, _REPLAYS), microseconds(together, 1) / many)


def microseconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """The median time of a replay, over rounds of `replays`, one behind the other."""
    times = []
    for _ in range(2 + _ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / replays)
    return statistics.median(times[2:])


def flatness(tokenizer: FuzzyTokenizer, batch: int = 1) -> float:
    """The time of a step after a billion bytes over that of one at the start."""
    times = []
    for position in (0, 10**9):
        ours = Ours(tokenizer, batch)
        ours.state.positions.fill_(position)
        times.append(measure(ours, batch).replayed)
    return times[1] / times[0]


def step_table(steps: dict[int, dict[str, Step]]) -> list[str]:
    """A row a form: microseconds a step."""
    head = [f"B={batch}, {kind}" for batch in steps for kind in ("a replay a step", "32 steps a replay")]
    rows = [f"| microseconds a step | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for name in next(iter(steps.values())):
        cells = [f"{value:.1f}" for batch in steps for value in steps[batch][name]]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def bars(tokenizer: FuzzyTokenizer, steps: dict[int, dict[str, Step]], flat: float) -> list[str]:
    """The table of bars."""
    rows = ["| bar | asked | measured | |", "|---|---|---|---|"]

    def add(what: str, asked: str, measured: str, met: bool) -> None:
        rows.append(f"| {what} | {asked} | {measured} | {'met' if met else 'missed'} |")

    for batch, limit in BARS.items():
        got = steps[batch]["ours"].replayed
        add(f"a step, B={batch}", f"<= {limit:.0f} us", f"{got:.1f} us", got <= limit)
        rival = min(step.replayed for name, step in steps[batch].items() if name != "ours" and "compiled" not in name)
        add(f"against the best PyTorch form in a graph, B={batch}", f">= {_FASTER}x", f"{rival / got:.2f}x", rival / got >= _FASTER)
    add("a step after 10^9 bytes over one at the start", f"<= {_FLAT}", f"{flat:.3f}", flat <= _FLAT)
    state = tokenizer.init_state(64)
    most = 64 * sum((conv.kernel_size - 1) * conv.dilation for conv in convolutions(tokenizer)) * tokenizer.embedding.embedding_dim
    add("elements of the state, B=64", f"<= {most:,}", f"{state.history.numel():,}", state.history.numel() <= most)
    return rows


def others(tokenizer: FuzzyTokenizer) -> list[str]:
    """Chunks of a stream, and a single convolution: no bars."""
    rows = ["| also | microseconds |", "|---|---|"]
    for batch, length in ((1, 16), (1, 512), (1, 4096), (32, 512)):
        ids = torch.randint(256, (batch, length), dtype=torch.uint8, device="cuda")
        state = tokenizer.init_state(batch)
        for name, call in (("step", lambda ids=ids, state=state: tokenizer.step(ids, state)), ("forward", lambda ids=ids: tokenizer(ids))):
            rows.append(f"| {name} of {batch} x {length} bytes | {microseconds(timer.capture([call]), 10):.1f} |")
    conv = convolutions(tokenizer)[1]
    for batch in BATCHES:
        x, state = torch.randn(batch, 256, device="cuda", dtype=torch.bfloat16), StreamState(*tokenizer.init_state(batch))
        kept, seen = state.history[:, :4].mT.contiguous(), state.positions.int()

        def update(x: Tensor = x, kept: Tensor = kept, seen: Tensor | None = seen) -> Tensor:
            return causal_conv1d_update(x, kept, conv.weight, conv.bias, dilation=2, activation="gelu", residual=x, cache_seqlens=seen)

        rows.append(f"| causal_conv1d_update, B={batch}, circular | {microseconds(timer.capture([update] * 32), 1) / 32:.1f} |")
        shifted = timer.capture([functools.partial(update, seen=None)] * 32)
        rows.append(f"| causal_conv1d_update, B={batch}, oldest first | {microseconds(shifted, 1) / 32:.1f} |")
    step = torch.randn(64, 256, 1, device="cuda", dtype=torch.bfloat16)
    whole = timer.capture([lambda: causal_conv1d(step, conv.weight, conv.bias, activation="gelu", residual=step)] * 32)
    rows.append(f"| causal_conv1d on a single step, B=64, no state | {microseconds(whole, 1) / 32:.1f} |")
    return rows


if __name__ == "__main__":
    main()
