"""The interfaces of PyTorch and Triton that nobody promises to keep: one test for each, whose name or message says what breaks without it.

When one fails after an upgrade, `fuzzytok_kernels/private.py` or `private_triton.py` is the one place to mend.
"""

import ast
import re
from pathlib import Path

import pytest
import torch
from modes import needs_kernels, run_python
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from fuzzytok_kernels import private

PACKAGE = Path(private.__file__).parent
ops = torch.ops.fuzzytok


def broken(what: str) -> str:
    return f"this interface has changed, and with it {what}"


# ---- PyTorch's


def test_below_autograd():
    x = torch.ones(3, requires_grad=True)
    with private.below_autograd():
        y = x.view(3)
    assert not y.requires_grad, broken("every op would record itself twice, its inside too")
    assert not y._is_view(), broken("nn.ReLU(inplace=True) behind an op would raise")


def test_below_derivatives():
    x = torch.ones(3, requires_grad=True)
    counted = torch.zeros(3)
    with private.below_derivatives():
        assert not (2 * x).requires_grad, broken("a stream's step would be recorded")
        counted.add_(1)
    assert counted._version == 1, broken("autograd would not see that a state was written")


def test_written_by():
    assert private.written_by(ops.causal_conv1d_update.default) == [1], broken("autocast would copy a state, and the copy be updated")
    assert private.written_by(ops.residual_stack_update.default) == [1, 2], broken("the same")
    assert private.written_by(ops.causal_conv1d.default) == []


def test_without_autocast():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with private.without_autocast():
            assert (x @ x).dtype == torch.float32, broken("gradients would be cast, and the reference's convolution be cast again")
        assert (x @ x).dtype == torch.bfloat16


def test_in_forward_mode():
    assert not private.in_forward_mode()
    with forward_ad.dual_level():
        assert private.in_forward_mode(), broken("forward-mode derivatives would be silent zeros")
    assert not private.in_forward_mode()


def test_are_plain():
    seen = []
    library = torch.library.Library("fuzzytok_test", "DEF")
    library.define("keys(Tensor x) -> Tensor")
    library.impl("keys", torch.clone, "CPU")
    library.impl("keys", torch.clone, "Meta")
    library.impl("keys", lambda keys, x: seen.append(private.are_plain(keys)) or torch.clone(x), "Autograd", with_keyset=True)
    keys, x = torch.ops.fuzzytok_test.keys, torch.ones(2)
    keys(x)
    assert seen == [True], broken("every call would take a fifth longer")
    seen.clear()
    keys(x.to("meta"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        keys(x)
    keys(mode.from_tensor(x))
    assert seen == [False] * 3, broken("what PyTorch puts between autograd and a device, modes and subclasses too, would not see the ops")


def test_apply_of():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return 2 * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    x = torch.ones(3, requires_grad=True)
    y = private.apply_of(Double)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (y.tolist(), grad.tolist()) == ([2.0] * 3, [2.0] * 3), broken("no op would have a gradient")


def test_defaults_of():
    assert private.defaults_of(ops.causal_conv1d.default) == (None, None, None, 1), broken("calls that leave arguments out would fail")


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"],
)
def test_has_hooks(register):
    module = torch.nn.Linear(2, 2)
    assert not private.has_hooks(module), broken("no tokenizer would fold")
    hook = getattr(module, register)(lambda *args: None)
    assert private.has_hooks(module), broken("a fold would pass hooks by")
    hook.remove()
    assert not private.has_hooks(module)


def test_after_backward():
    x, seen = torch.ones(2, requires_grad=True), []
    x.register_post_accumulate_grad_hook(lambda x: private.after_backward(lambda: seen.append(x.grad.tolist())))
    (3 * x).sum().backward()
    assert seen == [[3.0, 3.0]], broken("gradients would not have been averaged when a backward returns")


def test_backward_number():
    """A nested backward is another one, and the outer one goes on as itself."""
    x, seen = torch.ones(2, requires_grad=True), []
    x.register_post_accumulate_grad_hook(lambda x: seen.append(private.backward_number()))
    checkpointed = torch.utils.checkpoint.checkpoint(lambda y: x * y, 2 * x, use_reentrant=True)
    for y in (x, x, checkpointed):
        y.sum().backward()
    first, second, nested, outer = seen
    assert len({first, second, nested, outer}) == 4, broken("gradients of a backward that raised would count for the next one")


def test_keys_of_the_dispatcher():
    """`Library.impl` is public, its keys' names are not."""
    for key, what in {
        "CPU": "ops on the CPU",
        "CUDA": "ops on GPUs",
        "Autograd": "gradients",
        "FuncTorchDynamicLayerFrontMode": "torch.func",
        "AutocastCPU": "autocast on the CPU",
        "AutocastCUDA": "autocast on GPUs",
    }.items():
        assert torch._C._dispatch_has_kernel_for_dispatch_key("fuzzytok::causal_conv1d", key), broken(what)
    update = "fuzzytok::causal_conv1d_update"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(update, "ADInplaceOrView"), broken("what autograd knows of a state")


# ---- Triton's


def test_what_a_first_call_returns_launches_the_second():
    """CompiledKernel: without its `[grid]` every warm call fails."""
    pytest.importorskip("triton")
    run_python("""
import torch
from fuzzytok_kernels.kernels.transpose import channels_last_kernel
from fuzzytok_kernels.private_triton import GPUTarget, driver
from fuzzytok_kernels.program import Kernel
from fuzzytok_kernels.tuning.compile import _Pretended

class Counting(_Pretended):
    def launcher_cls(self, source, metadata):
        return lambda *args: launches.append(args)

launches = []
driver.set_active(Counting(GPUTarget("cuda", 90, 32)))
kernel = Kernel(channels_last_kernel, 7, (False, 64, 64))
arguments = torch.empty(8), torch.empty(8), 4, 2, 8, 4, 1
kernel(*arguments)
kernel(*arguments)
cold, warm = ([value for value in launch if isinstance(value, int | torch.Tensor)] for launch in launches)
assert warm[:3] == [7, 1, 1] and len(warm) == len(cold) and all(a is b or a == b for a, b in zip(cold, warm)), launches
""")


def test_the_c_function_below_a_launcher():
    """CudaLauncher's `launch`, in its closure `launcher`, make_tensordesc_arg, tensordesc_meta: else a launch takes 7 us, not 2.

    That function is to be handed what Triton's own launch hands it, with the address of each tensor anew.
    """
    pytest.importorskip("triton")
    run_python("""
import types
import torch, triton
import triton.backends.nvidia.driver as nvidia
from fuzzytok_kernels import launch, private_triton, support
from fuzzytok_kernels.tuning import force
from fuzzytok_kernels.tuning.compile import _Pretended

class Map(list):
    pass

class Cuda(_Pretended):
    launcher_cls = nvidia.CudaLauncher

    def launch(self, *args):
        launches.append([*args[:-1], *args[-1]] if isinstance(args[-1], (tuple, list)) else args)

    def fill_tma_descriptor(self, *args):
        encoded.append(args[0])
        return Map(args)

    fill_tma_descriptor_tiled = fill_tma_descriptor  # from Triton 3.8 on

    def build_signature_metadata(self, signature):
        return b""

launches, encoded, by_triton, whole = [], [], [], nvidia.CudaLauncher.__call__
nvidia.CudaLauncher.__call__ = lambda *args: (by_triton.append(args), whole(*args))
nvidia.PyKernelArg = dict
nvidia.library_dirs, nvidia.compile_module_from_src = list, lambda **options: types.SimpleNamespace(launch=active.launch)  # in Triton 3.6
active = Cuda(private_triton.GPUTarget("cuda", 90, 32))
private_triton.driver.set_active(active)
support.cpu_facts = support.Facts(multiprocessors=64, descriptors=True, tf32=True)
runtime = triton.knobs.runtime
runtime.launch_enter_hook = runtime.launch_exit_hook = None

weight, bias = torch.empty(3, 64, 32, dtype=torch.bfloat16).permute(1, 2, 0), torch.empty(64, dtype=torch.bfloat16)
kept, inputs = [], [torch.empty(2, 48, 32, dtype=torch.bfloat16).mT for _ in range(4)]

def handed(x):
    by_triton.clear()
    encoded.clear()
    kept.append(launch.causal_conv1d(x, weight, bias, 2))
    names = {x.data_ptr(): "x", weight.data_ptr(): "weight", kept[-1].data_ptr(): "y", bias.data_ptr(): "bias"}
    (args,) = launches
    launches.clear()
    address = {torch.Tensor: lambda arg: [names[arg.data_ptr()]], Map: lambda arg: [names[arg[0]], *arg[1:]]}
    return [address.get(type(arg), lambda arg: arg)(arg) for arg in args]

for path, descriptors in (("tma", 3), ("pointer", 0)):
    with force(path=path, BLOCK_T=16, BLOCK_C_IN=16, BLOCK_C_OUT=32, num_warps=4, num_stages=2):
        cold = handed(inputs[0])  # through Triton's binder
        assert len(by_triton) == 2 and len(encoded) == descriptors, (by_triton, encoded)  # one of them notes what is handed
        for x, more in ((inputs[0], descriptors), (inputs[0], 1), (inputs[1], 2), (inputs[0], 1)):
            assert handed(x) == cold and not by_triton, (path, by_triton)
            assert len(encoded) == min(more, descriptors), (path, encoded)  # y is always another here
        private_triton._MOST_ENCODED = 2
        assert all(handed(x) == cold and len(private_triton._encoded) <= 3 for x in inputs * 2)
""")


def test_compiling_for_a_gpu_that_is_not_there():
    """GPUTarget, DriverBase, driver, cuobjdump: without them `fuzzytok warmup` cannot compile ahead, nor leave out what spills.

    before_each_load: without it `make compile-matrix` cannot say which products run on tensor cores.
    """
    pytest.importorskip("triton")
    run_python("""
from fuzzytok_kernels.private_triton import GPUTarget
from fuzzytok_kernels.tuning import Problem
from fuzzytok_kernels.tuning.compile import resources
from fuzzytok_kernels.tuning.space import default_config
problem = Problem("causal_conv1d", "bf16", "last", True, "none", 1, 16, 16, 64)
used = resources(problem, default_config(problem), GPUTarget("cuda", 90, 32))
assert used.shared > 0 and used.registers > 0 and used.products == "mma", used
""")


def test_the_error_of_a_kernel_that_does_not_fit():
    pytest.importorskip("triton")
    from fuzzytok_kernels.private_triton import OutOfResources

    assert issubclass(OutOfResources, Exception)
    assert "shared memory" in str(OutOfResources(2, 1, "shared memory")), broken("a config that does not fit would end a training run")


@needs_kernels
def test_what_autotune_tunes():
    """A subclass of KernelInterface with `fn`, `arg_names` and `run`: without it `fuzzytok warmup` cannot race."""
    import triton

    from fuzzytok_kernels.private_triton import KernelInterface

    class Launch(KernelInterface):
        fn = staticmethod(lambda: None)
        arg_names: tuple = ()

        def run(self, **fields):
            return fields

    tuned = triton.autotune([triton.Config({"BLOCK": 1}, num_warps=1)], key=[])(Launch())
    assert tuned.run()["BLOCK"] == 1, broken("fuzzytok warmup")


# ---- that they are all


PRIVATE = re.compile(r"^_[^_]")
OF_TRITON = re.compile(r"^triton\.(runtime|backends|compiler|knobs)\b")


def _uses(tree: ast.AST) -> list[str]:
    """What a file uses of PyTorch's private names and of Triton's undocumented modules."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if OF_TRITON.match(name) or (not name.startswith(("self.", "cls.")) and PRIVATE.match(node.attr)):
                found.append(name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            private_names = any(PRIVATE.match(part) for part in (*node.module.split("."), *(alias.name for alias in node.names)))
            if OF_TRITON.match(node.module) or (private_names and node.module.startswith(("torch", "triton"))):
                found.append(node.module)
    return found


DOCUMENTED = ("._replace", "._asdict", "._fields", "os._exit")  # in spite of their names


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_private_interfaces_stand_in_one_place(file):
    uses = [name for name in _uses(ast.parse(file.read_text("utf-8"))) if not name.endswith(DOCUMENTED)]
    assert (uses != []) == (file.name in ("private.py", "private_triton.py")), uses
