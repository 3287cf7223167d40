"""What profiles say of the kernels: names that tell what runs, FLOPs and bytes. Compiled for an H100 that is not there."""

import pytest
from modes import not_interpreted, run_python

pytest.importorskip("triton")
pytestmark = not_interpreted

LAUNCHED = """
import torch, triton
from fuzzytok_kernels import launch, support
from fuzzytok_kernels.private_triton import GPUTarget, driver
from fuzzytok_kernels.tuning import force
from fuzzytok_kernels.tuning.compile import _Pretended

class Launches(_Pretended):
    def launcher_cls(self, source, metadata):
        return lambda *args: launches.append(next(arg for arg in args if hasattr(arg, "get") and hasattr(arg, "data")).get())

launches = []
driver.set_active(Launches(GPUTarget("cuda", 90, 32)))
support.cpu_facts = support.Facts(multiprocessors=64, descriptors=True, tf32=True)
triton.knobs.runtime.launch_enter_hook = lambda metadata: None  # what a profiler sets

B, c_in, c_out, T, K = 2, 32, 64, 48, 3
x, residual, grad_y = (torch.empty(B, T, C, dtype=torch.bfloat16).mT for C in (c_in, c_out, c_out))
weight, bias = torch.empty(K, c_out, c_in, dtype=torch.bfloat16).permute(1, 2, 0), torch.empty(c_out, dtype=torch.bfloat16)
products, weights, of_x, of_y = 2 * B * T * c_in * c_out * K, 2 * K * c_in * c_out, 2 * B * T * c_in, 2 * B * T * c_out

def check(call, names, flops, moved):
    launches.clear()
    call()
    assert [launch["name"] for launch in launches] == names, launches
    for i in range(2):  # the second launch goes past Triton's binder
        assert launches[0].get("flops16", 0) == flops, launches[0]
        assert moved is None or launches[0]["bytes"] == moved, launches[0]
        launches.clear()
        call()

for path in ("tma", "pointer"):
    with force(path=path, BLOCK_T=16, BLOCK_C_IN=16, BLOCK_C_OUT=32, num_warps=4, num_stages=2):
        check(lambda: launch.causal_conv1d(x, weight, bias, 2), [f"causal_conv1d_{path}"], products, of_x + weights + of_y)
        fused = lambda: launch.causal_conv1d_fused(x, weight, bias, residual, None, None, 2, "gelu")
        check(fused, [f"causal_conv1d_gelu_residual_{path}"], products, of_x + weights + 2 * of_y)
        gradient = lambda: launch.causal_conv1d_activation_grad(grad_y, x, weight, bias, None, None, 2, "silu")
        check(gradient, [f"causal_conv1d_activation_grad_silu_{path}"], products, of_x + weights + 2 * of_y)
        gradient = lambda: launch.causal_conv1d_input_grad(grad_y, weight, 2)
        check(gradient, [f"causal_conv1d_input_grad_{path}"], products, of_x + weights + of_y)
        both = [f"causal_conv1d_weight_grad_{path}", "causal_conv1d_weight_grad_reduce"]
        check(lambda: launch.causal_conv1d_weight_grad(grad_y, x, K, 2), both, products, None)
        one, boundaries = x[:1], torch.tensor([0, 20, T], dtype=torch.int32)
        packed = lambda: launch.causal_conv1d_fused(one, weight, bias, None, None, boundaries, 2, "none")
        check(packed, [f"causal_conv1d_{path}", "assert_sequences"], products // 2, of_x // 2 + weights + of_y // 2)
with force(path="tma", BLOCK_T=16, BLOCK_C_IN=16, BLOCK_C_OUT=32, num_warps=4, num_stages=2):
    first = x.contiguous()  # is copied to channels-last
    copied = ["causal_conv1d_channels_last", "causal_conv1d_tma"]
    check(lambda: launch.causal_conv1d(first, weight, bias, 2), copied, 0, 2 * of_x)
    wide = grad_y.float(), x.float()  # are read as planes in bf16
    split = [*["causal_conv1d_planes"] * 2, "causal_conv1d_weight_grad_tma", "causal_conv1d_weight_grad_reduce"]
    check(lambda: launch.causal_conv1d_weight_grad(*wide, K, 2), split, 0, None)

from fuzzytok_kernels.streaming import launch as streaming
state, step = torch.empty(B, c_in, 4, dtype=torch.bfloat16), torch.empty(B, c_in, 1, dtype=torch.bfloat16)
after = lambda: streaming.causal_conv1d_update(step, state, weight, bias, None, None, None, 2, "silu")
of_step = 2 * B * (c_in * K + c_out)  # it, two entries of the state, and y
check(after, ["causal_conv1d_update", "causal_conv1d_update_shift"], products // T, weights + of_step)
"""


def test_names_flops_and_bytes():
    """On both paths, of a cold launch and of a warm one."""
    run_python(LAUNCHED)


def test_no_figures_without_a_profiler():
    """Then a warm launch makes no dictionary at all; with one that comes later it does."""
    run_python(
        LAUNCHED.partition("triton.knobs")[0]
        + """
class Launches(_Pretended):
    def launcher_cls(self, source, metadata):
        return lambda *args: launches.append(any(hasattr(arg, "data") and hasattr(arg, "get") for arg in args))
driver.set_active(Launches(GPUTarget("cuda", 90, 32)))
call = lambda: launch.causal_conv1d(torch.empty(1, 48, 32).mT, torch.empty(32, 32, 1))
call()  # through Triton's binder
launches.clear()
call()
assert launches == [False]
hook = lambda metadata: None
triton.knobs.runtime.launch_enter_hook.add(hook)  # as proton does, at any time
call()
triton.knobs.runtime.launch_enter_hook.remove(hook)
call()
assert launches == [False, True, False]
"""
    )
