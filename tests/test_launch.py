"""The launchers: paths, configs, precision switches, streams, graphs, devices, and sizes that only a GPU holds."""

import gc
import weakref

import pytest
import torch
from filelock import FileLock
from modes import DEVICE, needs_cuda, needs_kernels, needs_two_gpus, run_python
from oracle import OPS, Problem, assert_accurate, assert_same_bits, exact, make_inputs, ours

from fuzzytok_kernels import reference

ALIGNED = Problem(B=2, c_in=24, c_out=40, T=70, K=3, d=4)
ODD = Problem(B=2, c_in=23, c_out=39, T=70, K=3, d=4)


class Recorder:
    """A kernel that notes its launches."""

    def __init__(self, kernel, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple):
        self.launches.append((self.kernel.__name__, grid))
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch) -> list:
    from fuzzytok_kernels import launch

    found: list = []
    for name in [name for name in vars(launch) if name.endswith("_kernel")]:
        monkeypatch.setattr(launch, name, Recorder(getattr(launch, name), found))
    return found


@needs_kernels
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize(("problem", "aligned"), [(ALIGNED, True), (ODD, False)], ids=["aligned", "odd"])
def test_the_forced_path_is_taken(problem, aligned, layout, device, path, launches):
    """What the fixture `path` promises to every other test; where descriptors cannot read the problem, pointers do."""
    ours(make_inputs(problem, torch.float16, device, x=layout, grad_y=layout))
    taken = "tma" if aligned and path == "tma" and _has_descriptors() else "pointer"
    kernels = [name for name, _ in launches if "_tma_" in name or "_pointer_" in name]
    assert kernels == [f"conv_{taken}_kernel", f"conv_{taken}_kernel", f"weight_grad_{taken}_kernel"]


def _has_descriptors() -> bool:
    return DEVICE.type == "cpu" or torch.cuda.get_device_capability(DEVICE) >= (9, 0)


CONFIGS = {
    "one split": dict(programs_per_sm=1, BLOCK_T=64),
    "many splits, small blocks": dict(programs_per_sm=8, BLOCK_T=16, BLOCK_C_IN=16, BLOCK_C_OUT=32),
    "wide in": dict(BLOCK_T=32, BLOCK_C_IN=64, BLOCK_C_OUT=16),
    "eight warps": dict(BLOCK_T=64, BLOCK_C_IN=32, BLOCK_C_OUT=128, num_warps=8, num_stages=2),
}


@needs_kernels
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("problem", [ALIGNED, ODD], ids=["aligned", "odd"])
def test_configs(problem, config, dtype_of_each_size, device, path):
    """Any config gives right numbers, and the same ones at every call."""
    from fuzzytok_kernels import tuning

    inputs = make_inputs(problem, dtype_of_each_size, device, x="channels-last", grad_y="channels-last")
    with tuning.force(path=path, **config):
        assert_same_bits(ours(inputs), assert_accurate(inputs))


@needs_kernels
@pytest.mark.parametrize("dilation", [33, 34, 64, 150, 299, 400])  # the first leaves out nothing
def test_taps_that_see_zeros_alone(dilation, strict_dtype, device, path):
    """From some tiles' steps, the first sequence's as well as the second's."""
    from fuzzytok_kernels import tuning

    inputs = make_inputs(ALIGNED._replace(T=299, K=4, d=dilation), strict_dtype, device, x="channels-last", grad_y="channels-last")
    with tuning.force(path=path, BLOCK_T=64):
        assert_accurate(inputs)


@needs_kernels
def test_calls_that_look_alike(device, path, strict):
    """Same shapes and strides, but other values, another alignment, no bias or a bias with gaps: nothing stale is used."""
    aligned = make_inputs(ALIGNED, torch.float16, device, "channels-last", "channels-last", "tap-major")
    off = make_inputs(ALIGNED, torch.float16, device, *["channels-last, one element off"] * 2, "tap-major")._asdict()
    gaps = torch.randn(80, device=device).half()[::2]
    for _ in range(2):
        for changes in ({}, off, {"grad_y": off["grad_y"]}, {"bias": None}, {"bias": gaps}, {"dilation": 1}):
            assert_accurate(aligned._replace(**changes))


@needs_kernels
def test_a_plan_keeps_no_tensor_alive(device, path):
    inputs = make_inputs(ALIGNED, torch.float16, device, "channels-last", "channels-last", "tap-major")
    gone = [weakref.ref(tensor) for tensor in (*inputs[:4], *ours(inputs).values())]
    del inputs
    gc.collect()
    assert [tensor() for tensor in gone] == [None] * 8


# ---- only on a GPU


@needs_cuda
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize("c_in", [128, 36])  # 36: aligned in 32 bits alone
def test_strict_fp32(c_in, layout, strict, device, path):
    inputs = make_inputs(Problem(B=4, c_in=c_in, c_out=96, T=300, K=3, d=4), torch.float32, device, x=layout, grad_y=layout)
    assert_accurate(inputs)


@needs_cuda
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize(
    "problem",
    [ALIGNED, ODD, ALIGNED._replace(c_in=36, c_out=20), ALIGNED._replace(B=4, c_in=256, c_out=192, T=2053)],
    ids=["aligned", "odd", "aligned in 32 bits alone", "long"],
)
def test_tf32(problem, layout, device, path):
    """The error of operands rounded to the nearest TF32, twice at most. Not PyTorch's own: it takes TF32 for some shapes only."""
    inputs = make_inputs(problem, torch.float32, device, x=layout, grad_y=layout)
    got, want, rounded = ours(inputs), exact(inputs), exact(inputs.map(_nearest_tf32))
    for name, value in want.items():
        error, allowed = ((each[name].double() - value).norm() / value.norm() for each in (got, rounded))
        assert error <= (1e-6 if name == "grad_bias" else 2 * allowed), name


def _nearest_tf32(x: torch.Tensor) -> torch.Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


@needs_cuda
def test_precision_switches():
    """Old and new names, in a process of their own: reading `allow_tf32` raises once the newer names have been set."""
    run_python("""
import torch
from oracle import Problem, conv1d, exact, make_inputs, ours
inputs = make_inputs(Problem(B=4, c_in=128, c_out=96, T=300, K=3, d=4), torch.float32, torch.device("cuda"))
want = exact(inputs)["y"]
error = lambda y: ((y - want).norm() / want.norm()).item()
def check(switch, tf32):
    got, torchs = error(ours(inputs)["y"]), error(conv1d(*inputs[:3], inputs.dilation))
    assert (got > 1e-5, torchs > 1e-5) == (tf32, tf32), (switch, got, torchs)
    assert got <= 2 * torchs + 1e-6, (switch, got, torchs)
check("the default", True)
torch.backends.cudnn.allow_tf32 = False
check("allow_tf32 = False", False)
torch.backends.cudnn.allow_tf32 = True
check("allow_tf32 = True", True)
torch.backends.cudnn.conv.fp32_precision = "ieee"
check("conv.fp32_precision = ieee", False)
torch.backends.cudnn.conv.fp32_precision = "tf32"
check("conv.fp32_precision = tf32", True)
""")


@needs_cuda
def test_same_bits_on_a_busy_gpu(dtype, device, path):
    inputs = make_inputs(Problem(B=8, c_in=256, c_out=256, T=1024, K=3, d=4), dtype, device, x="channels-last", grad_y="channels-last")
    first = ours(inputs)
    noise, side = torch.randn(2048, 2048, device=device), torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(side):
            noise @ noise
        assert_same_bits(ours(inputs), first)
    side.synchronize()


@needs_kernels
@pytest.mark.parametrize("B, T", [(1, 37), (3, 200)], ids=["one slice, no reduction", "many slices"])
@pytest.mark.parametrize("K", [1, 3, 5])
@pytest.mark.parametrize("taps", [1, 2, 3])
@pytest.mark.parametrize("kernel_path", ["tma", "pointer"])
def test_weight_grad_in_groups_of_taps(kernel_path, taps, K, B, T, strict_dtype, device):
    """The last group may be short, and its surplus taps must leave no trace."""
    from fuzzytok_kernels import tuning

    with tuning.force(path=kernel_path, TAPS=taps, programs_per_sm=32, BLOCK_T=64):
        assert_accurate(make_inputs(Problem(B, c_in=24, c_out=40, T=T, K=K, d=4), strict_dtype, device, "channels-last", "channels-last"))


@needs_cuda
def test_first_launch_of_a_thread():
    """Also where PyTorch's allocator has memory at hand, so that nothing has made the device's context current in that thread yet."""
    run_python("""
import threading, torch
from fuzzytok_kernels import causal_conv1d, tuning
x, weight = torch.randn(2, 32, 64, device="cuda").half().mT, torch.randn(64, 64, 3, device="cuda").half()
x.requires_grad_(), weight.requires_grad_()
grad_y, got = torch.randn_like(x), []
run = lambda: got.append(torch.autograd.grad(causal_conv1d(x, weight), (x, weight), grad_y))
with tuning.force(path="tma"):
    for target in (causal_conv1d, torch.ops.fuzzytok.causal_conv1d_input_grad):
        target(x.detach(), weight.detach())  # leaves memory behind
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    run()
assert all(torch.equal(one, other) for one, other in zip(*got, strict=True))
""")


@needs_cuda
def test_stream_and_graph(device, path):
    """The ops run on the current stream, and a captured graph replays on new values."""
    inputs = make_inputs(ALIGNED, torch.float16, device)
    want = ours(inputs)
    x, grad_y = inputs.x.clone(), inputs.grad_y.clone()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    inputs.x.zero_(), inputs.grad_y.zero_()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        results = [OPS[op](*inputs.args(op)) for op in OPS]
    inputs.x.copy_(x), inputs.grad_y.copy_(grad_y)
    graph.replay()
    torch.cuda.synchronize()
    got = dict(zip(want, (*results[:2], *results[2]), strict=True))
    assert_same_bits(got, want)


@needs_two_gpus
def test_second_gpu(path):
    """The tensors' device counts, whatever the current one is."""
    on = [make_inputs(ALIGNED, torch.float16, torch.device("cuda:0")).map(lambda value, i=i: value.to(f"cuda:{i}")) for i in (0, 1)]
    first, second = (ours(inputs) for inputs in on)
    assert_same_bits({name: value.to("cuda:0") for name, value in second.items()}, first)


LONG = Problem(B=1, c_in=64, c_out=64, T=40_000_003, K=3, d=4)
TWO_ROWS = Problem(B=2, c_in=64, c_out=64, T=20_000_003, K=3, d=4)
HUGE = [(problem, layout, path) for problem in (LONG, TWO_ROWS) for layout in ("first", "last") for path in ("tma", "pointer")]
HUGE.append((Problem(B=1, c_in=1, c_out=1, T=2**31 + 5, K=2, d=3), "first", "pointer"))


@needs_cuda
@pytest.mark.parametrize(("problem", "layout", "path"), HUGE, indirect=["path"], ids=str)
def test_more_than_2_31_elements(problem, layout, device, path, tmp_path_factory):
    """In x and in y: windows at both ends and around element 2^31 against the reference; the weight-grad block by block."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "huge.lock"):  # one at a time: up to 30 GiB each
        try:
            _check_huge(problem, layout, device)
        finally:
            torch.cuda.empty_cache()


def _check_huge(problem: Problem, layout: str, device: torch.device) -> None:
    B, channels, _, T, K, d = problem
    _, weight, bias, _, _ = make_inputs(problem._replace(T=1), torch.bfloat16, device)

    def draw() -> torch.Tensor:
        if layout == "last":
            return torch.empty((B, T, channels), dtype=torch.bfloat16, device=device).normal_().transpose(1, 2)
        return torch.empty((B, channels, T), dtype=torch.bfloat16, device=device).normal_()

    x, grad_y = draw(), draw()
    y, grad_x = OPS["causal_conv1d"](x, weight, bias, d), OPS["causal_conv1d_input_grad"](grad_y, weight, d)
    history, window = (K - 1) * d, 200
    crossing = 2**31 // channels % T if layout == "last" else 2**31 % T
    for first in (0, crossing - window // 2, T - window):
        first = min(max(first, 0), T - window)
        begin, end = max(first - history, 0), min(first + window + history, T)
        want_y = reference.causal_conv1d(x[:, :, begin : first + window].double(), weight.double(), bias.double(), d)[:, :, first - begin :]
        want_grad_x = reference.causal_conv1d_input_grad(grad_y[:, :, first:end].double(), weight.double(), d)[:, :, :window]
        for got, want in ((y, want_y), (grad_x, want_grad_x)):
            torch.testing.assert_close(got[:, :, first : first + window].double(), want, rtol=2**-8, atol=1e-5)
    del y, grad_x

    grad_weight, grad_bias = OPS["causal_conv1d_weight_grad"](grad_y, x, K, d)
    want_weight, want_bias = torch.zeros_like(grad_weight, dtype=torch.float64), torch.zeros_like(grad_bias, dtype=torch.float64)
    block = 2**27 // channels
    for first in range(0, T, block):
        dy = grad_y[:, :, first : first + block].double()
        want_bias += dy.sum((0, 2))
        for k in range(K):
            lost = max(k * d - first, 0)  # steps whose source lies before t = 0
            source = x[:, :, first + lost - k * d : first + dy.shape[2] - k * d].double()
            want_weight[:, :, k] += (dy[:, :, lost:] @ source.mT).sum(0)
    for got, want in ((grad_weight, want_weight), (grad_bias, want_bias)):
        assert (got.double() - want).norm() <= 2**-8 * want.norm()  # one rounding to bf16
