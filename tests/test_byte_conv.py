"""The first block of a byte model as look-ups: against the block it stands for, by the error rule; packing, derivatives."""

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fused_oracle import ACTIVATIONS, GATES, assert_within_the_rule
from modes import HALF, INTERPRETED, SIZES, interpreter_cannot, needs_cuda, needs_kernels, run_python
from oracle import LAYOUTS, WEIGHT_LAYOUTS, assert_same_bits, conv1d, poisoned, randn
from torch import Tensor
from torch.func import grad, jvp, vmap

from fuzzytok_kernels import byte_launch, reference

FOLDED = torch.ops.fuzzytok.byte_causal_conv1d.default
FOLDED_GRAD = torch.ops.fuzzytok.byte_causal_conv1d_grad.default
LEAVES = ("embedding", "weight", "bias")
each_activation = pytest.mark.parametrize("activation", [*ACTIVATIONS, "none"])
each_size = pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else SIZES, ids=str)  # fp16 elsewhere: the interpreter is slow
of_each_kind = pytest.mark.parametrize("activation", ["gelu", "glu"])


class Inputs(NamedTuple):
    ids: Tensor
    embedding: Tensor
    weight: Tensor
    bias: Tensor | None
    dilation: int
    activation: str
    cu_seqlens: Tensor | None
    grad_y: Tensor

    @property
    def forward(self) -> tuple:
        return self[:7]

    @property
    def backward(self) -> tuple:
        return self.grad_y, *self[:7]

    def map(self, function) -> "Inputs":
        return Inputs(*(function(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in self))


class Shape(NamedTuple):
    B: int = 2
    T: int = 19
    C: int = 16
    K: int = 3
    d: int = 4
    V: int = 11


SHAPES = {
    "one block": Shape(),
    "two blocks of channels": Shape(B=3, T=67, C=72, V=7),
    "one step": Shape(T=1),
    "T below the history": Shape(T=5),
    "primes": Shape(T=29, C=13, d=5, V=17),
    "one channel": Shape(C=1),
    "5 channels": Shape(C=5, K=2),
    "6 channels": Shape(C=6, K=1),
    "one id": Shape(V=1, T=70),
    "every step its own id": Shape(B=1, T=130, C=8, V=130),
    "9 taps": Shape(C=4, K=9, d=1, V=3),
}


def make_inputs(shape: Shape, activation: str, dtype, device, weight=None, bias=True, grad_y="channels-last", starts=None) -> Inputs:
    B, T, C, K, d, V = shape
    c_out = 2 * C if activation in GATES else C
    ids = torch.randperm(V, device=device)[None] if V == B * T else torch.randint(V, (B, T), device=device)
    layout = WEIGHT_LAYOUTS.get(weight, LAYOUTS["channels-first"])
    return Inputs(
        ids=ids,
        embedding=torch.randn(V, C, device=device).to(dtype),
        weight=randn((c_out, C, K), dtype, device, layout, (C * K) ** -0.5),
        bias=torch.randn(c_out, device=device).to(dtype) if bias else None,
        dilation=d,
        activation=activation,
        cu_seqlens=None if starts is None else torch.tensor(starts, dtype=torch.int32, device=device),
        grad_y=randn((B, C, T), dtype, device, LAYOUTS[grad_y]),
    )


def unfolded(ids, embedding, weight, bias, dilation, activation, cu_seqlens=None) -> Tensor:
    """The block as people write it today, of each sequence by itself."""
    e = F.embedding(ids.long(), embedding).mT
    sequences = [e] if cu_seqlens is None else [x for x in e.split(cu_seqlens.diff().tolist(), 2) if x.shape[2]]
    return torch.cat([x + ACTIVATIONS.get(activation, lambda p: p)(conv1d(x, weight, bias, dilation)) for x in sequences], 2)


def run(function, inputs: Inputs) -> dict[str, Tensor]:
    """`function` and its gradients by autograd."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in LEAVES if getattr(inputs, name) is not None}
    y = function(*inputs._replace(**leaves).forward)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.grad_y.to(y.dtype))
    return {"y": y.detach(), **{f"grad_{name}": value for name, value in zip(leaves, gradients, strict=True)}}


def assert_accurate(inputs: Inputs) -> dict[str, Tensor]:
    """Our results on poisoned memory, once they pass the error rule; the arguments stay as they are.

    In 16 bits over several embeddings together, so that none of PyTorch's errors is small by luck.
    """
    before = copy.deepcopy([x for x in inputs if isinstance(x, Tensor)])
    draws = [inputs]
    if inputs.embedding.dtype.itemsize == 2 and inputs.ids.numel():
        draws += [inputs._replace(embedding=torch.randn_like(inputs.embedding)) for _ in range(2 if INTERPRETED else 15)]
    with poisoned():
        got = [run(FOLDED, each) for each in draws]
    assert all(torch.equal(x, y) for x, y in zip((x for x in inputs if isinstance(x, Tensor)), before, strict=True)), "one was written"
    want, torchs = [run(unfolded, each.map(Tensor.double)) for each in draws], [run(unfolded, each) for each in draws]
    assert_within_the_rule(*({name: torch.stack([each[name] for each in results]) for name in got[0]} for results in (got, want, torchs)))
    return got[0]


# ---- values and gradients


@each_activation
def test_activations(activation, dtype, device):
    assert_accurate(make_inputs(Shape(T=67), activation, dtype, device))


@of_each_kind
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@each_size
def test_shapes(shape, activation, dtype, device, strict):
    y = assert_accurate(make_inputs(shape, activation, dtype, device))["y"]
    assert y.mT.is_contiguous()


@pytest.mark.parametrize("weight", [None, *WEIGHT_LAYOUTS])
@each_size
def test_layouts_of_the_weight(weight, dtype, device, strict):
    assert_accurate(make_inputs(Shape(T=67), "gelu", dtype, device, weight=weight))


@pytest.mark.parametrize("grad_y", LAYOUTS)
@each_size
def test_layouts_of_grad_y(grad_y, dtype, device, strict):
    assert_accurate(make_inputs(Shape(), "silu", dtype, device, grad_y=grad_y))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.long])
def test_ids_may_be_of_any_strides(dtype, device):
    inputs = make_inputs(Shape(), "gelu", torch.float32, device)
    want, ids = run(FOLDED, inputs), inputs.ids.to(dtype)
    wide = torch.full((2, 3, 40), 5, dtype=dtype, device=device)
    wide[:, 1, 1:39:2] = ids
    for strided in (ids, wide[:, 1, 1:39:2], ids.T.contiguous().T):
        assert_same_bits(run(FOLDED, inputs._replace(ids=strided)), want)
    row = ids[:1].expand(2, -1)
    assert_same_bits(run(FOLDED, inputs._replace(ids=row)), run(FOLDED, inputs._replace(ids=row.contiguous())))


def test_the_embedding_and_bias_may_be_of_any_strides(device):
    inputs = make_inputs(Shape(), "gelu", torch.float32, device)
    want = run(FOLDED, inputs)
    for embedding in (
        inputs.embedding.T.contiguous().T,
        inputs.embedding.repeat(1, 2)[:, :16],
        inputs.embedding.repeat_interleave(2, 1)[:, ::2],
    ):
        got = run(FOLDED, inputs._replace(embedding=embedding, bias=inputs.bias.repeat_interleave(3)[::3]))
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


def test_without_a_bias(dtype, device):
    assert "grad_bias" not in assert_accurate(make_inputs(Shape(T=67), "gelu", dtype, device, bias=False))


@interpreter_cannot("in little time; the plain run covers it")
def test_all_bytes_and_special_ids(dtype, device):
    inputs = make_inputs(Shape(B=3, T=400, V=260), "gelu", dtype, device)
    inputs.ids[0, :260] = torch.arange(260, device=device)
    inputs.ids[1] = 258
    assert_accurate(inputs)


@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0), (0, 0)])
@of_each_kind
def test_nothing_to_compute(activation, B, T, dtype, device):
    results = run(FOLDED, make_inputs(Shape(B=B, T=T), activation, dtype, device))
    assert results["y"].shape == (B, 16, T)
    assert not any(results[f"grad_{name}"].any() for name in LEAVES)


@pytest.mark.parametrize("dilation", [1000, 2**40])
def test_huge_dilations_see_the_present_alone(dilation, device):
    inputs = make_inputs(Shape(), "gelu", torch.float32, device)._replace(dilation=dilation)
    want = run(unfolded, inputs._replace(weight=inputs.weight[:, :, :1], dilation=1))
    got = run(FOLDED, inputs)
    assert not got["grad_weight"][:, :, 1:].any()
    got["grad_weight"] = got["grad_weight"][:, :, :1]
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)


def test_no_step_sees_a_later_one_or_another_row(device):
    inputs = make_inputs(Shape(T=40), "gelu", torch.float32, device)
    y = FOLDED(*inputs.forward)
    ids = inputs.ids.clone()
    ids[0, 17] = (ids[0, 17] + 1) % 11
    changed = (FOLDED(ids, *inputs.forward[1:]) != y).any(1)
    assert changed.nonzero().tolist() == [[0, 17], [0, 21], [0, 25]]


@of_each_kind
def test_the_same_bits_every_time(activation, dtype, device):
    inputs = make_inputs(Shape(B=3, T=97, C=24, V=5), activation, dtype, device)
    assert_same_bits(run(FOLDED, inputs), run(FOLDED, inputs))


@pytest.fixture
def planned_anew():
    """Plans that a test makes with other constants are its own."""

    def forget():
        byte_launch._forward_plan.cache_clear(), byte_launch._grad_plan.cache_clear()

    forget()
    yield forget
    forget()


@needs_kernels
@of_each_kind
def test_offsets_of_64_bits(activation, device, monkeypatch, planned_anew):
    """What more than 2^31 elements take makes the same bits of few."""
    inputs = make_inputs(Shape(B=3, T=67, C=24, V=7), activation, torch.float32, device)
    want = run(FOLDED, inputs)
    monkeypatch.setattr(byte_launch, "_is_wide", lambda *args: True)
    planned_anew()
    assert_same_bits(run(FOLDED, inputs), want)


@needs_kernels
@of_each_kind
@pytest.mark.parametrize("starts", [None, [0, 3, 300, 640]], ids=["a batch", "packed"])
def test_several_chunks_and_runs(activation, starts, device, strict, monkeypatch, planned_anew):
    """As many times 65,536 steps make, of which an id has more than 512: here of 256 and of 32."""
    monkeypatch.setattr(byte_launch, "_CHUNK", 256)
    monkeypatch.setattr(byte_launch, "_RUN", 32)
    shape = Shape(B=1, T=640, V=3) if starts else Shape(B=8, T=80, V=3)
    assert_accurate(make_inputs(shape, activation, torch.float32, device, starts=starts))


# ---- packed sequences

STARTS = {
    "one": [0, 70],
    "several": [0, 3, 4, 40, 70],
    "empty ones": [0, 0, 5, 5, 5, 69, 70, 70],
    "one step each": list(range(71)),
}


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS.keys())
@of_each_kind
@each_size
def test_packed_sequences_are_alone(activation, starts, dtype, device, strict):
    assert_accurate(make_inputs(Shape(B=1, T=70), activation, dtype, device, starts=starts))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_nothing_leaks_over_a_boundary(device):
    """An id whose embedding is NaN, at either side of each boundary, reaches its own sequence alone."""
    inputs = make_inputs(Shape(B=1, T=30, V=12, d=1), "gelu", torch.float32, device, starts=[0, 4, 4, 17, 30])
    inputs.ids.clamp_(max=10)
    inputs.embedding[11] = float("nan")
    for t, (begin, end) in {3: (0, 4), 4: (4, 17), 16: (4, 17), 17: (17, 30)}.items():
        ids = inputs.ids.clone()
        ids[0, t] = 11
        wrong = FOLDED(ids, *inputs.forward[1:]).isnan().any(1)[0].nonzero().flatten().tolist()
        assert wrong == list(range(t, min(t + 3, end)))
        assert begin <= wrong[0]


def test_packed_is_the_rows_of_a_batch(device):
    inputs = make_inputs(Shape(B=3, T=20), "silu", torch.float32, device)
    packed = inputs._replace(
        ids=inputs.ids.reshape(1, 60),
        cu_seqlens=torch.tensor([0, 20, 40, 60], dtype=torch.int32, device=device),
        grad_y=inputs.grad_y.mT.reshape(1, 60, 16).mT,
    )
    want, got = run(FOLDED, inputs), run(FOLDED, packed)
    want["y"] = want["y"].mT.reshape(1, 60, 16).mT
    assert_same_bits(got, want)


# ---- derivatives, transforms


@pytest.mark.parametrize(("activation", "starts"), [("gelu", None), ("glu", [0, 3, 3, 7])])
def test_opcheck(activation, starts, device):
    inputs = make_inputs(Shape(B=1 if starts else 2, T=7, C=4, V=5), activation, torch.float32, device, starts=starts)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    for op, args in ((FOLDED, inputs.forward), (FOLDED_GRAD, inputs.backward)):
        wanting = tuple(x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
        torch.library.opcheck(op, wanting, test_utils=tests)


@interpreter_cannot("fp64, which the kernels lack")
@pytest.mark.parametrize("starts", [None, [0, 2, 2, 5]])
@each_activation
def test_gradcheck_and_gradgradcheck(activation, starts):
    inputs = make_inputs(Shape(B=1, T=5, C=2, K=2, d=2, V=3), activation, torch.float64, torch.device("cpu"), starts=starts)

    def wanting(args):
        return tuple(x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)

    assert torch.autograd.gradcheck(FOLDED, wanting(inputs.forward))
    assert torch.autograd.gradgradcheck(FOLDED, wanting(inputs.forward))
    assert torch.autograd.gradcheck(FOLDED_GRAD, wanting(inputs.backward))


def test_backward_is_the_gradient_op(device):
    inputs = make_inputs(Shape(), "gelu", torch.float32, device)
    got = run(FOLDED, inputs)
    want = dict(zip((f"grad_{name}" for name in LEAVES), FOLDED_GRAD(*inputs.backward), strict=True))
    assert_same_bits(got, {"y": FOLDED(*inputs.forward), **want})


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_the_wanted_gradients(wanted, device):
    inputs = make_inputs(Shape(), "gelu", torch.float32, device)
    every, leaves = run(FOLDED, inputs), [getattr(inputs, name).detach().clone() for name in LEAVES]
    for i in wanted:
        leaves[i].requires_grad_()
    FOLDED(inputs.ids, *leaves, *inputs.forward[4:]).backward(inputs.grad_y)
    for i, name in enumerate(LEAVES):
        assert (leaves[i].grad is None) == (i not in wanted)
        assert i not in wanted or torch.equal(leaves[i].grad, every[f"grad_{name}"])


TRANSFORMS = {  # of f(ids, embedding, weight, bias) -> y, on stacks of two each
    "vmap ids": lambda f: lambda i, e, w, b: vmap(f, (0, None, None, None))(i, e[0], w[0], b[0]),
    "vmap all": lambda f: lambda i, e, w, b: vmap(f)(i, e, w, b),
    "grad": lambda f: lambda i, e, w, b: grad(lambda *args: f(i[0], *args).pow(3).sum(), (0, 1, 2))(e[0], w[0], b[0]),
    "grad of grad": lambda f: lambda i, e, w, b: grad(lambda e: grad(lambda w: f(i[0], e, w, b[0]).pow(3).sum())(w[0]).pow(2).sum())(e[0]),
    "gradients per sample": lambda f: (
        lambda i, e, w, b: vmap(grad(lambda e, w, b, i: f(i, e, w, b).pow(3).sum(), (0, 1, 2)), (None, None, None, 0))(e[0], w[0], b[0], i)
    ),
}


@of_each_kind
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_functional_transforms(transform, activation, strict_dtype, device):
    shape = Shape(B=1, T=7, C=4, V=5, d=2)
    stacks = [torch.stack(pair) for pair in zip(*(make_inputs(shape, activation, strict_dtype, device)[:4] for _ in range(2)), strict=True)]
    got, want = (transform(lambda *args, f=f: f(*args, 2, activation))(*stacks) for f in (FOLDED, unfolded))
    tolerance = dict(rtol=1e-4, atol=1e-4) if strict_dtype == torch.float32 else {}
    torch.testing.assert_close(got, want, **tolerance)


def test_double_backward(strict_dtype, device):
    inputs = make_inputs(Shape(T=9), "gelu", strict_dtype, device)

    def second(function):
        weight, embedding = (x.detach().requires_grad_() for x in (inputs.weight, inputs.embedding))
        y = function(*inputs._replace(weight=weight, embedding=embedding).forward)
        (first,) = torch.autograd.grad(y, embedding, inputs.grad_y, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), (weight, embedding))

    torch.testing.assert_close(second(FOLDED), second(unfolded), rtol=1e-4, atol=1e-4)


def test_forward_mode_is_refused(device):
    """A clear error: never a silent zero. Below, torch.func's."""
    inputs = make_inputs(Shape(), "gelu", torch.float32, device)

    def f(embedding):
        return FOLDED(*inputs._replace(embedding=embedding).forward)

    with pytest.raises(NotImplementedError, match="forward-mode"), torch.autograd.forward_ad.dual_level():
        f(torch.autograd.forward_ad.make_dual(inputs.embedding, torch.ones_like(inputs.embedding)))


def test_jvp(strict_dtype, device):
    """In steps under torch.func, where PyTorch's own is right."""
    inputs = make_inputs(Shape(), "gelu", strict_dtype, device)
    tangent = torch.randn_like(inputs.embedding)
    got, want = (jvp(lambda e, f=f: f(*inputs._replace(embedding=e).forward), (inputs.embedding,), (tangent,)) for f in (FOLDED, unfolded))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_autocast(device):
    """Everything in the autocast dtype, the gradients in those of the leaves; numbers as those of tensors cast by hand."""
    inputs = make_inputs(Shape(T=67), "gelu", torch.float32, device)

    def cast(*args):
        with torch.autocast(device.type, dtype=HALF):
            return FOLDED(*args)

    got, want = run(cast, inputs), run(FOLDED, inputs.map(lambda x: x.to(HALF)))
    assert got["y"].dtype == HALF
    for name, value in got.items():
        assert name == "y" or value.dtype == torch.float32
        assert torch.equal(value, want[name].to(value.dtype)), name


@pytest.mark.parametrize("packed", [False, True])
def test_only_the_arguments_are_saved(packed, device):
    """Nothing that grows with time but the ids."""
    inputs = make_inputs(Shape(B=1, T=5000, C=8), "gelu", torch.float32, device, starts=[0, 3000, 5000] if packed else None)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        FOLDED(*inputs._replace(embedding=inputs.embedding.requires_grad_()).forward)
    assert saved
    assert all(x.data_ptr() == inputs.ids.data_ptr() or x.numel() < 5000 for x in saved)


@needs_cuda
def test_cuda_graphs_in_a_fresh_process():
    run_python("""
import torch
from fuzzytok_kernels import FuzzyTokenizer
torch.backends.cudnn.allow_tf32 = False  # or the last bit of Inductor's two LayerNorms becomes one of TF32's
net = FuzzyTokenizer(dim=32, dilations=(1, 2)).cuda()
compiled, graphless = torch.compile(net, mode="reduce-overhead", fullgraph=True), torch.compile(net, fullgraph=True)
for _ in range(4):
    ids = torch.randint(256, (4, 64), device="cuda", dtype=torch.uint8)
    torch.compiler.cudagraph_mark_step_begin()
    y = compiled(ids)
    got = y.detach().clone(), *torch.autograd.grad(y.square().sum(), [*net.parameters()])
    y = graphless(ids)  # of the same kernels: eager ones round elsewhere, to 2e-5 apart
    want = y.detach(), *torch.autograd.grad(y.square().sum(), [*net.parameters()])
    for one, other in zip(got, want, strict=True):  # Inductor's two LayerNorms differ in the last bit, which sums over 256 steps carry on
        assert (one - other).norm() <= 1e-6 * other.norm()
""")


def test_reference_is_the_composition(device):
    for activation in ("gelu", "glu", "none"):
        inputs = make_inputs(Shape(B=1, T=30), activation, torch.float64, device, starts=[0, 7, 7, 30])
        torch.testing.assert_close(reference.byte_causal_conv1d(*inputs.forward), unfolded(*inputs.forward))
        got = reference.byte_causal_conv1d_grad(*inputs.backward)
        want = [value for name, value in run(unfolded, inputs).items() if name != "y"]
        torch.testing.assert_close(got, tuple(want))
