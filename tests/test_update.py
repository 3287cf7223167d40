"""causal_conv1d_update: a stream in any chunks is the whole sequence, the state is what it should be, and what is refused."""

import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from modes import HALF, KERNELS_RUN, ON_CUDA, needs_cuda
from oracle import LAYOUTS, WEIGHT_LAYOUTS, conv1d, poisoned, randn
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from fuzzytok_kernels import causal_conv1d, causal_conv1d_update, reference

UPDATE = torch.ops.fuzzytok.causal_conv1d_update.default
CHUNKS = {
    "one by one": [1] * 12,
    "mixed, an empty one too": [3, 0, 1, 7, 1, 2],
    "longer than the history": [20, 1, 31],
    "many at once": [1, 257, 1],  # more rows than one kernel takes
}
SHAPES = {  # B, C_in, C_out, K, d
    "square": (2, 16, 16, 3, 2),
    "5 channels to 6, two taps": (3, 5, 6, 2, 7),
    "one channel": (2, 1, 1, 4, 3),
    "several blocks of channels": (1, 260, 20, 2, 1),
    "no history": (2, 8, 8, 1, 3),
    "more rows than a block has": (19, 6, 4, 3, 2),
}
ACTIVATIONS = {"gelu": F.gelu, "glu": lambda p: F.glu(p, 1), None: lambda p: p}
each_state = pytest.mark.parametrize("circular", [True, False], ids=["circular", "oldest first"])


class Layer:
    """A convolution with all that follows it, and a sequence for it."""

    def __init__(self, shape: tuple, T: int, dtype, device, activation="gelu", x="channels-first") -> None:
        self.B, self.c_in, c_out, self.K, self.dilation = shape
        self.activation, parts = activation, 2 if activation == "glu" else 1
        self.x = randn((self.B, self.c_in, T), dtype, device, LAYOUTS[x])
        self.weight = randn((parts * c_out, self.c_in, self.K), dtype, device, scale=(self.c_in * self.K) ** -0.5)
        self.bias = torch.randn(parts * c_out, device=device).to(dtype)
        self.residual = randn((self.B, c_out, T), dtype, device, LAYOUTS[x])
        self.history = (self.K - 1) * self.dilation

    def whole(self, conv=conv1d, widen=lambda value: value) -> Tensor:
        x, weight, bias, residual = map(widen, (self.x, self.weight, self.bias, self.residual))
        return residual + ACTIVATIONS[self.activation](conv(x, weight, bias, self.dilation))

    def state(self, slots: int | None = None) -> Tensor:
        return self.x.new_zeros(slots or self.B, self.c_in, self.history)

    def step(self, state: Tensor, begin: int, end: int, circular: bool, indices: Tensor | None = None) -> Tensor:
        seen = torch.full((self.B,), begin, dtype=torch.int32, device=self.x.device) if circular else None
        x, residual = self.x[:, :, begin:end], self.residual[:, :, begin:end]
        options = dict(dilation=self.dilation, activation=self.activation, cache_seqlens=seen, conv_state_indices=indices)
        with poisoned():
            return causal_conv1d_update(x, state, self.weight, self.bias, residual=residual, **options)

    def stream(self, state: Tensor, chunks: list[int], circular: bool, indices: Tensor | None = None) -> Tensor:
        ends = torch.tensor([0, *chunks]).cumsum(0).tolist()
        return torch.cat([self.step(state, begin, end, circular, indices) for begin, end in itertools.pairwise(ends)], 2)


def remembered(x: Tensor, history: int, circular: bool) -> Tensor:
    """The state after x (B, C_in, T), from zeros on."""
    T = x.shape[2]
    state = F.pad(x, (history, 0))[:, :, T:]
    return state.roll(T, 2) if circular and history else state  # the oldest, step T - history, lies at T % history


def assert_accurate(got: Tensor, layer: Layer) -> None:
    """The error rule of oracle.py, against PyTorch's own convolution of the whole sequence."""
    want, torchs = layer.whole(widen=Tensor.double), layer.whole()
    assert (got.shape, got.dtype) == (want.shape, layer.x.dtype)
    precision = (64 if got.dtype == torch.float64 else 8) * torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps
    for norm in (float("inf"), 2):
        error, torch_error, size = (torch.linalg.vector_norm(v.double(), norm).item() for v in (got - want, torchs - want, want))
        assert error <= 2 * torch_error + precision * size, f"{norm}-norm {error:.3g}, PyTorch's {torch_error:.3g}, of {size:.3g}"


# ---- values and states


@each_state
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_chunks_make_the_whole(chunks, circular, dtype, device):
    layer = Layer(SHAPES["square"], sum(chunks), dtype, device)
    state = layer.state()
    assert_accurate(layer.stream(state, chunks, circular), layer)
    assert torch.equal(state, remembered(layer.x, layer.history, circular))


@each_state
@pytest.mark.parametrize("chunk", [1, 260])
@pytest.mark.parametrize("activation", ["glu", None])
def test_activations(activation, chunk, circular, strict_dtype, device):
    chunks = [chunk, 2, 1]
    layer = Layer(SHAPES["square"], sum(chunks), strict_dtype, device, activation)
    assert_accurate(layer.stream(layer.state(), chunks, circular), layer)


@each_state
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape, circular, dtype_of_each_size, device):
    chunks = [1, 2, 1, 5]
    layer = Layer(shape, sum(chunks), dtype_of_each_size, device)
    state = layer.state()
    assert_accurate(layer.stream(state, chunks, circular), layer)
    assert torch.equal(state, remembered(layer.x, layer.history, circular))


@each_state
@pytest.mark.parametrize("dilation", [9, 40])
def test_states_of_several_blocks(dilation, circular, strict_dtype, device):
    """Longer than what a program writes at once, moved by less than itself."""
    layer = Layer((2, 70, 4, 3, dilation), 120, strict_dtype, device)
    state = layer.state()
    assert_accurate(layer.stream(state, [50, 1, 7, 62], circular), layer)
    assert torch.equal(state, remembered(layer.x, layer.history, circular))


@each_state
def test_a_state_that_is_no_zeros(circular, strict_dtype, device):
    """A stream goes on where another left it: the state alone tells what came before."""
    layer = Layer(SHAPES["square"], 30, strict_dtype, device)
    state = remembered(layer.x[:, :, :21], layer.history, circular)
    y = torch.cat([layer.step(state, t, t + 1, circular) for t in range(21, 30)], 2)
    torch.testing.assert_close(y, layer.whole()[:, :, 21:], atol=1e-5, rtol=1e-4)


@each_state
@pytest.mark.parametrize("L", [1, 3, 130])
def test_slots(L, circular, strict_dtype, device):
    """Rows find their slots; an index that is no slot changes nothing and yields zeros."""
    layer = Layer((4, 6, 5, 3, 2), 8 + L, strict_dtype, device)
    indices = torch.tensor([5, -1, 0, 6], dtype=torch.int32, device=device)
    state = torch.randn(6, 6, 4, device=device).to(strict_dtype)
    state[[5, 0]] = remembered(layer.x[[0, 2], :, :8], 4, circular)
    before = state.clone()
    y = layer.step(state, 8, 8 + L, circular, indices)
    live, others = [0, 2], [1, 2, 3, 4]
    torch.testing.assert_close(y[live], layer.whole()[live, :, 8:], atol=1e-5, rtol=1e-4)
    assert (y[[1, 3]] == 0).all()
    assert torch.equal(state[[5, 0]], remembered(layer.x[live], 4, circular))
    assert torch.equal(state[others], before[others])


def test_rows_at_different_positions(strict_dtype, device):
    layer = Layer((3, 6, 5, 3, 2), 9, strict_dtype, device)
    seen = torch.tensor([2, 8, 5], device=device)
    state, want = layer.state(), layer.whole()
    for b, t in enumerate(seen.tolist()):
        state[b] = remembered(layer.x[b : b + 1, :, :t], 4, True)[0]
    at = torch.arange(3, device=device)
    x, residual = layer.x[at, :, seen], layer.residual[at, :, seen]
    y = causal_conv1d_update(x, state, layer.weight, layer.bias, dilation=2, activation="gelu", residual=residual, cache_seqlens=seen)
    torch.testing.assert_close(y, want[at, :, seen], atol=1e-5, rtol=1e-4)
    for b, t in enumerate(seen.tolist()):
        assert torch.equal(state[b], remembered(layer.x[b : b + 1, :, : t + 1], 4, True)[0])


@each_state
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, circular, strict_dtype, device):
    """x, residual, weight and state as they come; the output as `causal_conv1d` lays it out; nothing around them is read or written."""
    layer = Layer((3, 8, 6, 3, 2), 3, strict_dtype, device, x=layout)
    layer.weight = randn((6, 8, 3), strict_dtype, device, WEIGHT_LAYOUTS["slice"], 0.2)
    shape = (3, 8, 4)
    strides, offset = LAYOUTS["channels-last, slice of channels" if circular else "channels-first, slice in time"](*shape)
    storage = torch.full((400,), float("nan"), dtype=strict_dtype, device=device)
    state = storage.as_strided(shape, strides, offset).zero_()
    x, residual, want = layer.x.clone(), layer.residual.clone(), layer.whole()
    seen = torch.zeros(3, dtype=torch.int32, device=device) if circular else None
    y = causal_conv1d_update(
        layer.x, state, layer.weight, layer.bias, dilation=2, activation="gelu", residual=layer.residual, cache_seqlens=seen
    )
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-4)
    assert y.stride() == causal_conv1d(layer.x, layer.weight).stride()
    assert torch.equal(layer.x, x)
    assert torch.equal(layer.residual, residual)
    assert torch.equal(state, remembered(layer.x, 4, circular))
    assert storage.isnan().sum() == len(storage) - state.numel(), "something beside the state was written"


@each_state
def test_one_step_without_its_axis(circular, strict_dtype, device):
    layer = Layer(SHAPES["square"], 1, strict_dtype, device)
    seen = torch.zeros(2, dtype=torch.int32, device=device) if circular else None
    options = dict(dilation=2, activation="gelu", cache_seqlens=seen)
    states = layer.state(), layer.state()
    y = causal_conv1d_update(layer.x, states[0], layer.weight, layer.bias, residual=layer.residual, **options)
    flat = causal_conv1d_update(layer.x[:, :, 0], states[1], layer.weight, layer.bias, residual=layer.residual[:, :, 0], **options)
    assert flat.shape == (2, 16)
    assert torch.equal(flat, y[:, :, 0])
    assert torch.equal(*states)


@pytest.mark.parametrize("position", [2**31 - 3, -5], ids=["near the end of int32", "below 0"])
def test_any_position(position, strict_dtype, device):
    """A position says where the circle begins, no more."""
    layer = Layer(SHAPES["square"], 6, strict_dtype, device)
    state = layer.state()
    ys = []
    for t in range(6):
        seen = torch.full((2,), position + t, dtype=torch.int64, device=device)
        ys.append(
            causal_conv1d_update(layer.x[:, :, t], state, layer.weight, layer.bias, dilation=2, activation="gelu", cache_seqlens=seen)
        )
    want = F.gelu(conv1d(layer.x, layer.weight, layer.bias, 2))
    torch.testing.assert_close(torch.stack(ys, 2), want, atol=1e-5, rtol=1e-4)


def test_no_rows(strict_dtype, device):
    layer = Layer((1, 4, 6, 3, 2), 3, strict_dtype, device)
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    state = torch.ones(5, 4, 4, device=device, dtype=strict_dtype)
    y = causal_conv1d_update(layer.x[:0], state, layer.weight, dilation=2, conv_state_indices=nothing, cache_seqlens=nothing)
    assert y.shape == (0, 6, 3)
    assert (state == 1).all()


# ---- what PyTorch does with it


def arguments(device, circular=True, dtype=torch.float32) -> tuple:
    layer = Layer((2, 4, 6, 3, 2), 3, dtype, device)
    seen = torch.tensor([3, 0], dtype=torch.int32, device=device) if circular else None
    slots = torch.tensor([2, -1], dtype=torch.int32, device=device)
    return layer.x, layer.state(3), layer.weight, layer.bias, layer.residual, seen, slots, 2, "gelu"


@each_state
def test_opcheck(circular, device):
    torch.library.opcheck(UPDATE, arguments(device, circular))


@each_state
def test_compiles_once_for_all_sizes(circular, device):
    torch._dynamo.reset()
    layer = Layer(SHAPES["square"], 20, torch.float32, device)
    states = layer.state(), layer.state()
    seen = torch.zeros(2, dtype=torch.int32, device=device) if circular else None

    def step(x: Tensor, state: Tensor) -> Tensor:
        return causal_conv1d_update(x, state, layer.weight, layer.bias, dilation=2, activation="gelu", cache_seqlens=seen).relu()

    counter = CompileCounterWithBackend("inductor" if ON_CUDA else "aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for L in (5, 7, 3):  # not another size, which would be taken for the same size
        assert torch.equal(compiled(layer.x[:, :, :L], states[0]), step(layer.x[:, :, :L], states[1]))
        assert torch.equal(*states)
    assert counter.frame_count == 1


@pytest.mark.parametrize("index", [0, 1, 2, 3, 4], ids=["x", "conv_state", "weight", "bias", "residual"])
def test_refuses_what_requires_grad(index, device):
    args = list(arguments(device))
    before = args[1].clone()
    args[index] = args[index].requires_grad_()
    with pytest.raises(RuntimeError, match=r"causal_conv1d_update has no derivative.*torch\.no_grad.*train with causal_conv1d"):
        UPDATE(*args)
    assert torch.equal(args[1], before)
    with torch.no_grad():
        assert not UPDATE(*args).requires_grad


def test_refuses_a_tangent(device):
    args = list(arguments(device))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has a tangent"):
        UPDATE(forward_ad.make_dual(args[0], torch.ones_like(args[0])), *args[1:])


def test_autograd_sees_that_the_state_was_written(device):
    x, state, *others = arguments(device)
    leaf = torch.ones_like(state, requires_grad=True)
    product = leaf * state  # saves the state
    UPDATE(x, state, *others)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_in_inference_mode(device):
    x, state, *others = arguments(device)
    want_state = state.clone()
    want = UPDATE(x, want_state, *others)
    with torch.inference_mode():
        inside = torch.zeros_like(state)
        assert torch.equal(UPDATE(x, inside, *others), want)
        assert torch.equal(UPDATE(x, state, *others), want)
    assert torch.equal(state, want_state)
    assert torch.equal(inside, want_state)


def test_autocast_casts_what_is_read(device):
    args = arguments(device)
    with torch.autocast(device.type, HALF):
        with pytest.raises(TypeError, match=f"conv_state has dtype torch.float32; expected the dtype that x has or is cast to, {HALF}"):
            UPDATE(*args)
        state = args[1].to(HALF)
        y = UPDATE(args[0], state, *args[2:])
    assert y.dtype == HALF
    assert (args[1] == 0).all()
    assert torch.equal(state[2, :, [3, 0, 1]], args[0][0].to(HALF))  # the steps 3, 4 and 5 of a circle of 4


@needs_cuda
@each_state
def test_in_a_cuda_graph(circular, device):
    layer = Layer(SHAPES["square"], 40, torch.float32, device)
    state, x, seen = layer.state(), layer.x[:, :, 0].clone(), torch.zeros(2, dtype=torch.int32, device=device)

    def step() -> Tensor:
        y = causal_conv1d_update(
            x, state, layer.weight, layer.bias, dilation=2, activation="gelu", cache_seqlens=seen if circular else None
        )
        seen.add_(1)
        return y

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    state.zero_(), seen.zero_()
    ys = []
    for t in range(40):
        x.copy_(layer.x[:, :, t])
        graph.replay()
        ys.append(y.clone())
    want = F.gelu(conv1d(layer.x, layer.weight, layer.bias, 2))
    torch.testing.assert_close(torch.stack(ys, 2), want, atol=2e-3, rtol=2e-3)


@pytest.mark.skipif(not KERNELS_RUN, reason="the kernels run on CUDA or with TRITON_INTERPRET=1")
def test_a_second_call_takes_the_first_ones_plan(device):
    from fuzzytok_kernels.streaming import launch

    args = arguments(device)
    UPDATE(*args)
    before = launch._update_plan.cache_info()
    UPDATE(*args)
    after = launch._update_plan.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


# ---- what is refused


NAMES = ["x", "conv_state", "weight", "bias", "residual", "cache_seqlens", "conv_state_indices", "dilation", "activation"]
REFUSED = [
    (ValueError, lambda new, far: dict(x=new(2, 4, 3, 1)), "x has shape (2, 4, 3, 1)"),
    (ValueError, lambda new, far: dict(conv_state=new(3, 4)), "conv_state has shape (3, 4); expected 3 dimensions"),
    (
        ValueError,
        lambda new, far: dict(conv_state=new(3, 4, 5)),
        "conv_state has shape (3, 4, 5); expected (slots, C_in, (K-1)*dilation), ",
    ),
    (
        ValueError,
        lambda new, far: dict(conv_state=new(3, 5, 4)),
        "conv_state has shape (3, 5, 4); expected (slots, C_in, (K-1)*dilation), ",
    ),
    (ValueError, lambda new, far: dict(conv_state=far(3, 4, 4)), "conv_state is on "),
    (TypeError, lambda new, far: dict(conv_state=new(3, 4, 4, dtype=torch.float16)), "conv_state has dtype torch.float16"),
    (ValueError, lambda new, far: dict(weight=new(6, 5, 3)), "weight has shape (6, 5, 3)"),
    (ValueError, lambda new, far: dict(bias=new(5)), "bias has shape (5,)"),
    (ValueError, lambda new, far: dict(residual=new(2, 4, 3)), "residual has shape (2, 4, 3); expected the output's, (2, 6, 3)"),
    (
        ValueError,
        lambda new, far: dict(cache_seqlens=new(3, dtype=torch.int32)),
        "cache_seqlens has shape (3,); expected one a row of x, (2,)",
    ),
    (TypeError, lambda new, far: dict(cache_seqlens=new(2)), "cache_seqlens has dtype torch.float32; expected int32 or int64"),
    (ValueError, lambda new, far: dict(cache_seqlens=far(2, dtype=torch.int32)), "cache_seqlens is on "),
    (ValueError, lambda new, far: dict(conv_state_indices=new(2, 1, dtype=torch.int32)), "conv_state_indices has shape (2, 1)"),
    (TypeError, lambda new, far: dict(conv_state_indices=new(2, dtype=torch.int16)), "conv_state_indices has dtype torch.int16"),
    (
        ValueError,
        lambda new, far: dict(conv_state_indices=None),
        "conv_state has 3 slots and x 2 rows; expected as many, or conv_state_indices",
    ),
    (ValueError, lambda new, far: dict(dilation=0), "dilation is 0"),
    (ValueError, lambda new, far: dict(activation="tanh"), "activation is 'tanh'"),
]


@pytest.mark.parametrize("kind", ["real", "fake", "meta"])
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[2])
def test_refused(case, kind, device):
    exception, changes, says = case
    here = "meta" if kind == "meta" else device.type
    there = "cpu" if here != "cpu" else "meta" if kind == "real" else "cuda"
    with FakeTensorMode() if kind == "fake" else nullcontext():

        def new(*shape, dtype=torch.float32, device=here):
            return torch.zeros(shape, dtype=dtype, device=device)

        good = (new(2, 4, 3), new(3, 4, 4), new(6, 4, 3), new(6), new(2, 6, 3), *(new(2, dtype=torch.int32) for _ in range(2)), 2, "gelu")
        args = {**dict(zip(NAMES, good, strict=True)), **changes(new, lambda *shape, **dtype: new(*shape, **dtype, device=there))}
        with pytest.raises(exception) as caught:
            UPDATE(**args)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("L", [3, 600])  # in one kernel, and as the convolution behind a copy of the state
@pytest.mark.parametrize("B, channels", [(4, 1), (1, 16)], ids=["one channel", "one row"])
def test_strides_are_those_of_the_fake(B, channels, L, device):
    """Those of a size of one too: torch.compile holds a kernel to them."""
    layer = Layer((B, channels, channels, 4, 1), L, torch.float32, device)
    seen = torch.zeros(B, dtype=torch.int32, device=device)
    for names in itertools.product(("channels-first", "channels-last, every second step"), ("batch last", "time first")):
        x, residual = (randn((B, channels, L), torch.float32, device, LAYOUTS[name]) for name in names)
        args = x, layer.state(), layer.weight, layer.bias, residual, seen
        fakes = (torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device="meta") for arg in args)
        assert UPDATE(*args, None, 1, "relu").stride() == UPDATE(*fakes, None, 1, "relu").stride()


def test_the_reference_is_the_convolution_behind_the_state(device):
    """The oracle itself, by the plain convolution of all that was ever seen."""
    from fuzzytok_kernels.streaming.reference import causal_conv1d_update as update

    layer = Layer((2, 3, 4, 3, 2), 11, torch.float64, device, activation=None)
    state = layer.state()
    for t in range(11):
        seen = torch.full((2,), t, device=device)
        y = update(layer.x[:, :, t : t + 1], state, layer.weight, layer.bias, None, seen, None, 2, "none")
        torch.testing.assert_close(y[:, :, 0], reference.causal_conv1d(layer.x, layer.weight, layer.bias, 2)[:, :, t])
