"""`python3 -m bench.compiled`: what a convolution costs the host in compiled code, beside a native one; what a contiguous weight costs.

The host's cost of one convolution is the slope between two depths of a stack, so that what a compiled call costs once (guards, wrappers)
falls out: microseconds until the call returns, the device idle at its start and never waited for.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench.bars import Bar, judged
from bench.grid import PAPER_SHAPES, Shape
from bench.measure import DEVICE, checked
from bench.model.attempts import Figures, free
from bench.model.blocks import ExactPlain
from bench.model.turns import timed
from bench.report import table
from bench.rivals import Inputs, Ours, Results
from fuzzytok_kernels import CausalConv1d

LIMIT = 1.5  # times the native convolution's cost
SHAPE = Shape(1, 64, 64, 64, 3, 2)  # so little work that the device waits for the host
DEPTHS = (4, 20)
CALLS = 100
BOUND = 5e-2  # of a stack's output in bf16
OPS = ("forward", "forward_backward")
WEIGHT_SHAPES = (
    *PAPER_SHAPES[:2],
    Shape(64, 4096, 128, 128, 3, 2),
    *(Shape(32, 2048, channels, channels, 3, 4) for channels in (256, 512)),
)


class Native(nn.Conv1d):
    """aten::convolution of the same size, which sees the future too: what PyTorch's own costs, without a pad or a trim."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, dilation: int) -> None:
        super().__init__(c_in, c_out, kernel_size, dilation=dilation, padding=(kernel_size - 1) * dilation // 2)


KINDS: dict[str, Callable[..., nn.Module]] = {"ours": CausalConv1d, "native": Native}


def host_costs(depths: tuple[int, int] = DEPTHS) -> Figures:
    """Microseconds a convolution: by op, by kind, compiled and eager."""
    costs: Figures = {op: {} for op in OPS}
    for kind in KINDS:
        stacks = [_stack(kind, depth) for depth in depths]
        for op in OPS:
            for how in ("compiled", "eager"):
                torch.compiler.reset()
                calls = [_call(_compiled(stack) if how == "compiled" else stack, stack, op) for stack in stacks]
                shallow, deep = (_host_microseconds(call) for call in calls)
                costs[op][f"{kind}, {how}"] = (deep - shallow) / (depths[1] - depths[0])
    return costs


def _stack(kind: str, depth: int) -> nn.Sequential:
    _, _, c_in, c_out, K, d = SHAPE
    return nn.Sequential(*(KINDS[kind](c_in, c_out, K, dilation=d) for _ in range(depth))).to(DEVICE, torch.bfloat16)


def _compiled(stack: nn.Module) -> Callable[..., Tensor]:
    return torch.compile(stack, fullgraph=True, dynamic=False, backend="inductor" if DEVICE == "cuda" else "aot_eager")


def _call(function: Callable[..., Tensor], stack: nn.Sequential, op: str) -> Callable[[], None]:
    """A call of `op`, compiled by now and checked against the stack in fp32, eager."""
    layout_last = isinstance(stack[0], CausalConv1d)
    shape = (SHAPE.B, SHAPE.T, SHAPE.c_in) if layout_last else (SHAPE.B, SHAPE.c_in, SHAPE.T)
    x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    x = (x.mT if layout_last else x).requires_grad_(op == "forward_backward")
    grad_y = torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            function(x)

    def forward_backward() -> None:
        stack.zero_grad(set_to_none=True)
        x.grad = None
        function(x).backward(grad_y)

    with torch.set_grad_enabled(op == "forward_backward"):
        got = function(x).detach()
        checked({"y": got}, {"y": _exact(stack, x.detach())}, {"y": BOUND})
    return forward if op == "forward" else forward_backward


@torch.no_grad()
def _exact(stack: nn.Sequential, x: Tensor) -> Tensor:
    """In fp64 on the CPU, where ours runs the reference."""
    return copy.deepcopy(stack).cpu().double()(x.cpu().double()).to(DEVICE)


def _host_microseconds(call: Callable[[], None]) -> float:
    times = []
    for _ in range(10 + CALLS):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[10:]) * 1e6


# ---- the weight in memory


class Training(Ours):
    """Ours as training calls it: the gradients are left in `.grad`, laid out as their parameters are."""

    def forward_backward(self, inputs: Inputs) -> Results:
        leaves = {"grad_x": inputs.x, "grad_weight": inputs.weight, "grad_bias": inputs.bias}
        for leaf in leaves.values():
            leaf.grad = None
        y = self.convolve(inputs.x, inputs.weight, inputs.bias)
        y.backward(inputs.grad_y)
        return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


class Contiguous(Training):
    """With a weight as FSDP2 and safetensors ask for it."""

    def adapt(self, inputs: Inputs, op: str) -> Inputs:
        return inputs._replace(weight=inputs.weight.contiguous())


def weights() -> Iterator[tuple[str, ...]]:
    """Device microseconds by shape, tap-major and contiguous, the forward and the whole step."""
    for shape in WEIGHT_SHAPES:
        cells = []
        for op in OPS:
            exact = ExactPlain(shape)
            with torch.set_grad_enabled(op == "forward_backward"):
                rows = timed(shape, op, {"tap-major": (Training(shape), exact), "contiguous": (Contiguous(shape), Training(shape))})
            cells += [_cell(rows["tap-major"], "us"), _cell(rows["contiguous"], "us"), _cell(rows["contiguous"], "ratio")]
            free()
        yield (str(shape), *cells)


def _cell(row: Figures, name: str) -> str:
    return f"{row[name]:.3f}x" if name == "ratio" and row.get(name) else f"{row[name]:.1f}" if row.get(name) else row.get("failed", "")


# ---- the report


def bars(costs: Figures) -> list[Bar]:
    """The bar of each op."""
    ratios = {op: costs[op]["ours, compiled"] / costs[op]["native, compiled"] for op in OPS}
    return [judged(f"compiled host cost / native, {op}", {"": ratio}, ratio, "", "<=", LIMIT) for op, ratio in ratios.items()]


def report(costs: Figures) -> str:
    """Two tables of the host's costs: the figures and the bars."""
    names = list(costs[OPS[0]])
    figures = table(("us a convolution", *names), [(op, *(f"{costs[op][name]:.1f}" for name in names)) for op in OPS])
    return f"{figures}\n\n" + table(("what", "bar", "measured", "verdict"), bars(costs))


def main() -> None:
    """Measure and print."""
    if DEVICE != "cuda":
        raise SystemExit("bench.compiled: what launches cost is measured on a GPU, and there is none")
    print(report(host_costs()), flush=True)
    header = ("us, by the weight's layout", "forward, tap-major", "contiguous", "", "forward + backward, tap-major", "contiguous", "")
    print("\n" + table(header, list(weights())))


if __name__ == "__main__":
    main()
