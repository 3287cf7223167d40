"""FuzzyTokenizer.step: any chunking is the full pass, slots, resets, graphs; and the two ops that it is made of."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from modes import HALF, KERNELS_RUN, ON_CUDA, needs_cuda
from oracle import LAYOUTS, poisoned, randn
from test_tokenizer import plain
from torch import Tensor

from fuzzytok_kernels import FuzzyTokenizer, ResidualCausalBlock, StreamState

STACK = torch.ops.fuzzytok.residual_stack_update.default
EMBED = torch.ops.fuzzytok.embedding_norm.default
OPTIONS = {
    "three blocks": {},
    "a gate, two taps, a projection": {"activation": "glu", "kernel_size": 2, "dilations": (3, 1), "embedding_dim": 10},
    "one tap": {"kernel_size": 1, "dilations": (1, 1)},
    "no blocks": {"dilations": ()},
    "7 channels, special ids": {"dim": 7, "num_special": 4},
    "a long history": {"dilations": (1, 20)},
}
CHUNKS = {"one by one": [1] * 9, "mixed": [2, 0, 1, 6, 1], "many at once": [3, 13, 1]}


@pytest.fixture(autouse=True)
def strict_fp32(strict_dtype):
    """TF32 off."""


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """From 25 rows on the ordinary convolution takes over, so that the tests of it are short."""
    if not KERNELS_RUN:
        yield
        return
    from fuzzytok_kernels.streaming import launch

    monkeypatch.setattr(launch, "MOST_ROWS", 24)
    launch._stack_plan.cache_clear()
    yield
    launch._stack_plan.cache_clear()


def small(device, **options) -> FuzzyTokenizer:
    return FuzzyTokenizer(**{"dim": 16, "dilations": (1, 2, 4), **options}).to(device)


def random_ids(tokenizer: FuzzyTokenizer, B: int, T: int) -> Tensor:
    return torch.randint(tokenizer.num_ids, (B, T), device=tokenizer.embedding.weight.device)


def stream(tokenizer: FuzzyTokenizer, ids: Tensor, chunks: list[int], state: StreamState, slots: Tensor | None = None) -> Tensor:
    ends = torch.tensor([0, *chunks]).cumsum(0).tolist()
    with poisoned():
        return torch.cat([tokenizer.step(ids[:, begin:end], state, slots) for begin, end in itertools.pairwise(ends)], 1)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


# ---- the same as the full pass


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_any_chunking_is_the_full_pass(options, chunks, device):
    tokenizer = small(device, **options)
    ids = random_ids(tokenizer, 2, sum(chunks))
    state = tokenizer.init_state(2)
    close(stream(tokenizer, ids, chunks, state), tokenizer(ids))
    assert state.positions.tolist() == [sum(chunks)] * 2


def test_every_dtype_is_as_near_as_the_full_pass(dtype, device):
    tokenizer = small(device).to(dtype)
    ids = random_ids(tokenizer, 3, 25)
    exact = plain(copy.deepcopy(tokenizer).cpu().double(), ids.cpu())
    zs = stream(tokenizer, ids, [1, 7] * 3 + [1], tokenizer.init_state(3)), tokenizer(ids)
    errors = [(z.double().cpu() - exact).norm().item() for z in zs]
    assert errors[0] <= 2 * errors[1] + 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * exact.norm()


def test_beyond_several_receptive_fields(device):
    tokenizer = small(device)
    ids = random_ids(tokenizer, 2, 32)
    assert tokenizer.receptive_field == 15
    close(stream(tokenizer, ids, [1] * 32, tokenizer.init_state(2)), tokenizer(ids))


def test_more_rows_than_a_block(device):
    tokenizer = small(device)
    ids = random_ids(tokenizer, 19, 2)
    close(stream(tokenizer, ids, [1, 1], tokenizer.init_state(19)), tokenizer(ids))


def test_uint8_ids_of_any_strides(device):
    tokenizer = small(device)
    ids = torch.randint(256, (6, 4), dtype=torch.uint8, device=device).t()[:, ::2]
    state = tokenizer.init_state(4)
    z = torch.cat([tokenizer.step(ids[:, t : t + 1], state) for t in range(3)], 1)
    close(z, tokenizer(ids))


def test_weights_that_lie_otherwise(device):
    tokenizer = small(device)
    for block in tokenizer.blocks:
        block.conv.weight = torch.nn.Parameter(block.conv.weight.detach().contiguous())
    ids = random_ids(tokenizer, 2, 6)
    close(stream(tokenizer, ids, [1, 3, 2], tokenizer.init_state(2)), tokenizer(ids))


def test_under_autocast(device):
    tokenizer = small(device)
    ids = random_ids(tokenizer, 2, 12)
    with torch.autocast(device.type, HALF):
        state = tokenizer.init_state(2)
        got, want = stream(tokenizer, ids, [1] * 4 + [8], state), tokenizer(ids)
    assert state.history.dtype == got.dtype == want.dtype == HALF
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.05)
    with pytest.raises(TypeError, match=f"history has dtype {HALF}; expected the dtype that x has or is cast to, torch.float32"):
        tokenizer.step(ids, state)


def test_without_gradients(device):
    tokenizer = small(device)
    assert not tokenizer.step(random_ids(tokenizer, 1, 3), tokenizer.init_state(1)).requires_grad


# ---- the state


def test_the_state_is_no_larger_than_the_histories(device):
    tokenizer = FuzzyTokenizer(dim=32).to(device)
    state = tokenizer.init_state(5)
    assert state.history.shape == (5, tokenizer.receptive_field - 1, 32)
    assert state.positions.shape == (5,)
    assert state.history.device.type == state.positions.device.type == device.type
    assert (state.history == 0).all()
    with pytest.raises(ValueError, match="slots is 0; expected at least 1"):
        tokenizer.init_state(0)


@pytest.mark.parametrize("L", [1, 7])
def test_slots_in_any_order_and_empty_rows(L, device):
    tokenizer = small(device)
    ids = random_ids(tokenizer, 4, 9 + L)
    state = tokenizer.init_state(6)
    slots = torch.tensor([5, 2, 0, 3], dtype=torch.int32, device=device)
    stream(tokenizer, ids[:, :9], [1, 8], state, slots)
    before = [value.clone() for value in state]
    slots = torch.tensor([5, -1, 0, 6], device=device)
    z = stream(tokenizer, ids[:, 9:], [L], state, slots)
    close(z[[0, 2]], tokenizer(ids)[[0, 2], 9:])
    assert (z[[1, 3]] == 0).all()
    for now, then in zip(state, before, strict=True):
        assert torch.equal(now[1:5], then[1:5])
    assert state.positions.tolist() == [9 + L, 0, 9, 9, 0, 9 + L]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_slot_begins_anew(as_tensor, device):
    tokenizer = small(device)
    ids = random_ids(tokenizer, 3, 14)
    state = tokenizer.init_state(3)
    stream(tokenizer, ids[:, :9], [9], state)
    state.reset(torch.tensor([0, 2], device=device, dtype=torch.int32) if as_tensor else [0, 2])
    assert state.positions.tolist() == [0, 9, 0]
    z = stream(tokenizer, ids[:, 9:], [1, 4], state)
    close(z[1], tokenizer(ids)[1, 9:])
    close(z[[0, 2]], tokenizer(ids[:, 9:])[[0, 2]])
    state.reset()
    close(stream(tokenizer, ids, [14], state), tokenizer(ids))
    state.reset(1)
    assert state.positions.tolist() == [14, 0, 14]


def test_saved_and_loaded_without_unpickling(device):
    tokenizer, file = small(device), io.BytesIO()
    ids, state = random_ids(tokenizer, 2, 12), tokenizer.init_state(2)
    stream(tokenizer, ids[:, :9], [9], state)
    torch.save(tuple(state), file)
    file.seek(0)
    loaded = StreamState(*torch.load(file, weights_only=True))
    assert torch.equal(tokenizer.step(ids[:, 9:], loaded), tokenizer.step(ids[:, 9:], state))


def test_reset_of_slots_that_there_are_not(device):
    tokenizer = small(device)
    state = tokenizer.init_state(3)
    stream(tokenizer, random_ids(tokenizer, 3, 9), [9], state)
    before = state.history.clone()
    for slots in (torch.tensor([-1, 3], device=device), [-1, 7], -3, []):
        state.reset(slots)
        assert torch.equal(state.history, before)
        assert state.positions.tolist() == [9, 9, 9]
    state.reset(torch.tensor([-1, 1], device=device))
    assert state.positions.tolist() == [9, 0, 9]
    for slots in (torch.tensor([True, False, True], device=device), [0.5]):
        with pytest.raises(TypeError, match=r"slots has dtype torch\.\w+; expected int32 or int64"):
            state.reset(slots)


@pytest.mark.parametrize("block", [dict(activation="relu"), dict(norm="layer"), None], ids=str)
def test_blocks_that_a_step_does_not_compute_are_refused(block, device):
    tokenizer = small(device)
    tokenizer.blocks[1] = torch.nn.Identity() if block is None else ResidualCausalBlock(16, 3, 2, **block).to(device)
    state = tokenizer.init_state(1)
    with pytest.raises(ValueError, match=r"^blocks\[1\] is .*; expected a ResidualCausalBlock without a norm, with activation='gelu'"):
        tokenizer.step(random_ids(tokenizer, 1, 4), state)
    assert state.positions.tolist() == [0]


def test_after_a_billion_bytes(device):
    """Nothing but where the circles begin depends on the position."""
    tokenizer = small(device)
    ids = random_ids(tokenizer, 2, 12)
    state = tokenizer.init_state(2)
    state.positions.fill_(2**31 - 5)
    close(stream(tokenizer, ids, [1] * 12, state), tokenizer(ids))
    assert state.positions.tolist() == [2**31 + 7] * 2


# ---- compiled and captured


def test_compiles_once_for_all_lengths(device):
    torch._dynamo.reset()
    tokenizer = small(device)
    states = tokenizer.init_state(2), tokenizer.init_state(2)
    compiled = torch.compile(tokenizer.step, fullgraph=True, dynamic=True, backend="inductor" if ON_CUDA else "aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for L in (5, 9, 3):
            ids = random_ids(tokenizer, 2, L)
            close(compiled(ids, states[0]), tokenizer.step(ids, states[1]))
            close(states[0].history, states[1].history)
    assert states[0].positions.tolist() == [17, 17]


@needs_cuda
@pytest.mark.parametrize("B", [1, 20])
def test_in_a_cuda_graph(B, device):
    tokenizer = small(device)
    ids = random_ids(tokenizer, B, 60)
    state, now = tokenizer.init_state(B), ids[:, :1].clone()
    tokenizer.step(now, state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = tokenizer.step(now, state)
    state.reset()
    zs = []
    for t in range(60):
        now.copy_(ids[:, t : t + 1])
        graph.replay()
        zs.append(z.clone())
    close(torch.cat(zs, 1), tokenizer(ids))


@needs_cuda
def test_many_replays_agree_to_the_bit(device):
    """A race between launches that overlap would show as a difference between two runs of the same bytes."""
    tokenizer = FuzzyTokenizer().to(device, torch.bfloat16)
    ids = random_ids(tokenizer, 64, 1)
    state = tokenizer.init_state(64)
    tokenizer.step(ids, state)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        z = tokenizer.step(ids, state)
    results = []
    for _ in range(20):
        state.reset()
        for _ in range(100):
            graph.replay()
        results.append((z.clone(), state.history.clone()))
    for z, history in results[1:]:
        assert torch.equal(z, results[0][0])
        assert torch.equal(history, results[0][1])


# ---- the two ops


def stack_arguments(device, activation="gelu", slots=None, dtype=torch.float32, layout="channels-last", L=3) -> tuple:
    parts = 2 if activation == "glu" else 1
    kernel_sizes, dilations = (3, 1, 2), [2, 5, 4]
    weights = [randn((parts * 8, 8, K), dtype, device, scale=0.2) for K in kernel_sizes]
    biases = [torch.randn(parts * 8, device=device).to(dtype) for _ in weights]
    x, history = randn((2, 8, L), dtype, device, LAYOUTS[layout]), torch.zeros(3 if slots else 2, 8, 8, dtype=dtype, device=device)
    indices = None if slots is None else torch.tensor(slots, dtype=torch.int32, device=device)
    return x, history, torch.zeros(len(history), dtype=torch.long, device=device), indices, weights, biases, dilations, activation


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh", "glu", "tanh_sigmoid"])
def test_a_stack_is_its_blocks(activation, device):
    """Of any activation and of kernel sizes that differ, a block without a history among them."""
    blocks = [ResidualCausalBlock(8, K, d, activation).to(device) for K, d in ((3, 2), (1, 1), (2, 4))]
    x = torch.randn(2, 8, 9, device=device)
    history, positions = x.new_zeros(2, 8, 8), torch.zeros(2, dtype=torch.int32, device=device)
    layers = [block.conv.weight for block in blocks], [block.conv.bias for block in blocks], [block.conv.dilation for block in blocks]
    with torch.no_grad():
        got = torch.cat([STACK(x[:, :, t : t + 1], history, positions, None, *layers, activation) for t in range(9)], 2)
        want = torch.nn.Sequential(*blocks)(x)
    close(got, want)
    assert positions.tolist() == [9, 9]


@pytest.mark.parametrize("slots", [None, (2, -1)], ids=["in order", "by slot"])
@pytest.mark.parametrize("layout", ["channels-first", "channels-last", "channels-last, slice in time", "one step for all"])
def test_stack_opcheck(layout, slots, device):
    torch.library.opcheck(STACK, stack_arguments(device, slots=slots, layout=layout))


def test_embed_opcheck(device):
    ids = torch.randint(7, (2, 5), device=device)
    torch.library.opcheck(
        EMBED, (ids, torch.randn(7, 5, device=device), torch.randn(5, device=device), torch.randn(5, device=device), 1e-5)
    )


@pytest.mark.parametrize("channels", [1, 5, 600])
def test_embedding_norm(channels, dtype, device):
    table, weight, bias = (torch.randn(*shape, channels, device=device).to(dtype) for shape in ((300,), (), ()))
    ids = torch.randint(300, (3, 7), device=device)
    with poisoned():
        got = EMBED(ids, table, weight, bias, 1e-3)
    torchs = F.layer_norm(table[ids], (channels,), weight, bias, 1e-3)
    want = F.layer_norm(table.double()[ids], (channels,), weight.double(), bias.double(), 1e-3)
    assert got.dtype == dtype
    allowed = 2 * (torchs.double() - want).abs().max() + 32 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * want.abs().max()
    assert (got.double() - want).abs().max() <= allowed


def test_ids_that_there_are_not(device):
    tokenizer = small(device)
    for bad in (-1, 256):
        ids = torch.tensor([[65, bad, 66]], device=device)
        if KERNELS_RUN:  # a check would wait for the GPU
            z = tokenizer.step(ids, tokenizer.init_state(1))
            assert z[:, 0].isfinite().all()
            assert z[:, 1:].isnan().all()
        else:
            with pytest.raises(IndexError, match="expected 0 to 255"):
                tokenizer.step(ids, tokenizer.init_state(1))


@pytest.mark.parametrize("ids", [b"bytes", "text", [[1, 2]]], ids=repr)
def test_what_is_no_tensor(ids, device):
    tokenizer = small(device)
    for call in (lambda: tokenizer.step(ids, tokenizer.init_state(1)), lambda: tokenizer(ids)):
        with pytest.raises(TypeError, match=r"^ids is of type (bytes|str|list); expected a tensor \(batch, time\), as .*encode makes it$"):
            call()


@pytest.mark.parametrize(
    ("exception", "changes", "says"),
    [
        (ValueError, lambda new: {0: new(2, 8)}, "x has shape (2, 8)"),
        (
            ValueError,
            lambda new: {1: new(2, 9, 8)},
            "history has shape (2, 9, 8); expected (slots, the sum of (K-1)*dilation, C), (2, 8, 8)",
        ),
        (ValueError, lambda new: {1: new(3, 8, 8)}, "positions has shape (2,); expected one a slot of history, (3,)"),
        (ValueError, lambda new: {1: new(3, 8, 8), 2: new(3).long()}, "history has 3 slots and x 2 rows; expected as many, or slots"),
        (TypeError, lambda new: {1: new(2, 8, 8).half()}, "history has dtype torch.float16"),
        (TypeError, lambda new: {2: new(2)}, "positions has dtype torch.float32; expected int32 or int64"),
        (ValueError, lambda new: {3: new(3).long()}, "slots has shape (3,); expected one a row of x, (2,)"),
        (ValueError, lambda new: {6: [2, 5]}, "there are 3 weights, 3 biases, 2 dilations; expected as many of each"),
        (ValueError, lambda new: {7: "glu"}, "weight has shape (8, 8, 3); expected one that returns the channels of x, 8"),
        (ValueError, lambda new: {7: "tanh"}, "activation is 'tanh'"),
        (ValueError, lambda new: {6: [2, 5, 0]}, "dilation is 0"),
    ],
)
def test_a_stack_refuses(exception, changes, says, device):
    args = list(stack_arguments(device))
    for index, value in changes(lambda *shape: torch.zeros(shape, device=device)).items():
        args[index] = value
    with pytest.raises(exception) as caught:
        STACK(*args)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("exception", "changes", "says"),
    [
        (ValueError, lambda new: {0: new(3).long()}, "ids has shape (3,); expected 2 dimensions (batch, time); add a batch"),
        (TypeError, lambda new: {0: new(3, 3)}, "ids has dtype torch.float32; expected uint8 or int64"),
        (ValueError, lambda new: {1: new(7)}, "embedding has shape (7,); expected (num_ids, C), neither of them 0"),
        (ValueError, lambda new: {2: new(4)}, "weight has shape (4,); expected one value a channel, (5,)"),
        (TypeError, lambda new: {3: new(5).half()}, "bias has dtype torch.float16; expected the dtype of embedding"),
        (
            ValueError,
            lambda new: {0: torch.zeros(2, 2, dtype=torch.long, device="meta")},
            "ids is on meta; expected the device of embedding",
        ),
    ],
)
def test_an_embedding_refuses(exception, changes, says, device):
    def new(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    args = [new(2, 3).long(), new(7, 5), new(5), new(5), 1e-5]
    for index, value in changes(new).items():
        args[index] = value
    with pytest.raises(exception) as caught:
        EMBED(*args)
    assert str(caught.value).startswith(says)


def test_the_ops_refuse_gradients(device):
    args = list(stack_arguments(device))
    args[4][1].requires_grad_()
    with pytest.raises(RuntimeError, match=r"residual_stack_update has no derivative.*train with ResidualCausalBlock"):
        STACK(*args)
    assert (args[2] == 0).all()
    table = torch.ones(3, 4, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"embedding_norm has no derivative"):
        EMBED(torch.zeros(1, 1, dtype=torch.long, device=device), table, table[0], table[0], 1e-5)
