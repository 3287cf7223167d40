"""torch.compile: one graph for all sizes, the same numbers; in every mode, inside activation checkpointing too."""

import shutil

import pytest
import torch
from modes import HALF, ON_CUDA, needs_cuda, needs_kernels, not_interpreted, run_python
from oracle import assert_same_bits
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fuzzytok_kernels import causal_conv1d

BACKEND = "inductor" if ON_CUDA else "aot_eager"  # on the CPU, Inductor itself recompiles convolutions
SIZES = [(2, 32), (3, 33), (5, 5), (4, 17), (2, 70), (6, 3)]  # of (B, T), from below the history to well above it


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(16, 8, 3) / 5, torch.randn(8, 16, 2) / 5])
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return causal_conv1d(causal_conv1d(x, self.weights[0], self.bias, dilation=4).relu(), self.weights[1], dilation=2)


@pytest.fixture
def net(device) -> Net:
    torch._dynamo.reset()
    return Net().to(device)


def _x(B: int, T: int, layout: str, device: torch.device) -> torch.Tensor:
    x = torch.randn(B, T, 8, device=device).mT if layout == "channels-last" else torch.randn(B, 8, T, device=device)
    return x.requires_grad_()


def _run(f, net: Net, x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = f(x)
    return {"y": y.detach(), **dict(enumerate(torch.autograd.grad(y.square().sum(), [x, *net.parameters()])))}


@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
def test_compiles_once_for_all_sizes(layout, net, device):
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, T in SIZES:
            x = _x(B, T, layout, device)
            assert_same_bits(_run(compiled, net, x), _run(net, net, x))
    assert counter.frame_count == 1


def test_compiles_under_autocast(net, device):
    compiled = torch.compile(net, fullgraph=True, backend=BACKEND)
    x = _x(2, 32, "channels-last", device)
    with torch.autocast(device.type, dtype=HALF):
        got, want = _run(compiled, net, x), _run(net, net, x)
    assert got["y"].dtype == HALF
    assert_same_bits(got, want)


@needs_kernels
def test_another_config_recompiles_nothing(net, device, strict):
    """Compiled code calls the op, which looks its config up: what the tuner finds later serves code that was compiled before."""
    from fuzzytok_kernels import tuning

    compiled = torch.compile(net, fullgraph=True, backend=BACKEND)
    x = _x(2, 70, "channels-last", device)
    want = _run(compiled, net, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for block in (32, 64):
            with tuning.force(BLOCK_T=block), tuning.record_problems() as problems:
                torch.testing.assert_close(_run(compiled, net, x), want, rtol=1e-3, atol=1e-3)
            assert problems


@not_interpreted
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor on the CPU needs a C++ compiler")
def test_inductor_with_max_autotune(net, device, strict):
    """Forward and backward in the order of operations that Inductor chooses."""
    x = _x(3, 33, "channels-last", device)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, mode="max-autotune-no-cudagraphs")
    torch.testing.assert_close(_run(compiled, net, x), _run(net, net, x), rtol=1e-3, atol=1e-3)


@needs_cuda
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_in_a_fresh_process(mode):
    """Right after the import: the ops' first calls come while Inductor warms up and captures."""
    run_python(
        """
import torch
from fuzzytok_kernels import CausalConv1d
net = torch.nn.Sequential(CausalConv1d(16, 32, 3, dilation=2), torch.nn.ReLU(), CausalConv1d(32, 16, 3)).cuda()
compiled = torch.compile(net, mode="MODE", fullgraph=True)
for T in [64] * 4 + [96] * 4:
    x = torch.randn(4, 16, T, device="cuda", requires_grad=True)
    torch.compiler.cudagraph_mark_step_begin()
    y = compiled(x)
    got = y.detach().clone(), *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])
    y = net(x)
    want = y.detach(), *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
""".replace("MODE", mode)
    )
