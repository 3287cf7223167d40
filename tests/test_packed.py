"""Packed sequences, initial and final states: as each sequence alone, and no step of it sees another."""

import pytest
import torch
from fused_oracle import ACTIVATIONS, assert_within_the_rule
from modes import DEVICE, HALF, INTERPRETED, interpreter_cannot, needs_cuda, needs_kernels, not_interpreted
from oracle import LAYOUTS, assert_same_bits, poisoned, randn
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap

from fuzzytok_kernels import CausalConv1d, FuzzyTokenizer, ResidualCausalBlock, causal_conv1d, reference, tuning
from fuzzytok_kernels.tuning.space import PACKED

ops = torch.ops.fuzzytok
K, D = 3, 4
HISTORY = (K - 1) * D
LENGTHS = {
    "many": [0, 5, 1, 0, 37, 8, 9, 2, 1, 77, 0],
    "none empty, all short": [1, 3, 2, 7, 1, 1, 4],
    "one": [29],
    "at the edges of blocks": [128, 64, 65, 31],
    "empty ones alone": [0, 0, 0],
    "short ones at the end": [130, 3, 1, 0, 40, 0, 1, 0],
    "a block and one step": [128, 1],
}
each_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
each_layout = pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
with_and_without_a_state = pytest.mark.parametrize("stated", [False, True], ids=["zeros", "state"])


def boundaries(lengths: list[int], device: torch.device | str = DEVICE) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


class Case:
    """Leaves by name, and what else a call of the function takes. Without `lengths` a dense batch of 3."""

    def __init__(self, lengths, dtype, activation="gelu", stated=True, layout="channels-last", c_in=16, channels=16, residual=True, T=21):
        self.lengths, self.activation, B = lengths, activation, 3 if lengths is None else 1
        T, rows = (T, B) if lengths is None else (sum(lengths), len(lengths))
        c_out = 2 * channels if activation in ("glu", "tanh_sigmoid") else channels
        leaves = {
            "x": randn((B, c_in, T), dtype, DEVICE, LAYOUTS[layout]),
            "weight": randn((c_out, c_in, K), dtype, DEVICE, scale=(c_in * K) ** -0.5),
            "bias": torch.randn(c_out, device=DEVICE).to(dtype),
            "residual": randn((B, channels, T), dtype, DEVICE, LAYOUTS[layout]) if residual else None,
            "initial_state": randn((rows, c_in, HISTORY), dtype, DEVICE, LAYOUTS[layout]) if stated else None,
        }
        self.leaves = {name: value for name, value in leaves.items() if value is not None}
        self.cu_seqlens = None if lengths is None else boundaries(lengths)
        self.grads = randn((B, channels, T), dtype, DEVICE, LAYOUTS[layout]), randn((rows, c_in, HISTORY), dtype, DEVICE)

    def run(self, function, dtype=None, **changes) -> dict[str, Tensor]:
        """The output, the final state and the gradients of all leaves, by name."""
        leaves = {name: value.detach().to(dtype or value.dtype).requires_grad_() for name, value in (self.leaves | changes).items()}
        y, state = function(**leaves, dilation=D, activation=self.activation, cu_seqlens=self.cu_seqlens, return_final_state=True)
        gradients = torch.autograd.grad((y, state), list(leaves.values()), [value.to(y.dtype) for value in self.grads])
        return {"y": y.detach(), "state": state.detach(), **{f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)}}

    def of_sequence(self, values: Tensor) -> list[Tensor]:
        """(1, C, T), or (N, ...), a sequence each."""
        return list(values.split(self.lengths, 2))


def separate(x, weight, bias, dilation, activation, cu_seqlens, return_final_state, residual=None, initial_state=None):
    """Each sequence by PyTorch's convolution, behind its state."""
    if cu_seqlens is None:
        pieces, rows = x.split(1), x.shape[0]
    else:
        pieces, rows = x.split(cu_seqlens.diff().tolist(), 2), len(cu_seqlens) - 1
    states = x.new_zeros(rows, x.shape[1], HISTORY) if initial_state is None else initial_state
    whole = [torch.cat([state, piece], 2) for state, piece in zip(states.split(1), pieces, strict=True)]
    outputs = [
        torch.nn.functional.conv1d(steps, weight.flip(2), bias, dilation=dilation)
        if steps.shape[2] > HISTORY
        else steps[:, :1, :0] * weight[:, 0, :1] + bias[:, None]
        for steps in whole
    ]
    p = torch.cat(outputs, 0 if cu_seqlens is None else 2)
    y = ACTIVATIONS[activation](p) if activation else p
    return (y if residual is None else residual + y), torch.cat([steps[:, :, steps.shape[2] - HISTORY :] for steps in whole])


def assert_as_separate(case: Case) -> dict[str, Tensor]:
    before = {name: value.clone() for name, value in case.leaves.items()}
    with poisoned():
        got = case.run(causal_conv1d)
    assert all(torch.equal(value, before[name]) for name, value in case.leaves.items()), "an argument was written"
    assert_within_the_rule(got, case.run(separate, torch.float64), case.run(separate))
    return got


# ---- values and gradients


@each_lengths
@pytest.mark.parametrize(("layout", "stated"), [("channels-first", False), ("channels-last", True)])
def test_as_each_sequence_alone(lengths, layout, stated, strict_dtype, device, path):
    case = Case(lengths, strict_dtype, stated=stated, layout=layout)
    got = assert_as_separate(case)
    assert got["y"].stride() == case.leaves["residual"].stride() or got["y"].numel() == 0


@with_and_without_a_state
def test_dtypes(stated, dtype, device, path):
    assert_as_separate(Case(LENGTHS["many"], dtype, stated=stated))


@pytest.mark.parametrize(
    ("activation", "residual", "stated"), [(None, False, True), (None, True, False), ("relu", True, True), ("tanh_sigmoid", False, False)]
)
def test_activations(activation, residual, stated, strict_dtype, device, path):
    assert_as_separate(Case(LENGTHS["many"], strict_dtype, activation, stated, residual=residual))


@pytest.mark.parametrize(("c_in", "channels", "stated"), [(1, 1, True), (5, 6, False), (7, 40, True)])
def test_hostile_channels(c_in, channels, stated, strict_dtype, device, path):
    assert_as_separate(Case(LENGTHS["many"], strict_dtype, stated=stated, c_in=c_in, channels=channels))


@pytest.mark.parametrize(
    "layout", ["channels-last, one element off", "channels-last, slice of channels", "channels-first, every second step"]
)
def test_layouts(layout, strict_dtype, device, path):
    assert_as_separate(Case(LENGTHS["many"], strict_dtype, layout=layout))


@pytest.mark.parametrize(("T", "layout"), [(0, "channels-last"), (1, "channels-first"), (7, "channels-last"), (150, "channels-first")])
def test_a_dense_batch_with_a_state(T, layout, strict_dtype, device, path):
    assert_as_separate(Case(None, strict_dtype, layout=layout, T=T))


def test_more_sequences_than_are_looked_at_together(strict_dtype, device, path):
    """1,100 empty ones between others, at the edge of a block, where no tile has to pass them by one."""
    assert_as_separate(Case([70, 58] + 1100 * [0] + [5, 90, 2], strict_dtype, "relu", stated=False))


@needs_cuda
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_three_programs_a_multiprocessor(activation, device):
    """The config of `space.packed_config`; any GPU with descriptors runs it."""
    with tuning.force(PACKED):
        assert_as_separate(Case([*64 * [100], *range(150)], torch.bfloat16, activation, stated=False, c_in=256, channels=256))


@needs_kernels
def test_the_config_is_chosen_for_sequences_without_a_state(device, monkeypatch):
    told = []
    real = tuning.get_config
    monkeypatch.setattr(tuning, "get_config", lambda *args: told.append(args[2]) or real(*args))
    x, weight = randn((1, 16, 43), HALF, DEVICE, LAYOUTS["channels-last"]), randn((16, 16, K), HALF, DEVICE)
    for lengths, state in (([20, 0, 23], None), ([20, 0, 23], x.new_zeros(3, 16, HISTORY)), (None, None)):
        causal_conv1d(x, weight, dilation=D, cu_seqlens=lengths and boundaries(lengths), initial_state=state)
    assert told == [(3, 43), None, None]


@interpreter_cannot("in little time; the path is that of the pre-activation alone, and PyTorch's functions")
@with_and_without_a_state
def test_where_the_pre_activation_is_stored(stated, dtype, device):
    """From C_in * K = 2,048 on."""
    assert_as_separate(Case(LENGTHS["many"], dtype, stated=stated, c_in=684, channels=64))


def test_no_sequence_at_all(device, path):
    x, weight = torch.zeros(1, 16, 0, device=device), torch.randn(16, 16, K, device=device, requires_grad=True)
    y, state = causal_conv1d(x, weight, activation="gelu", dilation=D, cu_seqlens=boundaries([]), return_final_state=True)
    assert (y.shape, state.shape) == ((1, 16, 0), (0, 16, HISTORY))
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert not gradient.any()


@needs_kernels
@each_layout
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_one_sequence_is_a_dense_batch_to_the_bit(activation, layout, strict_dtype, device, path):
    """But for sums over time, whose last block may begin elsewhere."""
    packed = Case([131], strict_dtype, activation, stated=False, layout=layout)
    got = packed.run(causal_conv1d)
    packed.cu_seqlens = None
    want = packed.run(causal_conv1d)
    for name in ("grad_weight", "grad_bias"):
        torch.testing.assert_close(got.pop(name), want.pop(name), rtol=1e-4, atol=1e-4)
    if INTERPRETED:  # the BLAS behind its products rounds a row by where it lies in its block (seen on an AMD EPYC, on no Intel)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    else:
        assert_same_bits(got, want)


def test_one_tap_has_no_state(device, path):
    x, weight = torch.randn(1, 16, 9, device=device), torch.randn(8, 16, 1, device=device)
    state = torch.zeros(2, 16, 0, device=device)
    y, after = causal_conv1d(x, weight, dilation=5, initial_state=state, cu_seqlens=boundaries([4, 5]), return_final_state=True)
    torch.testing.assert_close(y, causal_conv1d(x, weight))
    assert after.shape == state.shape


def test_a_state_from_far_back(strict_dtype, device, path):
    """A dilation beyond all steps: the taps see the state alone."""
    x, weight = torch.randn(1, 16, 5, dtype=strict_dtype, device=device), torch.randn(8, 16, 2, dtype=strict_dtype, device=device)
    state = torch.randn(2, 16, 40, dtype=strict_dtype, device=device)
    y = causal_conv1d(x, weight, dilation=40, initial_state=state, cu_seqlens=boundaries([3, 2]))
    seen = torch.cat([state[:1, :, :3], state[1:, :, :2]], 2)
    want = torch.einsum("oc,bct->bot", weight[:, :, 0], x) + torch.einsum("oc,bct->bot", weight[:, :, 1], seen)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


def test_chunk_by_chunk_is_the_whole(strict_dtype, device, path):
    """The final state of a chunk is the initial one of the next, chunks of 0 and 1 steps and shorter than the history among them."""
    case = Case(None, strict_dtype, T=61)
    want, want_state = causal_conv1d(**case.leaves, dilation=D, activation="gelu", return_final_state=True)
    state, chunks, leaves = case.leaves["initial_state"], [], {name: case.leaves[name] for name in ("weight", "bias")}
    for x, residual in zip(*(case.leaves[name].split([1, 0, 40, 2, 3, 15], 2) for name in ("x", "residual")), strict=True):
        y, state = causal_conv1d(
            x, **leaves, residual=residual, dilation=D, activation="gelu", initial_state=state, return_final_state=True
        )
        chunks.append(y)
    torch.testing.assert_close(torch.cat(chunks, 2), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(state, want_state)


def test_the_state_is_no_view(device):
    """Of an x that would stay in memory with it, or change under it."""
    x = torch.randn(2, 8, 30, device=device)
    _, state = causal_conv1d(x, torch.randn(8, 8, K, device=device), dilation=D, return_final_state=True)
    want = x[:, :, -HISTORY:].clone()
    x.zero_()
    assert torch.equal(state, want)


def test_the_reference_knows_no_other_steps(device):
    """The oracle itself: of a sequence alone, the numbers of a packed one."""
    x, weight = torch.randn(1, 4, 30, dtype=torch.float64), torch.randn(4, 4, K, dtype=torch.float64)
    cu_seqlens = boundaries([11, 0, 19], torch.device("cpu"))
    packed = reference.causal_conv1d_fused(x, weight, None, None, None, cu_seqlens, D, "none")
    alone = torch.cat([reference.causal_conv1d(piece, weight, None, D) for piece in (x[:, :, :11], x[:, :, 11:])], 2)
    torch.testing.assert_close(packed, alone)


# ---- derivatives, transforms, compilation


@interpreter_cannot("fp64, which the kernels lack")
@pytest.mark.parametrize("lengths", [None, [2, 0, 1, 3]], ids=["dense", "packed"])
@pytest.mark.parametrize("activation", [None, "gelu", "glu"])
def test_gradcheck_and_gradgradcheck(activation, lengths):
    rows, T = (2, 3) if lengths is None else (len(lengths), sum(lengths))
    B, cu_seqlens = (2, None) if lengths is None else (1, boundaries(lengths, "cpu"))
    c_out = 4 if activation == "glu" else 2
    shapes = (B, 2, T), (c_out, 2, 2), (c_out,), (B, 2, T), (rows, 2, 2)
    args = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(x, weight, bias, residual, initial_state):
        return causal_conv1d(
            x, weight, bias, dilation=2, activation=activation, residual=residual,
            initial_state=initial_state, cu_seqlens=cu_seqlens, return_final_state=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


def op_arguments(name: str, lengths: list[int] | None, stated: bool) -> tuple:
    case = Case(lengths, torch.float32, stated=stated)
    x, weight, bias, residual, state = (case.leaves.get(name) for name in ("x", "weight", "bias", "residual", "initial_state"))
    return {
        "causal_conv1d_fused": (x, weight, bias, residual, state, case.cu_seqlens, D, "gelu"),
        "causal_conv1d_activation_grad": (residual, x, weight, bias, state, case.cu_seqlens, D, "gelu"),
        "causal_conv1d_input_grad": (residual, weight, D, x, case.cu_seqlens),
        "causal_conv1d_weight_grad": (residual, x, K, D, case.cu_seqlens),
    }[name]


OF_A_STATE = [(name, None, True) for name in ("causal_conv1d_fused", "causal_conv1d_activation_grad")]
OF_PACKED = [
    (f"causal_conv1d_{name}", LENGTHS["many"], name in ("fused", "activation_grad"))
    for name in ("fused", "activation_grad", "input_grad", "weight_grad")
]


@pytest.mark.parametrize(("name", "lengths", "stated"), OF_A_STATE + OF_PACKED, ids=str)
def test_opcheck(name, lengths, stated, device):
    args = [
        arg.clone().requires_grad_() if isinstance(arg, Tensor) and arg.is_floating_point() else arg
        for arg in op_arguments(name, lengths, stated)
    ]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(ops, name).default, tuple(args), test_utils=tests)


def test_compiles_once_for_all_lengths(device):
    torch._dynamo.reset()
    block = ResidualCausalBlock(8, K, D).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    after_the_first = 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([5, 12, 3], [20, 2], [1, 2, 3, 40, 5]):
            x = randn((1, 8, sum(lengths)), torch.float32, device, LAYOUTS["channels-last"])
            assert torch.equal(compiled(x, boundaries(lengths)), block(x, boundaries(lengths)))
            after_the_first = after_the_first or counter.frame_count
    assert counter.frame_count == after_the_first


@not_interpreted
def test_final_states_compile(device):
    torch._dynamo.reset()
    conv = CausalConv1d(8, 8, K, D).to(device)
    compiled = torch.compile(conv, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in (None, [5, 12, 3]):
        case = Case(lengths, torch.float32, stated=True, c_in=8, channels=8)
        more = dict(initial_state=case.leaves["initial_state"], cu_seqlens=case.cu_seqlens, return_final_state=True)
        for got, want in zip(compiled(case.leaves["x"], **more), conv(case.leaves["x"], **more), strict=True):
            assert torch.equal(got, want)


@interpreter_cannot("in little time; the plain run covers it")
@pytest.mark.parametrize("lengths", [None, [4, 0, 9]], ids=["dense", "packed"])
def test_functional_transforms(lengths, device):
    """Per-sample gradients of x and state, and a batch of weights, as one call each."""
    case = Case(lengths, torch.float32, c_in=8, channels=8)
    x, weight, state = (case.leaves[name] for name in ("x", "weight", "initial_state"))

    def loss(x, weight, state):
        y = causal_conv1d(x, weight, activation="gelu", residual=x, dilation=D, initial_state=state, cu_seqlens=case.cu_seqlens)
        return y.square().sum()

    gradients = grad(loss, (0, 1, 2))
    xs, weights, states = (torch.stack([value, 2 * value]) for value in (x, weight, state))
    for in_dims, args in (
        ((0, None, 0), (xs, weight, states)),
        ((None, 0, None), (x, weights, state)),
        ((0, None, None), (xs, weight, state)),
    ):
        got = vmap(gradients, in_dims)(*args)
        slices = [[arg if dim is None else arg[i] for arg, dim in zip(args, in_dims, strict=True)] for i in range(2)]
        want = [torch.stack(parts) for parts in zip(*(gradients(*one) for one in slices), strict=True)]
        torch.testing.assert_close(list(got), want, rtol=1e-4, atol=1e-4)


def test_vmap_over_grad_y_alone(device):
    """With a residual that has no such dimension."""
    grad_y, weight, residual = (torch.randn(shape, device=device) for shape in ((2, 1, 8, 9), (8, 8, K), (1, 8, 9)))
    for cu_seqlens in (None, boundaries([4, 5])):
        got = vmap(lambda g, cu_seqlens=cu_seqlens: ops.causal_conv1d_input_grad(g, weight, D, residual, cu_seqlens))(grad_y)
        want = torch.stack([ops.causal_conv1d_input_grad(g, weight, D, residual, cu_seqlens) for g in grad_y])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_autocast(device):
    """The initial state is cast as x is; cu_seqlens stays as it is."""
    case = Case(LENGTHS["many"], torch.float32)

    def under(**leaves):
        with torch.autocast(device.type, dtype=HALF):
            return causal_conv1d(**leaves)

    got, want = case.run(under), case.run(causal_conv1d, HALF)
    assert got["y"].dtype == HALF
    assert got["grad_initial_state"].dtype == torch.float32
    assert torch.equal(got["y"], want["y"])


@needs_cuda
def test_cuda_graph_with_other_lengths(device):
    """A captured call, its assertion included, follows what cu_seqlens holds at its replay."""
    case = Case([30, 70, 28], torch.float32, stated=False)
    run = lambda: causal_conv1d(**case.leaves, dilation=D, activation="gelu", cu_seqlens=case.cu_seqlens)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    case.cu_seqlens.copy_(boundaries([1, 120, 7]))
    graph.replay()
    assert torch.equal(y, run())


# ---- modules


@not_interpreted
@pytest.mark.parametrize("norm", [None, "layer"])
def test_a_block_is_as_each_sequence_alone(norm, device):
    block, lengths = ResidualCausalBlock(8, K, D, norm=norm).to(device), [5, 0, 20, 1]
    x = torch.randn(1, sum(lengths), 8, device=device).mT
    got = block(x, boundaries(lengths))
    want = torch.cat([block(piece) for piece in x.split(lengths, 2)], 2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_is_as_each_text_alone(device):
    tokenizer = FuzzyTokenizer(dim=16, dilations=(1, 2), num_special=1).to(device)
    texts = [b"packed", b"", b"x", b"end to end, without padding"]
    ids, lengths = tokenizer.encode(b"".join(texts))[0], [len(text) for text in texts]
    z = tokenizer(ids, boundaries(lengths))
    for text, got in zip(texts, z.split(lengths, 1), strict=True):
        torch.testing.assert_close(got, tokenizer(tokenizer.encode(text)[0]), rtol=1e-3, atol=1e-3)
    assert {name.split(".")[1] for name in tokenizer.state_dict() if name.startswith("blocks.")} == {"0", "1"}
