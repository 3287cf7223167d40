"""The sections: what each measures, and the kernels that it needs."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from bench.grid import Shape
from bench.measure import DEVICE
from bench.model.attempts import Figures, attempted, free
from bench.model.bars import FORWARD_LIMITS
from bench.model.blocks import CompiledBlock, Exact, ExactPlain, OurBlock, Recomputed, Stored
from bench.model.forms import FORMS, PYTORCH, SEARCHED, UNSEARCHED, Conv1dResidual, Form, Model
from bench.model.sizes import BATCHES, BLOCK, DEPTHS, DILATIONS, GATED, RULE_SHAPES
from bench.model.steps import Batch, Step, first_results, measured, peak_mib
from bench.model.turns import results, timed
from bench.precompile import in_processes
from bench.rivals import Conv1dPad, Conv2dPad, Conv2dTrim, Ours, Rival, draw
from fuzzytok_kernels import ResidualCausalBlock, reference


@torch.no_grad()
def block() -> Figures:
    """Forward of the plain op and of the block, with gates beside a plain op of twice the channels."""
    figures: Figures = {}
    for shape, activations in ((BLOCK, tuple(FORWARD_LIMITS)), (GATED, reference.GATES)):
        rivals: dict[str, tuple[Rival, Rival]] = {f"plain, {shape.c_out} output channels": (Ours(shape), ExactPlain(shape))}
        rivals |= {activation: (OurBlock(shape, activation), Exact(shape, activation)) for activation in activations}
        figures |= timed(shape, "forward", rivals)
    return figures


def backward() -> Figures:
    """Forward and backward of a block with exact GELU, ours and PyTorch's compiled."""
    rivals: dict[str, Rival] = {
        "ours": OurBlock(BLOCK),
        "F.conv1d + F.pad, compiled": CompiledBlock(Conv1dPad(BLOCK)),
        "conv2d channels_last, trimmed, compiled, max-autotune": CompiledBlock(Conv2dTrim(BLOCK), **SEARCHED),
        "conv2d channels_last + F.pad, compiled, max-autotune": CompiledBlock(Conv2dPad(BLOCK), **SEARCHED),
    }
    return timed(BLOCK, "forward_backward", {name: (rival, Exact(BLOCK)) for name, rival in rivals.items()})


def rule() -> Figures:
    """Forward and backward with the pre-activation recomputed and stored, by C_in * K."""
    figures: Figures = {}
    for shape in RULE_SHAPES:  # one against the other: the reference in fp64 would take seconds here
        rivals: dict[str, tuple[Rival, Rival]] = {
            "recomputed": (Recomputed(shape), Stored(shape)),
            "stored": (Stored(shape), Stored(shape)),
        }
        figures[str(shape.c_in * shape.K)] = timed(shape, "forward_backward", rivals)
        free()
    return figures


def model() -> Iterator[Figures]:
    """Speed and memory of a training step of each form, by batch; at the paper's, for the memory, without the searched one. All so far."""
    torch.manual_seed(0)
    ours = Model(BLOCK.c_in, 2 * len(DILATIONS)).to(DEVICE)
    figures: Figures = {}
    for (B, T), forms in zip(BATCHES, (FORMS, UNSEARCHED), strict=True):
        batch = Batch.draw(B, T)
        wanted = first_results(FORMS["ours"], ours, batch)
        rows = figures[f"{B}x{T}"] = {}
        for name, form in forms.items():
            rows[name] = measured(form, ours, batch, wanted)
            yield figures


def depth() -> Figures:
    """Peak memory over depth: ours, and that form of PyTorch's which needs least at 8 blocks."""
    batch, middle = Batch.draw(BLOCK.B, BLOCK.T), 8
    forms = {name: _peak(form, middle, batch) for name, form in UNSEARCHED.items() if name in PYTORCH}
    best = min((name for name in forms if "mib" in forms[name]), key=lambda name: forms[name]["mib"])
    peaks = {}
    for blocks in DEPTHS:
        theirs = forms[best] if blocks == middle else _peak(FORMS[best], blocks, batch)
        peaks[str(blocks)] = {"ours": _peak(FORMS["ours"], blocks, batch), "best": theirs}
    return {"best": FORMS[best].label, f"at_{middle}": forms, "peaks": peaks}


def _peak(form: Form, blocks: int, batch: Batch) -> Figures:
    torch.manual_seed(0)
    figures = attempted(lambda: {"mib": peak_mib(Step(form, Model(BLOCK.c_in, blocks).to(DEVICE), batch))})
    free()
    return figures


def saved() -> Figures:
    """How many tensors of the input's size one block keeps."""
    x = draw(BLOCK, torch.bfloat16, "last", DEVICE).x.requires_grad_()
    ours = ResidualCausalBlock(BLOCK.c_in, BLOCK.K, BLOCK.d).to(DEVICE, torch.bfloat16)
    return {"ours": saved_tensors(ours, x), "F.conv1d + F.pad": saved_tensors(Conv1dResidual(ours.conv), x)}


def saved_tensors(block: nn.Module, x: Tensor) -> int:
    """How many tensors as large as x `block` keeps for its backward; those that share their memory count once."""
    storages = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() >= x.numel():
            storages.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = block(x)  # alive until the count is made, so that no address is used twice
    return len(storages) if y.requires_grad else 0


def _whole(section: Callable[[], Figures]) -> Callable[[], Iterator[Figures]]:
    def parts() -> Iterator[Figures]:
        yield section()

    return parts


MEASURES: dict[str, Callable[[], Iterator[Figures]]] = {
    "block": _whole(block),
    "saved": _whole(saved),
    "model": model,
    "backward": _whole(backward),
    "rule": _whole(rule),
    "depth": _whole(depth),
}


# ---- kernels


def compile_kernels(sections: Iterable[str]) -> None:
    """Leave the Triton kernels of `sections` that take longest to compile in its cache on disk."""
    in_processes(_run_once, list(kernels(sections)))


def kernels(sections: Iterable[str]) -> Iterator[tuple[Rival, str]]:
    """Calls that reach these kernels."""
    if "block" in sections:
        yield from ((Ours(shape), "forward") for shape in (BLOCK, GATED))
        yield from ((OurBlock(BLOCK, activation), "forward") for activation in FORWARD_LIMITS)
        yield from ((OurBlock(GATED, activation), "forward") for activation in reference.GATES)
    if "rule" in sections:
        yield from ((kind(shape), "forward_backward") for shape in RULE_SHAPES for kind in (Recomputed, Stored))
    yield from ((OurBlock(shape), "forward_backward") for shape in _trained(sections))


def _trained(sections: Iterable[str]) -> list[Shape]:
    if "model" in sections:
        return [BLOCK._replace(B=B, T=T) for B, T in BATCHES]
    return [BLOCK] if {"backward", "depth"} & set(sections) else []


def _run_once(call: tuple[Rival, str]) -> None:
    rival, op = call
    results(rival, op, draw(rival.shape, torch.bfloat16, "last", DEVICE))
