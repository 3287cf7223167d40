"""The look-ups by byte as callers meet them: errors, and the tokenizer that makes its first block of them."""

import copy
from contextlib import nullcontext

import pytest
import torch
from modes import ON_CUDA, needs_cuda
from test_byte_conv import FOLDED, FOLDED_GRAD, Shape, make_inputs, of_each_kind
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

from fuzzytok_kernels import FuzzyTokenizer, ResidualCausalBlock, byte_causal_conv1d

# ---- errors

REFUSED = [
    (ValueError, lambda new: dict(ids=new(9).long()), "ids has shape (9,); expected 2 dimensions (batch, time); add a batch dimension"),
    (TypeError, lambda new: dict(ids=new(2, 9).int()), "ids has dtype torch.int32; expected uint8 or int64"),
    (ValueError, lambda new: dict(embedding=new(11)), "embedding has shape (11,); expected 2 dimensions"),
    (ValueError, lambda new: dict(embedding=new(0, 6)), "embedding has shape (0, 6); expected 2 dimensions"),
    (TypeError, lambda new: dict(embedding=new(11, 6).long()), "embedding has dtype torch.int64"),
    (
        ValueError,
        lambda new: dict(weight=new(6, 5, 3)),
        "weight has shape (6, 5, 3); its dimension 1 must equal embedding's channels (C), 6",
    ),
    (
        ValueError,
        lambda new: dict(weight=new(4, 6, 3), bias=None),
        "weight has shape (4, 6, 3); with activation 'gelu' it makes 4 channels",
    ),
    (ValueError, lambda new: dict(activation="glu"), "weight has shape (6, 6, 3); with activation 'glu' it makes 3 channels"),
    (TypeError, lambda new: dict(weight=new(6, 6, 3).half()), "weight has dtype torch.float16; expected the dtype of embedding"),
    (ValueError, lambda new: dict(bias=new(5)), "bias has shape (5,); expected (6,)"),
    (ValueError, lambda new: dict(dilation=0), "dilation is 0; expected at least 1"),
    (ValueError, lambda new: dict(activation="tanh"), "activation is 'tanh'; expected one of "),
    (TypeError, lambda new: dict(cu_seqlens=new(2).long()), "cu_seqlens has dtype torch.int64; expected torch.int32"),
    (ValueError, lambda new: dict(cu_seqlens=new(2, 1).int()), "cu_seqlens has shape (2, 1); expected (N + 1,)"),
    (ValueError, lambda new: dict(cu_seqlens=new(2).int()), "ids has shape (2, 9); expected a batch of one where cu_seqlens is given"),
]


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(("exception", "changes", "says"), REFUSED, ids=[says for *_, says in REFUSED])
def test_refused(exception, changes, says, fake, device):
    """The same one line from function, op and its gradient, real and fake."""

    def new(*shape):
        return torch.zeros(shape, device=device)

    with FakeTensorMode() if fake else nullcontext():
        good = dict(ids=new(2, 9).long(), embedding=new(11, 6), weight=new(6, 6, 3), bias=new(6), dilation=2, activation="gelu")
        calls = (byte_causal_conv1d, FOLDED, lambda **arguments: FOLDED_GRAD(new(2, 6, 9), **arguments))
        for call in calls:
            with pytest.raises(exception) as caught:
                call(**{**good, **changes(new)})
            assert str(caught.value).startswith(says)
            assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^grad_y has shape \(2, 6, 8\); expected the output's, \(2, 6, 9\)"):
        FOLDED_GRAD(new(2, 6, 8), new(2, 9).long(), new(11, 6), new(6, 6, 3), new(6), 2, "gelu")


def test_good_arguments_pass(device):
    """What every case above differs from."""
    weight, bias = torch.zeros(6, 6, 3, device=device), torch.zeros(6, device=device)
    ids, embedding = torch.zeros(2, 9, dtype=torch.long, device=device), torch.ones(11, 6, device=device)
    assert (byte_causal_conv1d(ids, embedding, weight, bias, dilation=2, activation="gelu") == 1).all()


@pytest.mark.skipif(ON_CUDA, reason="nothing waits for a GPU: NaN, see below")
@pytest.mark.parametrize("wrong", [-1, 11])
def test_ids_out_of_range_are_refused_on_the_cpu(wrong, device):
    inputs = make_inputs(Shape(), "gelu", torch.float32, device)
    inputs.ids[1, 3] = wrong
    for op, args in ((FOLDED, inputs.forward), (FOLDED_GRAD, inputs.backward)):
        with pytest.raises(IndexError, match=rf"ids reach from {min(wrong, 0)} to {max(wrong, 10)}; expected 0 to 10"):
            op(*args)


@needs_cuda
@pytest.mark.parametrize("wrong", [-1, 11, 2**40, -(2**40)])
def test_ids_out_of_range_are_nan_on_a_gpu(wrong, device):
    inputs = make_inputs(Shape(), "gelu", torch.float32, device)
    want = FOLDED(*inputs.forward)
    inputs.ids[1, 3] = wrong
    y, grads = FOLDED(*inputs.forward), FOLDED_GRAD(*inputs.backward)
    assert y.isnan().any(1).nonzero().tolist() == [[1, 3]]
    assert torch.equal(y[0], want[0])
    assert not any(value.isnan().any() for value in grads)


# ---- the tokenizer


def both(device, **options) -> tuple[FuzzyTokenizer, FuzzyTokenizer]:
    """A tokenizer that folds, and the same one that does not."""
    folded = FuzzyTokenizer(**{"dim": 16, "dilations": (2, 1), "num_special": 2, **options}).to(device)
    plain = copy.deepcopy(folded)
    plain.fold = False
    return folded, plain


def runs_folded(tokenizer: FuzzyTokenizer, ids: Tensor) -> bool:
    with torch.profiler.profile() as profile:
        tokenizer(ids)
    return any(event.name == "fuzzytok::byte_causal_conv1d" for event in profile.events())


def some_ids(device, dtype=torch.long) -> Tensor:
    return torch.randint(256 if dtype == torch.uint8 else 258, (2, 30), device=device).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.long])
@of_each_kind
def test_a_folded_tokenizer_is_the_plain_one(activation, dtype, strict_dtype, device):
    folded, plain = (each.to(strict_dtype) for each in both(device, activation=activation))
    ids = some_ids(device, dtype)
    assert folded.state_dict().keys() == plain.state_dict().keys() == FuzzyTokenizer(16, dilations=(1, 1)).state_dict().keys()
    assert (runs_folded(folded, ids), runs_folded(plain, ids)) == (True, False)
    z = {name: each(ids) for name, each in (("folded", folded), ("plain", plain))}
    torch.testing.assert_close(z["folded"], z["plain"], rtol=1e-4, atol=1e-5)
    assert z["folded"].stride() == z["plain"].stride()
    probe = torch.randn_like(z["plain"])
    for each, value in ((folded, z["folded"]), (plain, z["plain"])):
        (value * probe).sum().backward()
        assert all(parameter.grad is not None for parameter in each.parameters())
    for (name, one), other in zip(folded.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-4 * other.grad.norm(), name


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: 2 * output)


def _own_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


class _Doubled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


CHANGES = {  # that a look-up cannot respect, and those that it can
    "hook on the embedding": (_hook, "embedding", False),
    "hook on the norm": (_hook, "norm", False),
    "hook on the first block": (_hook, "blocks.0", False),
    "hook on its convolution": (_hook, "blocks.0.conv", False),
    "hook on the second block": (_hook, "blocks.1", True),
    "pre-hook": (lambda module: module.register_forward_pre_hook(lambda module, args: (2 * args[0],)), "norm", False),
    "another forward": (_own_forward, "blocks.0", False),
    "weight_norm": (parametrizations.weight_norm, "blocks.0.conv", True),
    "pruned": (lambda module: prune.custom_from_mask(module, "weight", module.weight > 0), "blocks.0.conv", False),
    "scaled embedding": (lambda module: parametrizations.orthogonal(module), "embedding", True),
    "max_norm": (lambda module: setattr(module, "max_norm", 0.1), "embedding", False),
}


@pytest.mark.parametrize(("change", "where", "folds"), CHANGES.values(), ids=CHANGES.keys())
def test_what_was_done_to_the_modules_is_respected(change, where, folds, strict, device):
    folded, _ = both(device)
    ids, before = some_ids(device), folded(some_ids(device))
    change(folded.get_submodule(where))
    plain = copy.copy(folded)
    plain.fold = False
    assert runs_folded(folded, ids) == folds
    torch.testing.assert_close(folded(ids), plain(ids), rtol=1e-4, atol=1e-5)
    assert folded(ids).shape == before.shape


@pytest.mark.parametrize(
    ("name", "module", "folds"),
    [
        ("norm", lambda: _Doubled(16), False),
        ("norm", lambda: nn.Identity(), False),
        ("norm", lambda: nn.LayerNorm(16, eps=0.1, elementwise_affine=False), True),
        ("embedding", lambda: nn.Embedding(258, 16, padding_idx=3), False),
        ("blocks", lambda: nn.Sequential(), False),
        ("blocks", lambda: nn.Sequential(nn.Identity()), False),
        ("blocks", lambda: nn.Sequential(ResidualCausalBlock(16, 2, norm="rms")), False),
        ("blocks", lambda: nn.Sequential(ResidualCausalBlock(16, 2, 5, dropout=0.5)).eval(), True),
    ],
)
def test_replaced_modules_are_respected(name, module, folds, strict, device):
    folded, plain = both(device)
    replacement = module().to(device)
    for each in (folded, plain):
        setattr(each, name, replacement)
    ids = some_ids(device)
    assert runs_folded(folded, ids) == folds
    torch.testing.assert_close(folded(ids), plain(ids), rtol=1e-4, atol=1e-5)


def test_dropout_is_not_lost(device):
    tokenizer, _ = both(device)
    tokenizer.blocks[0].dropout = 0.9
    ids = some_ids(device)
    assert not runs_folded(tokenizer.train(), ids)
    assert runs_folded(tokenizer.eval(), ids)


def test_parameters_may_be_swapped(strict, device):
    folded, plain = both(device)
    ids = some_ids(device)
    others = {name: torch.randn_like(value) for name, value in folded.named_parameters()}
    torch.testing.assert_close(functional_call(folded, others, (ids,)), functional_call(plain, others, (ids,)), rtol=1e-3, atol=1e-3)
