"""Everything that computes the convolution, behind one interface.

`adapt` brings the inputs into the form that a rival's user would hold them in (layout, order of taps), outside the time; what it needs
at every call (pads, copies, trims) is inside. Ours takes the weight as `CausalConv1d` keeps it, and packs nothing outside.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fuzzytok_kernels
from bench.grid import Shape
from fuzzytok_kernels.layout import empty_weight

Results = dict[str, Tensor]  # y, grad_x, grad_weight, grad_bias, or some of them


class Inputs(NamedTuple):
    """As drawn: x (B, C_in, T), weight (C_out, C_in, K) tap-major, bias (C_out,), grad_y (B, C_out, T). A rival's own may differ."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    grad_y: Tensor


def draw(shape: Shape, dtype: torch.dtype, layout: str, device: str) -> Inputs:
    """Fresh random inputs, x and grad_y channels-`layout`."""

    def sequence(channels: int) -> Tensor:
        if layout == "last":
            return torch.randn(shape.B, shape.T, channels, device=device, dtype=dtype).transpose(1, 2)
        return torch.randn(shape.B, channels, shape.T, device=device, dtype=dtype)

    x, bias, grad_y = sequence(shape.c_in), torch.randn(shape.c_out, device=device, dtype=dtype), sequence(shape.c_out)
    weight = empty_weight(x, shape.c_out, shape.c_in, shape.K).normal_(std=(shape.c_in * shape.K) ** -0.5)
    return Inputs(x, weight, bias, grad_y)


class Rival:
    """One way to compute the convolution of a shape, all four ops of it unless it says otherwise."""

    searched = False  # whether cuDNN tries its algorithms out first (torch.backends.cudnn.benchmark)

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.history = (shape.K - 1) * shape.d

    def adapt(self, inputs: Inputs, op: str) -> Inputs:
        """The inputs in this rival's own form."""
        raise NotImplementedError

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The forward pass."""
        raise NotImplementedError

    def logical(self, results: Results, inputs: Inputs) -> Results:
        """`results` of `inputs`, both in its own form, as (B, C, T) and (C_out, C_in, K) tensors."""
        raise NotImplementedError

    def forward(self, inputs: Inputs) -> Results:
        return {"y": self.convolve(inputs.x, inputs.weight, inputs.bias)}

    def forward_backward(self, inputs: Inputs) -> Results:
        y = self.convolve(inputs.x, inputs.weight, inputs.bias)
        grad_x, grad_weight, grad_bias = torch.autograd.grad(y, (inputs.x, inputs.weight, inputs.bias), inputs.grad_y)
        return {"y": y.detach(), "grad_x": grad_x, "grad_weight": grad_weight, "grad_bias": grad_bias}


class Ours(Rival):
    def adapt(self, inputs: Inputs, op: str) -> Inputs:
        return inputs

    def logical(self, results: Results, inputs: Inputs) -> Results:
        return results

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fuzzytok_kernels.causal_conv1d(x, weight, bias, dilation=self.shape.d)

    def input_grad(self, inputs: Inputs) -> Results:
        return {"grad_x": torch.ops.fuzzytok.causal_conv1d_input_grad(inputs.grad_y, inputs.weight, self.shape.d)}

    def weight_grad(self, inputs: Inputs) -> Results:
        gradients = torch.ops.fuzzytok.causal_conv1d_weight_grad(inputs.grad_y, inputs.x, self.shape.K, self.shape.d)
        return dict(zip(("grad_weight", "grad_bias"), gradients, strict=True))


class Module(Ours):
    """Ours as `CausalConv1d`, for one set of inputs: its own weight and bias are those of the inputs."""

    def adapt(self, inputs: Inputs, op: str) -> Inputs:
        x, weight, bias, _ = inputs
        _, _, c_in, c_out, K, d = self.shape
        self.module = fuzzytok_kernels.CausalConv1d(c_in, c_out, K, d, device=x.device, dtype=x.dtype)
        self.module.weight, self.module.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        return inputs._replace(weight=self.module.weight, bias=self.module.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.module(x)


# ---- PyTorch's convolutions


def _conv1d_pad(x: Tensor, weight: Tensor, bias: Tensor, history: int, dilation: int) -> Tensor:
    return F.conv1d(F.pad(x, (history, 0)), weight, bias, dilation=dilation)


class Conv1dPad(Rival):
    """As people write it: channels-first, F.pad and F.conv1d, with PyTorch's default switches."""

    def adapt(self, inputs: Inputs, op: str) -> Inputs:
        return Inputs(inputs.x.contiguous(), inputs.weight.flip(2).contiguous(), inputs.bias, inputs.grad_y.contiguous())

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _conv1d_pad(x, weight, bias, self.history, self.shape.d)

    def logical(self, results: Results, inputs: Inputs) -> Results:
        return {name: value.flip(2) if name == "grad_weight" else value for name, value in results.items()}


class Conv1dTrim(Conv1dPad):
    """cuDNN pads both ends, and the surplus is cut off as a view."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv1d(x, weight, bias, padding=self.history, dilation=self.shape.d)[:, :, : self.shape.T]


class Compiled(Conv1dPad):
    """torch.compile of the first. Without CUDA graphs of its own, since the timer captures all rivals in one graph each."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        torch._dynamo.reset()
        self.compiled: Callable[..., Any] = torch.compile(_conv1d_pad, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.compiled(x, weight, bias, self.history, self.shape.d)


class Conv2dPad(Rival):
    """conv2d over a height of one, in channels_last: cuDNN's fastest kernels, and no change of layout."""

    def adapt(self, inputs: Inputs, op: str) -> Inputs:
        weight = inputs.weight.flip(2).unsqueeze(2).contiguous(memory_format=torch.channels_last)
        return Inputs(inputs.x.unsqueeze(2), weight, inputs.bias, inputs.grad_y.unsqueeze(2))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (self.history, 0)), weight, bias, dilation=(1, self.shape.d))

    def logical(self, results: Results, inputs: Inputs) -> Results:
        logical = {name: value if name == "grad_bias" else value.squeeze(2) for name, value in results.items()}
        return {name: value.flip(2) if name == "grad_weight" else value for name, value in logical.items()}


class Conv2dTrim(Conv2dPad):
    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=(0, self.history), dilation=(1, self.shape.d))[..., : self.shape.T]


class Conv2dPadSearched(Conv2dPad):
    searched = True


class Conv2dTrimSearched(Conv2dTrim):
    searched = True


# ---- products of matrices


class Shifted(Rival):
    """A product per tap, accumulated into a shifted view: x [B, T, C_in], weight [K, C_in, C_out]."""

    def adapt(self, inputs: Inputs, op: str) -> Inputs:
        x, weight, bias, grad_y = inputs
        return Inputs(x.transpose(1, 2).contiguous(), weight.permute(2, 1, 0).contiguous(), bias, grad_y.transpose(1, 2).contiguous())

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _ShiftedProducts.apply(x, weight, bias, self.shape.d)

    def logical(self, results: Results, inputs: Inputs) -> Results:
        names = {"y": (0, 2, 1), "grad_x": (0, 2, 1), "grad_weight": (2, 1, 0), "grad_bias": (0,)}
        return {name: value.permute(names[name]) for name, value in results.items()}


class _ShiftedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, d: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.d = d
        y = torch.addmm(bias, x.flatten(0, 1), weight[0]).unflatten(0, x.shape[:2])
        for k in _later_taps(x, weight, d):
            y[:, k * d :].baddbmm_(x[:, : -k * d], weight[k].expand(len(x), -1, -1))
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple:
        (x, weight), d = ctx.saved_tensors, ctx.d
        grad_x = (grad_y.flatten(0, 1) @ weight[0].t()).unflatten(0, x.shape[:2])
        grad_weight = torch.empty_like(weight)
        grad_weight[1 + len(_later_taps(x, weight, d)) :].zero_()
        torch.mm(x.flatten(0, 1).t(), grad_y.flatten(0, 1), out=grad_weight[0])
        for k in _later_taps(x, weight, d):
            grad_x[:, : -k * d].baddbmm_(grad_y[:, k * d :], weight[k].t().expand(len(x), -1, -1))
            torch.sum(x[:, : -k * d].transpose(1, 2) @ grad_y[:, k * d :], 0, out=grad_weight[k])
        return grad_x, grad_weight, grad_y.sum((0, 1)), None


def _later_taps(x: Tensor, weight: Tensor, d: int) -> range:
    """The taps but the first that see anything of x [B, T, C]."""
    return range(1, min(len(weight), (x.shape[1] - 1) // d + 1))


class Gemm(Rival):
    """A bound, no rival: one cuBLAS product of the same size, over an unfolded copy that is made outside the time; no bias."""

    def adapt(self, inputs: Inputs, op: str) -> Inputs:
        x, weight, bias, grad_y = inputs
        rows = grad_y.transpose(1, 2).flatten(0, 1).contiguous()
        if op == "input_grad":
            return Inputs(x, weight.permute(2, 0, 1).flatten(0, 1).contiguous(), bias, self._unfolded(grad_y, -self.shape.d))
        return Inputs(self._unfolded(x, self.shape.d), weight.permute(2, 1, 0).flatten(0, 1).contiguous(), bias, rows)

    def forward(self, inputs: Inputs) -> Results:
        return {"y": inputs.x @ inputs.weight}  # [B*T, K*C_in] x [K*C_in, C_out]

    def input_grad(self, inputs: Inputs) -> Results:
        return {"grad_x": inputs.grad_y @ inputs.weight}  # [B*T, K*C_out] x [K*C_out, C_in]

    def weight_grad(self, inputs: Inputs) -> Results:
        return {"grad_weight": inputs.x.t() @ inputs.grad_y}  # [K*C_in, B*T] x [B*T, C_out]

    def logical(self, results: Results, inputs: Inputs) -> Results:
        (name, value), shape = *results.items(), self.shape
        if name == "grad_weight":
            return {name: value.view(shape.K, shape.c_in, shape.c_out).permute(2, 1, 0)}
        rows = value + inputs.bias if name == "y" else value
        return {name: rows.view(shape.B, shape.T, -1).transpose(1, 2)}

    def _unfolded(self, x: Tensor, shift: int) -> Tensor:
        """[B*T, K*C] of x (B, C, T): the row of step t holds x[t - k*shift] for each tap."""
        unfolded = x.new_zeros(self.shape.B, self.shape.T, self.shape.K, x.shape[1])
        rows = x.transpose(1, 2)
        for k in range(self.shape.K):
            seen = max(0, self.shape.T - k * abs(shift))
            if shift > 0:
                unfolded[:, self.shape.T - seen :, k] = rows[:, :seen]
            else:
                unfolded[:, :seen, k] = rows[:, self.shape.T - seen :]
        return unfolded.flatten(2).flatten(0, 1)


# ---- the paper's kernels


class Listing1(Conv1dPad):
    """The paper's kernel, tiled over channels; forward only, taps in the paper's order."""

    def adapt(self, inputs: Inputs, op: str) -> Inputs:
        return inputs._replace(x=inputs.x.contiguous(), weight=inputs.weight.contiguous())

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from bench import listing1  # Triton is imported where it runs

        return listing1.tiled(x, weight, bias, self.shape.d)


class Naive(Listing1):
    """The same, not tiled over channels."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from bench import listing1

        return listing1.naive(x, weight, bias, self.shape.d)


RIVALS: dict[str, type[Rival]] = {
    "ours": Ours,
    "module": Module,
    "gemm": Gemm,
    "conv1d_pad": Conv1dPad,
    "conv1d_trim": Conv1dTrim,
    "conv2d_pad": Conv2dPad,
    "conv2d_trim": Conv2dTrim,
    "shifted": Shifted,
    "compiled": Compiled,
    "conv2d_pad_searched": Conv2dPadSearched,
    "conv2d_trim_searched": Conv2dTrimSearched,
    "listing1": Listing1,
    "naive": Naive,
}
