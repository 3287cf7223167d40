"""FuzzyTokenizer, its text helpers and bits_per_byte."""

import math

import pytest
import torch
import torch.nn.functional as F
from modes import HALF, INTERPRETED, ON_CUDA
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fuzzytok_kernels import FuzzyTokenizer, bits_per_byte


@pytest.fixture(autouse=True)
def strict_fp32(strict_dtype):
    """TF32 off."""


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of fp32 additions."""
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-3)


def small(device: torch.device, **options) -> FuzzyTokenizer:
    return FuzzyTokenizer(**{"dim": 16, "dilations": (1, 2, 4), **options}).to(device)


def random_ids(device: torch.device, B: int = 2, T: int = 20) -> Tensor:
    return torch.randint(256, (B, T), dtype=torch.uint8, device=device)


def plain(tokenizer: FuzzyTokenizer, ids: Tensor) -> Tensor:
    """What the paper's equations say, in PyTorch's own functions."""
    h = tokenizer.norm(tokenizer.embedding(ids.long())).transpose(1, 2)
    for block in tokenizer.blocks:
        weight, dilation = block.conv.weight, block.conv.dilation
        padded = F.pad(h, ((weight.shape[2] - 1) * dilation, 0))
        h = h + F.gelu(F.conv1d(padded, weight.flip(2), block.conv.bias, dilation=dilation))
    return tokenizer.projection(h.transpose(1, 2))


# ---- the equations


def test_embedding_is_equation_1(device):
    tokenizer = small(device, dilations=())
    ids = random_ids(device)
    e = tokenizer.embedding.weight[ids.long()]
    expected = (e - e.mean(2, keepdim=True)) / (e.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    close(tokenizer(ids), expected)


@pytest.mark.parametrize("options", [{}, {"embedding_dim": 10}, {"kernel_size": 2, "dilations": (3, 1)}, {"dim": 7}], ids=str)
def test_the_same_model_in_plain_pytorch(options, device):
    tokenizer = small(device, **options)
    ids = random_ids(device)
    probe = torch.randn_like(tokenizer(ids))
    parameters = list(tokenizer.parameters())
    close(tokenizer(ids), plain(tokenizer, ids))
    gradients = torch.autograd.grad((tokenizer(ids) * probe).sum(), parameters)
    expected = torch.autograd.grad((plain(tokenizer, ids) * probe).sum(), parameters)
    for (name, _), gradient, wanted in zip(tokenizer.named_parameters(), gradients, expected, strict=True):
        assert (gradient - wanted).norm() <= 1e-4 * wanted.norm(), name


def test_receptive_field_is_equation_4():
    assert FuzzyTokenizer(dim=4).receptive_field == 43
    assert FuzzyTokenizer(dim=4, dilations=(1, 2, 4) * 2).receptive_field == 29
    assert FuzzyTokenizer(dim=4, kernel_size=5, dilations=(1, 3)).receptive_field == 17
    assert FuzzyTokenizer(dim=4, dilations=()).receptive_field == 1


def seen(tokenizer: FuzzyTokenizer, ids: Tensor, t: int) -> list[int]:
    """The positions whose embedding the output at t has a gradient for."""
    captured: list[Tensor] = []
    hook = tokenizer.norm.register_forward_hook(lambda module, inputs, output: captured.append(output))
    z = tokenizer(ids)
    hook.remove()
    (gradient,) = torch.autograd.grad(z[:, t].square().sum(), captured)
    return gradient.abs().sum((0, 2)).nonzero().flatten().tolist()


@pytest.mark.parametrize(("kernel_size", "dilations"), [(3, (1, 2, 4) * 3), (3, (1, 2, 4) * 2), (2, (1, 5))])
def test_an_output_sees_its_receptive_field_and_nothing_later_by_gradient(kernel_size, dilations, device):
    tokenizer = small(device, kernel_size=kernel_size, dilations=dilations)
    t, field = 45, tokenizer.receptive_field
    positions = seen(tokenizer, random_ids(device, 1, 60), t)
    assert (positions[0], positions[-1]) == (t - field + 1, t)


@pytest.mark.parametrize("cut", [1, 13, 59])
def test_no_output_depends_on_a_later_byte(cut, device):
    tokenizer = small(device, dilations=(1, 2, 4) * 3, embedding_dim=8)
    ids = random_ids(device, 2, 60)
    changed = ids.clone()
    changed[:, cut:] += 1
    z, z_changed = tokenizer(ids), tokenizer(changed)
    assert torch.equal(z[:, :cut], z_changed[:, :cut])
    assert not torch.equal(z[:, cut], z_changed[:, cut])


# ---- shapes, dtypes, memory


@pytest.mark.parametrize("embedding_dim", [None, 10])
@pytest.mark.parametrize(("B", "T"), [(2, 20), (1, 1), (3, 0), (0, 5)])
def test_shapes(B, T, embedding_dim, device):
    z = small(device, embedding_dim=embedding_dim)(random_ids(device, B, T))
    assert z.shape == (B, T, embedding_dim or 16)


def test_z_is_a_view_of_the_last_block(device):
    tokenizer = small(device)
    outputs: list[Tensor] = []
    tokenizer.blocks[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    z = tokenizer(random_ids(device))
    assert z.is_contiguous()
    assert z.data_ptr() == outputs[0].data_ptr()


def test_uint8_and_long_are_the_same(device):
    tokenizer, ids = small(device), random_ids(device)
    assert torch.equal(tokenizer(ids), tokenizer(ids.long()))


def test_autocast(device):
    tokenizer, ids = small(device, embedding_dim=8), random_ids(device)
    with torch.autocast(device.type, HALF):
        z = tokenizer(ids)
    assert z.dtype == HALF
    expected = tokenizer(ids)
    assert (z - expected).norm() <= 0.02 * expected.norm()


def test_compiles_whole_for_every_batch_and_length(device):
    tokenizer = small(device, embedding_dim=8)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(tokenizer, fullgraph=True, dynamic=True, backend=counter)
    compiled(random_ids(device, 2, 20))
    after_the_first = counter.frame_count
    for B, T in [(3, 31), (5, 17), (7, 64)]:
        ids = random_ids(device, B, T)
        close(compiled(ids), tokenizer(ids))
    assert counter.frame_count == after_the_first


def test_per_sample_gradients(device):
    tokenizer, ids = small(device), random_ids(device, 3, 12)
    parameters = dict(tokenizer.named_parameters())

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(tokenizer, parameters, (row[None],)).square().mean()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    for i, row in enumerate(ids):
        alone = torch.func.grad(loss)(parameters, row)
        for name in parameters:
            close(together[name][i], alone[name])


# ---- text

TEXTS = [
    "",
    "a",
    "naïve café 日本語 🙂",
    "\x00\x00",
    b"",
    bytes(range(256)),
    b"\xff\xfe\x00\xc3",
    b"\xc3\xa9".decode(),
    b"a\xff".decode("utf-8", "surrogateescape"),
]


def as_bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("num_special", [0, 1, 6])
def test_any_text_comes_back_as_it_was(num_special, device):
    tokenizer = small(device, num_special=num_special)
    ids, lengths = tokenizer.encode(TEXTS)
    assert (ids.dtype, ids.shape, ids.device.type) == (torch.long, (len(TEXTS), 256), device.type)
    assert lengths.tolist() == [len(as_bytes(text)) for text in TEXTS]
    assert tokenizer.decode(ids, lengths) == [as_bytes(text) for text in TEXTS]
    for text in TEXTS:
        assert tokenizer.decode(*tokenizer.encode(text)) == [as_bytes(text)]


def test_str_with_invalid_utf8_comes_back_as_str(device):
    text = b"caf\xe9".decode("utf-8", "surrogateescape")
    (data,) = small(device).decode(*small(device).encode(text))
    assert data.decode("utf-8", "surrogateescape") == text
    assert data.decode(errors="replace") == "caf\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(("num_special", "fill"), [(0, 0), (1, 256)])
def test_padding_is_filled_and_changes_no_output(num_special, fill, device):
    tokenizer = small(device, num_special=num_special)
    ids, lengths = tokenizer.encode(["a longer line", "short"])
    assert ids[1, 5:].tolist() == [fill] * 8
    close(tokenizer(ids)[1, : lengths[1]], tokenizer(tokenizer.encode("short")[0])[0])


def test_nothing_to_encode(device):
    ids, lengths = small(device).encode([])
    assert (ids.shape, lengths.shape) == ((0, 0), (0,))
    assert small(device)(ids).shape == (0, 0, 16)


def test_decode_without_lengths_takes_all_and_leaves_specials_out(device):
    tokenizer = small(device, num_special=4)
    ids = torch.tensor([[tokenizer.begin_id, 104, 0, 105, tokenizer.end_id, tokenizer.pad_id]], device=device)
    assert tokenizer.decode(ids) == [b"h\x00i"]


@pytest.mark.parametrize(
    ("num_special", "named"),
    [(0, (None, None, None, None)), (1, (256, None, None, None)), (3, (256, 257, 258, None)), (9, (256, 257, 258, 259))],
)
def test_special_ids(num_special, named, device):
    tokenizer = small(device, num_special=num_special)
    assert (tokenizer.pad_id, tokenizer.begin_id, tokenizer.end_id, tokenizer.document_id) == named
    assert tokenizer.num_ids == len(tokenizer.embedding.weight) == 256 + num_special
    tokenizer(torch.tensor([[0, tokenizer.num_ids - 1]], device=device))


# ---- errors


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_other_dtypes_are_refused(dtype, device):
    with pytest.raises(TypeError, match=rf"ids has dtype {dtype}; expected uint8 or int64"):
        small(device)(torch.zeros(1, 4, dtype=dtype, device=device))


def test_other_ranks_are_refused(device):
    with pytest.raises(ValueError, match=r"ids has shape \(4,\); expected 2 dimensions \(batch, time\); add a batch dimension"):
        small(device)(torch.zeros(4, dtype=torch.long, device=device))
    with pytest.raises(ValueError, match="expected 2 dimensions"):
        small(device).decode(torch.zeros(1, 2, 3, dtype=torch.long))


@pytest.mark.skipif(ON_CUDA, reason="on a GPU it is a device-side assertion, which ends the process's use of the GPU")
@pytest.mark.parametrize("wrong", [-1, 257])
def test_ids_out_of_range_are_refused_on_the_cpu(wrong, device):
    with pytest.raises(IndexError, match=rf"ids reach from {min(wrong, 5)} to {max(wrong, 5)}; expected 0 to 256"):
        small(device, num_special=1)(torch.tensor([[5, wrong]], device=device))


@pytest.mark.parametrize("text", [5, None, ["a", 5], [["a"]]], ids=str)
def test_what_is_no_text_is_refused(text, device):
    with pytest.raises(TypeError):
        small(device).encode(text)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(num_special=-1), "num_special is -1; expected at least 0"),
        (dict(num_special=1.5), "num_special is 1.5; expected an integer"),
        (dict(dim=0), "dim is 0; expected at least 1"),
        (dict(dim=-1), "dim is -1; expected at least 1"),
        (dict(kernel_size="3"), "kernel_size is '3'; expected an integer"),
        (dict(dilations=3), "dilations is 3; expected a sequence of integers"),
        (dict(dilations=(1, 0)), "dilation is 0; expected at least 1"),
        (dict(dilations="12"), "dilation is '1'; expected an integer"),
        (dict(embedding_dim=0), "embedding_dim is 0; expected at least 1"),
    ],
    ids=str,
)
def test_a_tokenizer_refuses_by_name(wrong, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        FuzzyTokenizer(**{"dim": 8, **wrong})


def test_lengths_are_a_tensor_of_integers_one_a_row(device):
    ids, logits = torch.ones(2, 4, dtype=torch.long, device=device), torch.zeros(2, 4, 256, device=device)
    for call in (lambda lengths: small(device).decode(ids, lengths), lambda lengths: bits_per_byte(logits, ids, lengths)):
        for lengths in ([1, 2], torch.ones(2, device=device)):
            with pytest.raises(TypeError, match=r"^lengths (is of type list; expected a tensor|has dtype torch\.float32; expected int32)"):
                call(lengths)
        with pytest.raises(ValueError, match=r"^lengths has shape \(1,\); expected one a row of (ids|targets), \(2,\)"):
            call(torch.ones(1, dtype=torch.long, device=device))
    with pytest.raises(TypeError, match=r"targets has dtype torch\.float32; expected integers"):
        bits_per_byte(logits, ids.float())


# ---- bits_per_byte


@pytest.mark.parametrize("dtype", [torch.uint8, torch.long])
def test_equal_logits_are_eight_bits(dtype, device):
    targets = random_ids(device).to(dtype)
    assert bits_per_byte(torch.zeros(2, 20, 256, device=device), targets).item() == pytest.approx(8)


def test_bits_are_the_mean_over_real_positions(device):
    logits, targets, lengths = torch.randn(3, 5, 256, device=device), random_ids(device, 3, 5), torch.tensor([5, 2, 0], device=device)
    logits[1, 3] = torch.nan  # padding
    nats = [-logits[b, t].log_softmax(0)[targets[b, t].long()].item() for b, length in enumerate(lengths) for t in range(length)]
    assert bits_per_byte(logits, targets, lengths).item() == pytest.approx(sum(nats) / 7 / math.log(2), rel=1e-5)


def test_bits_of_half_logits_are_computed_in_fp32(device):
    logits, targets = torch.randn(2, 20, 256, device=device).bfloat16(), random_ids(device)
    bits = bits_per_byte(logits, targets)
    assert bits.dtype == torch.float32
    close(bits, bits_per_byte(logits.float(), targets))


def test_a_next_byte_head_learns_a_repeated_text(device):
    fold = not INTERPRETED  # the sums for 256 ids take the interpreter a second a step
    tokenizer, head = small(device, fold=fold), torch.nn.Linear(16, 256).to(device)
    ids, lengths = tokenizer.encode(["abcd" * 5, "abcd" * 3])
    optimizer = torch.optim.Adam([*tokenizer.parameters(), *head.parameters()], lr=0.02)
    bits = []
    for _ in range(20):
        loss = bits_per_byte(head(tokenizer(ids[:, :-1])), ids[:, 1:], lengths - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bits.append(loss.item())
    assert bits[-1] < 1 < bits[0]
