"""`python3 -m bench.tokenizer`: the tokenizer's front as look-ups, against the same without and against PyTorch's; prints its bars.

What is timed is embedding, LayerNorm and one residual block, in bf16. Each rival is first checked, result and all gradients, against
fp64; then all are replayed in turns as captured graphs, on ids and gradients that rotate over more data than the L2 holds.
"""

import copy
import functools
import json
import statistics
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.bars import Bar, judged
from bench.measure import DEVICE, WrongResultError, checked
from bench.model.attempts import Figures, attempted
from bench.model.forms import Conv1dResidual, Conv2dResidual
from bench.model.steps import GRADIENT_BOUND
from bench.report import table
from bench.results import FOLDER, slug
from fuzzytok_kernels import FuzzyTokenizer
from fuzzytok_kernels.tuning import timer
from fuzzytok_kernels.tuning.gpu import versions

B, T, C, K, DILATION = 32, 2048, 256, 3, 1
ROUNDS = 50
BOUND = 1e-2  # a relative error in the L2 norm that no correct z has: a few roundings of bf16
FORWARD_LIMIT, OWN_LIMIT, COMPILED_LIMIT = 1.5, 5.0, 6.0  # times writing y; times faster than ours unfolded, than PyTorch's compiled
OURS, UNFOLDED, WRITE = "ours, look-ups", "ours, unfolded", "writing y"
COMPILED = ("F.conv1d + F.pad, compiled", "conv2d channels_last, trimmed, compiled")


class Front(nn.Module):
    """Embedding, LayerNorm and one of PyTorch's blocks, from a tokenizer that has one block."""

    def __init__(self, tokenizer: FuzzyTokenizer, block: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embedding, self.norm = copy.deepcopy(tokenizer.embedding), copy.deepcopy(tokenizer.norm)
        (own,) = tokenizer.blocks
        self.block = block(own.conv)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, C)."""
        return self.block(self.norm(self.embedding(ids)).mT).mT


class Call:
    """One call of a rival on one copy of the inputs; it keeps what it made, so that no two copies share memory."""

    def __init__(self, run: Callable[[Tensor, Tensor], list[Tensor]], ids: Tensor, grad: Tensor) -> None:
        self.run, self.ids, self.grad = run, ids, grad
        self.results: list[Tensor] = []

    def __call__(self) -> None:
        self.results = self.run(self.ids, self.grad)


def main() -> None:
    """Measure, write, print."""
    if not torch.cuda.is_available():
        raise SystemExit("bench.tokenizer: speed is measured on a GPU, and there is none")
    try:
        figures = measure()
    except WrongResultError as error:
        raise SystemExit(f"bench.tokenizer: no speeds, since a result is wrong: {error}") from error
    print(write(figures, FOLDER / slug()))


def measure() -> Figures:
    """Microseconds of each rival's forward, and of forward and backward, or why there are none."""
    torch.manual_seed(0)
    count = timer.copies(B * T * C * 2)
    ids = [torch.randint(256, (B, T), device=DEVICE) for _ in range(count)]
    grads = [torch.randn(B, T, C, device=DEVICE, dtype=torch.bfloat16) for _ in range(count)]
    rivals = models()
    sections: Figures = {}
    for name, backward in (("forward", False), ("forward + backward", True)):
        wanted = results(exact(rivals[OURS]), ids[0], grads[0].double(), backward)
        tried = {rival: attempted(functools.partial(prepared, model, wanted, ids, grads, backward)) for rival, model in rivals.items()}
        if not backward:
            tried[WRITE] = [
                Call(lambda ids, grad: [grad.fill_(1.0)], *pair) for pair in zip(ids, map(torch.empty_like, grads), strict=True)
            ]
        sections[name] = in_turns(tried)
    return {"date": date.today().isoformat(), "gpu": torch.cuda.get_device_name(), "versions": versions(), "sections": sections}


def models() -> dict[str, nn.Module]:
    """All rivals, with the same parameters."""
    tokenizer = FuzzyTokenizer(C, K, (DILATION,)).to(DEVICE, torch.bfloat16)
    unfolded = copy.deepcopy(tokenizer)
    unfolded.fold = False
    conv1d, conv2d = Front(tokenizer, Conv1dResidual), Front(tokenizer, Conv2dResidual)
    compiled: dict[str, Any] = {
        name: torch.compile(model, fullgraph=True, dynamic=False) for name, model in zip(COMPILED, (conv1d, conv2d), strict=True)
    }
    return {OURS: tokenizer, UNFOLDED: unfolded, "F.conv1d + F.pad": conv1d, **compiled}


def exact(tokenizer: nn.Module) -> nn.Module:
    """The same in fp64, of PyTorch's own functions."""
    return Front(copy.deepcopy(tokenizer).double(), Conv1dResidual)  # type: ignore[arg-type]


def results(model: nn.Module, ids: Tensor, grad: Tensor, backward: bool) -> list[Tensor]:
    """The output (B, T, C) and, if asked for, the gradients of all parameters."""
    if not backward:
        with torch.no_grad():
            return [model(ids)]
    z = model(ids)
    return [z.detach(), *torch.autograd.grad(z, list(model.parameters()), grad)]


def prepared(model: nn.Module, wanted: list[Tensor], ids: list[Tensor], grads: list[Tensor], backward: bool) -> list[Call]:
    """Calls that rotate over the inputs, the first's results checked."""
    calls = [Call(lambda ids, grad: results(model, ids, grad, backward), *pair) for pair in zip(ids, grads, strict=True)]
    calls[0]()
    names = ["z", *(name for name, _ in model.named_parameters())][: len(wanted)]
    ours, right = (dict(zip(names, map(comparable, values), strict=True)) for values in (calls[0].results, wanted))
    if type(getattr(model, "_orig_mod", model)) is FuzzyTokenizer:  # its taps lie the other way round
        ours = {name: value.flip(2) if value.dim() == 3 and name != "z" else value for name, value in ours.items()}
    checked(ours, right, {name: BOUND if name == "z" else GRADIENT_BOUND for name in names})
    return calls


def comparable(value: Tensor) -> Tensor:
    """A weight of conv2d as one of conv1d."""
    return value.squeeze(2) if value.dim() == 4 else value


def in_turns(tried: dict[str, Any]) -> Figures:
    """The median microseconds of a call of each; each has one call a copy of the inputs."""
    captured = {
        name: calls if isinstance(calls, dict) else attempted(functools.partial(timer.capture, calls)) for name, calls in tried.items()
    }
    graphs = {name: graph for name, graph in captured.items() if not isinstance(graph, dict)}
    turns = [{name: timer.replay(graph) for name, graph in graphs.items()} for _ in range(1 + ROUNDS)][1:]
    times = {name: statistics.median(turn[name] for turn in turns) * 1e3 / len(tried[name]) for name in graphs}
    return {name: {"us": times[name]} if name in times else captured[name] for name in tried}


def bars(sections: Figures) -> list[Bar]:
    """The bars of the fold."""
    forward, both = sections["forward"], sections["forward + backward"]
    ours = both[OURS].get("us")
    compiled = min((both[name]["us"] for name in COMPILED if "us" in both[name]), default=None)
    return [
        _bar("forward / writing y", _ratio(forward[OURS].get("us"), forward[WRITE].get("us")), "<=", FORWARD_LIMIT),
        _bar("forward + backward, times faster than ours unfolded", _ratio(both[UNFOLDED].get("us"), ours), ">=", OWN_LIMIT),
        _bar("forward + backward, times faster than PyTorch's compiled", _ratio(compiled, ours), ">=", COMPILED_LIMIT),
    ]


def write(figures: Figures, folder: Path) -> str:
    """Write `tokenizer.json` and `tokenizer.md` into `folder`. Returns the markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    text = render(figures)
    (folder / "tokenizer.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "tokenizer.md").write_text(text, encoding="utf-8")
    return text


def render(figures: Figures) -> str:
    """The figures as markdown."""
    used = ", ".join(f"{name} {version}" for name, version in figures["versions"].items() if version)
    parts = [f"# Embedding, LayerNorm and first block on {figures['gpu']}", f"{figures['date']}; {used}."]
    parts.append(
        f"bf16, B={B} T={T} C={C} K={K}, exact GELU, random bytes; the LayerNorm and all small products are inside. Checked in fp64 first "
        f"(relative L2 error of z at most {BOUND}, of each gradient {GRADIENT_BOUND}); captured graphs, replayed in turns over inputs "
        "beyond the L2."
    )
    parts.append("## The bars\n\n" + table(("what", "bar", "measured", "verdict"), bars(figures["sections"])))
    for name, rows in figures["sections"].items():
        ours = rows[OURS].get("us")
        lines = [(rival, *(_cells(row, ours))) for rival, row in rows.items()]
        parts.append(f"## {name}\n\n" + table(("what", "us", "/ ours"), lines))
    return "\n\n".join(parts) + "\n"


def _cells(row: Figures, ours: float | None) -> tuple[str, str]:
    if "failed" in row:
        return row["failed"], ""
    return f"{row['us']:.1f}", f"{row['us'] / ours:.2f}" if ours else ""


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _bar(what: str, value: float | None, sign: str, limit: float) -> Bar:
    return judged(what, {"": value}, value, "", sign, limit)


if __name__ == "__main__":
    main()
