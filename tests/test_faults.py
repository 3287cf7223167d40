"""What fails: a config too large for the GPU, no memory, a launch inside a graph capture. No result is returned that is not whole."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch
import verdicts
from modes import needs_cuda, needs_kernels, run_python
from oracle import OPS, Problem, assert_accurate, make_inputs, ours

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from fuzzytok_kernels import launch, tuning
from fuzzytok_kernels import program as program_module
from fuzzytok_kernels.tuning import Config
from fuzzytok_kernels.tuning.space import default_config

SHAPE = Problem(B=2, c_in=16, c_out=24, T=37, K=3, d=4)
PROBLEM = tuning.Problem("causal_conv1d", "fp16", "last", True, "none", 3, 16, 24, 128)
STORED = Config("pointer", 64, 16, 32, 4, 2, 1)
TOO_MUCH = OutOfResources(300_000, 232_448, "shared memory")
CPU = torch.device("cpu")


@pytest.fixture
def stored(monkeypatch):
    """As if every problem had STORED as its winner."""
    tuning.forget()
    monkeypatch.setattr(tuning, "get_config", lambda device, problem, packed: STORED)
    yield STORED
    tuning.forget()


# ---- a config that asks for more than the GPU has


def _plan(run):
    """A plan whose launches are `run(config)`."""
    return launch._plan(PROBLEM, CPU, lambda config: lambda *tensors: run(config))


def test_falls_back_once_with_one_warning(stored):
    seen = []

    def run(config):
        seen.append(config)
        if config == STORED:
            raise TOO_MUCH
        return "a result"

    plan = _plan(run)
    with pytest.warns(UserWarning, match=r"the config for Problem\(op='causal_conv1d', .* does not fit \(out of resource") as caught:
        assert plan() == "a result"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan() == plan() == "a result"
    assert len(caught) == 1
    assert seen == [STORED] + [default_config(PROBLEM)] * 3


def test_the_default_too_is_too_large(stored):
    def run(config):
        raise TOO_MUCH

    plan = _plan(run)
    for _ in range(2):
        with warnings.catch_warnings(), pytest.raises(OutOfResources, match=r"shared memory for Problem\(op='causal_conv1d'"):
            warnings.simplefilter("ignore")
            plan()


def test_a_forced_config_is_never_replaced(stored):
    seen = []

    def run(config):
        seen.append(config)
        raise TOO_MUCH

    with tuning.force(path="pointer"), pytest.raises(OutOfResources, match=r"for Problem\(op='causal_conv1d'"):
        _plan(run)()
    assert seen == [STORED]


def test_threads_that_fall_back_at_once(stored):
    """The one that comes second finds the default, and does not take it for what failed."""
    both = threading.Barrier(2)

    def run(config):
        if config == STORED:
            both.wait(timeout=30)
            raise TOO_MUCH
        return "a result"

    plan = _plan(run)
    with warnings.catch_warnings(), ThreadPoolExecutor(2) as pool:
        warnings.simplefilter("ignore")
        assert list(pool.map(lambda _: plan(), range(2))) == ["a result"] * 2


@needs_kernels
@pytest.mark.parametrize("op", OPS)
def test_each_op_falls_back(op, stored, device, strict, monkeypatch):
    """To a right result, through the kernel's own launch."""
    call = program_module.Kernel.__call__

    def too_large(self, *args):
        if STORED.BLOCK_T in self._constants and self._options:
            raise TOO_MUCH
        return call(self, *args)

    monkeypatch.setattr(program_module.Kernel, "__call__", too_large)
    inputs = make_inputs(SHAPE, torch.float16, device, "channels-last", "channels-last")
    with pytest.warns(UserWarning, match="does not fit") as caught:
        OPS[op](*inputs.args(op))
    assert len([warning for warning in caught if "does not fit" in str(warning.message)]) == 1  # NumPy warns too, under Triton 3.6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_accurate(inputs)


# ---- no memory, and launches that fail


@needs_kernels
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("op", OPS)
def test_names_the_problem_and_the_next_call_works(op, kind, device, strict, monkeypatch):
    inputs = make_inputs(SHAPE, torch.float16, device)
    want = ours(inputs)

    def fails(self, *args):
        raise kind("what the driver says")

    with monkeypatch.context() as patch:
        patch.setattr(program_module.Kernel, "__call__", fails)
        with pytest.raises(kind, match=rf"^Problem\(op='{op}', dtype='fp16', .*steps=64\): what the driver says$"):
            OPS[op](*inputs.args(op))
    assert all(torch.equal(value, want[name]) for name, value in ours(inputs).items())


BY_NAME = [op for op in cases.SUBJECTS if "byte" in op or "update" in op or op == "embedding_norm"]  # those whose configs are fixed


@needs_kernels
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, OutOfResources])
@pytest.mark.parametrize("op", BY_NAME)
def test_names_the_op_and_the_next_call_works(op, kind, device, strict, monkeypatch):
    """And nothing that is updated has changed."""
    case = cases.Case(
        op=op, dtype="fp32", layout="channels-last", others="channels-last", weight="contiguous", bias="contiguous", activation="none",
        residual="none", packed=False, state=True, K=3, config=1, c_in=16, channels=16, T=5, B=2, d=3, spoilt=None, seed=1,
    )  # fmt: skip
    args = cases.SUBJECTS[op].arguments(case, cases.Tensors(case))
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    run = getattr(torch.ops.fuzzytok, op).default
    want = verdicts.call(run, op, args)

    def fails(self, *args):
        raise kind("what the driver says") if kind is not OutOfResources else TOO_MUCH

    with monkeypatch.context() as patch:
        patch.setattr(program_module.Kernel, "__call__", fails)
        with pytest.raises(kind, match=rf"{op} of \(2, .*\d\)") as caught:
            run(*args)
    assert ("what the driver says" in str(caught.value)) != (kind is OutOfResources)
    assert all(map(torch.equal, tensors, before))
    assert all(map(torch.equal, verdicts.call(run, op, args), want))


@needs_kernels
def test_a_stack_without_memory_leaves_its_states(device, strict, monkeypatch):
    """Each layer's state is written while the next computes, so that all memory has to be there before the first does."""
    layers = [torch.randn(16, 16, 3, device=device) for _ in range(3)], [torch.randn(16, device=device) for _ in range(3)], [1, 2, 4]
    history, positions = torch.randn(2, 14, 16, device=device), torch.tensor([5, 9], device=device)
    x, before = torch.randn(2, 16, 1, device=device), (history.clone(), positions.clone())
    stack, new, made = torch.ops.fuzzytok.residual_stack_update.default, torch.Tensor.new_empty_strided, []

    def third_fails(self, *args, **kwargs):
        made.append(None)
        if len(made) == 3:
            raise torch.OutOfMemoryError("no memory")
        return new(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty_strided", third_fails)
        with pytest.raises(torch.OutOfMemoryError, match=r"^residual_stack_update of \(2, 16, 1\).*no memory"):
            stack(x, history, positions, None, *layers, "gelu")
    assert torch.equal(history, before[0])
    assert torch.equal(positions, before[1])
    y = stack(x, history, positions, None, *layers, "gelu")
    assert torch.equal(y, stack(x, *before, None, *layers, "gelu"))


@needs_kernels
def test_a_second_stage_that_fails_returns_nothing(device, strict, monkeypatch):
    """Of the weight-grad, whose first kernel has written its partial sums by then."""
    inputs = make_inputs(SHAPE._replace(T=300), torch.float16, device)
    args = inputs.args("causal_conv1d_weight_grad")
    call = program_module.Kernel.__call__

    def fails(self, *args):
        if not self._options:
            raise RuntimeError("no launch")
        return call(self, *args)

    with tuning.force(path="pointer", BLOCK_T=16, programs_per_sm=32):
        want = OPS["causal_conv1d_weight_grad"](*args)
        with monkeypatch.context() as patch:
            patch.setattr(program_module.Kernel, "__call__", fails)
            with pytest.raises(RuntimeError, match=r"^Problem\(op='causal_conv1d_weight_grad'.*no launch"):
                OPS["causal_conv1d_weight_grad"](*args)
        assert all(map(torch.equal, OPS["causal_conv1d_weight_grad"](*args), want))


@needs_cuda
def test_a_gpu_without_memory():
    """Whoever waits for torch.OutOfMemoryError gets it, with the op's name; the next call works."""
    run_python("""
import torch
from oracle import OPS, Problem, assert_accurate, make_inputs
device = torch.device("cuda")
small = make_inputs(Problem(2, 16, 24, 37, 3, 4), torch.float16, device)
assert_accurate(small)
large = make_inputs(Problem(4, 256, 512, 65536, 3, 4), torch.float16, device, "channels-last", "channels-last")
torch.cuda.empty_cache()
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
for op in ("causal_conv1d", "causal_conv1d_input_grad"):
    try:
        OPS[op](*large.args(op))
    except torch.OutOfMemoryError as error:
        assert str(error).startswith(f"Problem(op='{op}'"), error
    else:
        raise AssertionError(f"{op} found memory")
torch.cuda.set_per_process_memory_fraction(1.0)
assert_accurate(small)
assert OPS["causal_conv1d"](*large.args("causal_conv1d")).isfinite().all()
""")


@needs_cuda
def test_a_config_that_no_gpu_holds(device, strict):
    inputs = make_inputs(SHAPE._replace(c_in=256, c_out=256), torch.float16, device, "channels-last", "channels-last")
    huge = dict(path="pointer", BLOCK_T=256, BLOCK_C_IN=256, BLOCK_C_OUT=256, num_warps=8, num_stages=8)
    with tuning.force(**huge), pytest.raises(OutOfResources, match=r"for Problem\(op='causal_conv1d'"):
        OPS["causal_conv1d"](*inputs.args("causal_conv1d"))
    assert_accurate(inputs)


@needs_cuda
def test_first_use_inside_a_graph_capture():
    """It works, or says that it cannot; either way the process goes on, and a graph that is captured then replays right."""
    run_python("""
import torch
from oracle import Problem, exact, make_inputs
from fuzzytok_kernels import causal_conv1d
inputs = make_inputs(Problem(2, 32, 40, 200, 3, 4), torch.float16, torch.device("cuda"), "channels-last", "channels-last")
x, weight, bias = inputs[:3]
want = exact(inputs)["y"]
def close(y):
    torch.cuda.synchronize()
    return (y - want).norm() / want.norm() < 1e-3
def chain(error):
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__
torch.cuda.synchronize()
def captured():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = causal_conv1d(x, weight, bias, dilation=4)
    y.zero_()
    graph.replay()
    return y
try:
    assert close(captured())
except RuntimeError as error:
    assert any("cannot be captured in a graph: call it once before" in text for text in chain(error)), list(chain(error))
    torch.cuda.synchronize()
    assert close(causal_conv1d(x, weight, bias, dilation=4))
    assert close(captured())
""")


def test_the_capture_is_named(monkeypatch):
    def run(config):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(program_module, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"^Problem\(op='causal_conv1d'.*capturing; a kernel's first call cannot be captured in a graph"):
        _plan(run)()
