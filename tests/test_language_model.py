"""ByteLM: logits, loss and score; what it writes, how it is drawn, where it is cut."""

import math

import pytest
import torch
import torch.nn.functional as F
from modes import interpreter_cannot
from torch import Tensor

from fuzzytok_kernels import ByteLM
from fuzzytok_kernels.nn import language_model

pytestmark = interpreter_cannot("its kernels are those of test_streaming.py; here it would take minutes")


@pytest.fixture(autouse=True)
def strict_fp32(strict_dtype):
    """TF32 off."""


def small(device, **options) -> ByteLM:
    return ByteLM(**{"dim": 16, "dilations": (1, 2), **options}).to(device)


def texts(model: ByteLM, prompts, max_bytes: int, **options) -> list[bytes]:
    """All that is written behind each prompt, as bytes."""
    pieces = list(model.generate(prompts, max_bytes, errors="surrogateescape", **options))
    assert all(any(row) for row in pieces), "nothing new was given"
    return ["".join(column).encode("utf-8", "surrogateescape") for column in zip(*pieces, strict=True)]


def likeliest(model: ByteLM, prompt: bytes, count: int, begin: tuple = ()) -> bytes:
    """The likeliest byte, `count` times, each from the whole text before it."""
    ids = [*begin, *prompt]
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids], device=model.head.weight.device))[0, -1, :256].argmax()))
    return bytes(ids[len(begin) + len(prompt) :])


# ---- logits and loss


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_loss(tied, device):
    model = small(device, tied=tied, num_special=1)
    ids, lengths = model.tokenizer.encode(["a text", "é"])
    logits = model(ids)
    assert logits.shape == (2, 6, 257)
    torch.testing.assert_close(logits, model.head(model.tokenizer(ids)))
    each = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none") / math.log(2)
    torch.testing.assert_close(model.loss(ids, lengths), torch.cat([each[0], each[1, :1]]).mean())
    torch.testing.assert_close(model.loss(ids), each.mean())
    assert model.loss(ids) < 11
    assert (model.head.weight is model.tokenizer.embedding.weight) == tied


def test_what_is_padding_does_not_matter(device):
    model = small(device)
    ids, lengths = torch.randint(256, (2, 9), device=device), torch.tensor([4, 9], device=device)
    changed = ids.clone()
    changed[0, 4:] = 7
    torch.testing.assert_close(model.loss(ids, lengths), model.loss(changed, lengths))


def test_a_tied_weight_gets_both_gradients(device):
    model = small(device, tied=True)
    ids = torch.randint(100, (2, 9), device=device)
    model.loss(ids).backward()
    grad = model.tokenizer.embedding.weight.grad
    assert (grad[:100].norm(), grad[100:].norm()) > (0, 0)
    assert len(list(model.parameters())) == 4 + 4


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_score_is_the_loss_in_any_chunks(chunk, device):
    model = small(device)
    ids = torch.randint(256, (30,), dtype=torch.uint8, device=device)
    assert model.score(ids, chunk) == pytest.approx(model.loss(ids[None]).item(), rel=1e-4)


def test_score_wants_a_text(device):
    for ids in (torch.zeros(1, dtype=torch.uint8), torch.zeros(1, 9, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"ids has shape .*; expected \(T,\), at least 2 ids"):
            small(device).score(ids.to(device))
    for chunk in (0, -1):
        with pytest.raises(ValueError, match=f"chunk is {chunk}; expected at least 1"):
            small(device).score(torch.zeros(9, dtype=torch.uint8, device=device), chunk)


# ---- what is written


def test_the_likeliest_bytes_for_prompts_of_any_lengths(device):
    model = small(device)
    assert model.tokenizer.receptive_field == 7
    prompts = [b"a", b"abc", b"longer than seven", b"xyz", b"\xff\x00\xfe"]
    assert texts(model, prompts, 9, temperature=0) == [likeliest(model, prompt, 9) for prompt in prompts]
    assert texts(model, "naïve", 5, temperature=0) == [likeliest(model, "naïve".encode(), 5)]


def test_a_begin_id_is_in_front(device):
    model = small(device, num_special=2)
    prompts = ["", "ab", "exactly7", "longer than the receptive field"]
    want = [likeliest(model, prompt.encode(), 6, (model.tokenizer.begin_id,)) for prompt in prompts]
    assert texts(model, prompts, 6, temperature=0) == want


def test_no_prompts_and_no_bytes(device):
    model = small(device)
    assert list(model.generate([], 5)) == []
    assert list(model.generate("a", 0)) == []


def test_it_is_written_as_it_is_asked_for(device, monkeypatch):
    model = small(device)
    steps = []
    step = model.tokenizer.step
    monkeypatch.setattr(model.tokenizer, "step", lambda *args: steps.append(1) or step(*args))
    monkeypatch.setattr(language_model, "_Sampler", lambda *args: scripted([b"abcdef"], device))
    pieces = model.generate("x", 6)
    assert steps == []
    for count in range(1, 7):
        assert next(pieces) == ["abcdef"[count - 1]]
        assert len(steps) == count
    assert next(pieces, None) is None


def scripted(rows: list, device):
    """A sampler that draws what it is told."""
    columns = iter(zip(*rows, strict=True))
    return lambda logits: torch.tensor(next(columns), device=device)


@pytest.mark.parametrize(
    ("written", "pieces"),
    [
        ("aé日😀", ["a", "", "é", "", "", "日", "", "", "", "😀"]),
        (b"\xc3a", ["", "\ufffda"]),
        (b"a\xe6\x97", ["a", "", "\ufffd"]),
        (b"\xff\xfe", ["\ufffd", "\ufffd"]),
    ],
    ids=["one to four bytes", "a character that breaks off", "one that the end cuts off", "no UTF-8 at all"],
)
def test_pieces_end_where_characters_do(written, pieces, device, monkeypatch):
    written = written.encode() if isinstance(written, str) else written
    monkeypatch.setattr(language_model, "_Sampler", lambda *args: scripted([written, b"." * len(written)], device))
    got = list(small(device).generate(["p", "q"], len(written)))
    assert [piece for piece, _ in got] == pieces
    assert [piece for _, piece in got] == ["."] * len(written)


def test_nothing_is_given_where_nothing_is_new(device, monkeypatch):
    monkeypatch.setattr(language_model, "_Sampler", lambda *args: scripted(["日".encode()], device))
    assert list(small(device).generate("p", 3)) == [["日"]]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_the_prompt_began(cut, device, monkeypatch):
    before, after = "é😀".encode()[: 2 + cut], "😀".encode()[cut:]
    monkeypatch.setattr(language_model, "_Sampler", lambda *args: scripted([after + b"!"], device))
    assert list(small(device).generate(before, 5 - cut)) == [["😀"], ["!"]]


def test_stop_bytes_and_the_end_id(device, monkeypatch):
    model = small(device, num_special=3)
    rows = [b"ab\ncd", [97, 258, 98, 99, 100], b"ab.cd", b"ab\xc3.d", b"abcde"]
    monkeypatch.setattr(language_model, "_Sampler", lambda *args: scripted(rows, device))
    got = list(model.generate(["p"] * 5, 5, stop=b".\n"))
    assert ["".join(column) for column in zip(*got, strict=True)] == ["ab", "a", "ab", "ab\ufffd", "abcde"]
    monkeypatch.setattr(language_model, "_Sampler", lambda *args: scripted([b"a.b", b".bc"], device))
    assert list(model.generate(["p", "q"], 3, stop=b".")) == [["a", ""]]


def test_errors_say_what_invalid_bytes_become(device, monkeypatch):
    monkeypatch.setattr(language_model, "_Sampler", lambda *args: scripted([b"\xffa"], device))
    assert [piece for (piece,) in small(device).generate("p", 2, errors="surrogateescape")] == ["\udcff", "a"]


# ---- how it is drawn


def test_seeds(device):
    model = small(device)
    first, again, other = (texts(model, ["ab", "c"], 20, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    torch.manual_seed(5)
    drawn = texts(model, "ab", 20)
    torch.manual_seed(5)
    assert texts(model, "ab", 20) == drawn
    assert texts(model, "ab", 20) != drawn


def test_one_candidate_or_no_temperature_is_the_likeliest(device):
    model = small(device)
    want = texts(model, "ab", 8, temperature=0)
    assert texts(model, "ab", 8, top_k=1) == want
    for temperature in (1e-4, 1e-45, 1e-300):
        assert texts(model, "ab", 8, temperature=temperature, seed=0) == want


def draws(logits: Tensor, temperature: float, top_k: int | None, end_id: int | None = None) -> Tensor:
    """The share of each id in 20,000 draws."""
    generator = torch.Generator(logits.device).manual_seed(0)
    sampler = language_model._Sampler(end_id, temperature, top_k, generator)
    return torch.bincount(sampler(logits.expand(20_000, -1)), minlength=logits.shape[0]) / 20_000


def test_draws_follow_the_distribution(device):
    logits = torch.full((260,), -30.0, device=device)
    logits[:4] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    for temperature in (1.0, 2.5):
        want = (logits[:4] / temperature).softmax(0)
        torch.testing.assert_close(draws(logits, temperature, None)[:4], want, atol=0.015, rtol=0)
    two = draws(logits, 1.0, 2)
    assert two[:2].sum() == 0
    torch.testing.assert_close(two[2:4], logits[2:4].softmax(0), atol=0.015, rtol=0)
    assert draws(logits, 1.0, 1000)[:4].sum() == 1


def test_equal_logits_are_no_more_candidates(device):
    """In bf16 many are equal: one candidate is still one."""
    logits = torch.zeros(300, device=device)
    for top_k in (1, 5, 256, 290):
        assert (draws(logits, 1.0, top_k) > 0).sum() == min(top_k, 256)


def test_special_ids_but_the_end_are_never_drawn(device):
    logits = torch.zeros(260, device=device)
    logits[256:] = 20.0
    shares = draws(logits, 1.0, None, end_id=258)
    assert shares[[256, 257, 259]].sum() == 0
    assert shares[258] > 0.99
    assert draws(logits, 1.0, None)[256:].sum() == 0
    assert language_model._Sampler(None, 0, None, None)(logits[None]) < 256


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        (["a", ""], {}, "prompts has an empty one; expected at least a byte each"),
        ("a", dict(max_bytes=-1), "max_bytes is -1; expected at least 0"),
        ("a", dict(temperature=-0.5), "temperature is -0.5; expected a finite number from 0 on"),
        ("a", dict(temperature=math.inf), "temperature is inf"),
        ("a", dict(temperature=math.nan), "temperature is nan"),
        ("a", dict(top_k=0), "top_k is 0; expected at least 1"),
        ("a", dict(seed=2**64), r"seed is 18446744073709551616; expected at least -2\*\*63 and below 2\*\*64"),
    ],
    ids=str,
)
def test_refused_at_once(prompts, options, says, device):
    with pytest.raises(ValueError, match=f"^{says}"):
        small(device).generate(prompts, **options)


def test_other_refusals(device):
    for prompts, says in (
        (["a", 5], "prompts has one of type int"),
        (5, "prompts is of type int"),
        (bytearray(b"a"), "prompts is of type"),
    ):
        with pytest.raises(TypeError, match=says):
            small(device).generate(prompts)
    for options in (dict(stop="\n"), dict(stop=[b"\n"]), dict(top_k=2.5), dict(max_bytes=1.5), dict(seed=0.5), dict(seed="0")):
        with pytest.raises(TypeError, match=f"^{next(iter(options))} is .*; expected "):
            small(device).generate("a", **options)
    with pytest.raises(LookupError):
        small(device).generate("a", errors="magic")
