"""CausalConv1d and ResidualCausalBlock."""

import copy
import io
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from modes import HALF
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from fuzzytok_kernels import CausalConv1d, FuzzyTokenizer, ResidualCausalBlock


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of fp32 additions, TF32 being off."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def is_tap_major(weight: Tensor) -> bool:
    return weight.permute(2, 0, 1).is_contiguous()


@pytest.fixture(autouse=True)
def strict_fp32(strict_dtype):
    """TF32 off."""


# ---- values


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (2, 3), (3, 1), (3, 4)])
def test_from_conv1d_returns_what_the_padded_conv1d_returns(kernel_size, dilation, bias, device):
    conv1d = nn.Conv1d(5, 7, kernel_size, dilation=dilation, bias=bias, device=device)
    x = torch.randn(2, 5, 11, device=device)
    expected = conv1d(F.pad(x, ((kernel_size - 1) * dilation, 0)))
    close(CausalConv1d.from_conv1d(conv1d)(x), expected)
    close(CausalConv1d.from_conv1d(conv1d)(x.mT.contiguous().mT), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_to_conv1d_and_back_is_exact(bias, device):
    conv = CausalConv1d(5, 7, 3, dilation=2, bias=bias, device=device, dtype=torch.float16)
    conv1d = conv.to_conv1d()
    assert (conv1d.padding, conv1d.dilation, conv1d.weight.dtype, conv1d.weight.device) == ((0,), (2,), torch.float16, conv.weight.device)
    back = CausalConv1d.from_conv1d(conv1d)
    assert back.state_dict().keys() == conv.state_dict().keys()
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in conv.state_dict().items())
    with torch.no_grad():
        conv1d.weight.zero_()
    assert conv.weight.count_nonzero() > 0  # a copy


@pytest.mark.parametrize(("c_in", "c_out", "kernel_size"), [(1, 1, 1), (3, 4, 5), (64, 32, 3)])
def test_the_same_seed_draws_the_values_of_conv1d(c_in, c_out, kernel_size, device):
    torch.manual_seed(1)
    conv1d = nn.Conv1d(c_in, c_out, kernel_size, device=device)
    torch.manual_seed(1)
    conv = CausalConv1d(c_in, c_out, kernel_size, device=device)
    assert torch.equal(conv.weight, conv1d.weight.flip(2))
    assert torch.equal(conv.bias, conv1d.bias)


def test_output_has_the_layout_of_the_input(device):
    conv = CausalConv1d(4, 6, 3, device=device)
    assert conv(torch.randn(2, 4, 9, device=device)).stride() == (54, 9, 1)
    assert conv(torch.randn(2, 9, 4, device=device).mT).stride() == (54, 1, 6)


# ---- the weight in memory


def reloaded(conv: CausalConv1d) -> CausalConv1d:
    fresh = CausalConv1d(4, 6, 3)
    fresh.load_state_dict({name: value.contiguous() for name, value in conv.state_dict().items()})
    return fresh


def saved(conv: CausalConv1d) -> CausalConv1d:
    file = io.BytesIO()
    torch.save(conv, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def drawn_again(conv: CausalConv1d) -> CausalConv1d:
    conv.reset_parameters()
    return conv


def trained(conv: CausalConv1d) -> CausalConv1d:
    conv(torch.ones(1, 4, 8, device=conv.weight.device)).sum().backward()
    assert is_tap_major(conv.weight.grad)
    torch.optim.AdamW(conv.parameters(), foreach=True).step()
    return conv


WAYS = {
    "fresh": lambda conv: conv,
    "deepcopy": copy.deepcopy,
    "dtype": lambda conv: conv.to(torch.bfloat16),
    "device": lambda conv: conv.to("cpu"),
    "to_empty": lambda conv: copy.deepcopy(conv).to("meta").to_empty(device="cpu"),
    "load_state_dict": reloaded,
    "save": saved,
    "reset_parameters": drawn_again,
    "trained": trained,
    "from_conv1d": lambda conv: CausalConv1d.from_conv1d(conv.to_conv1d()),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_the_weight_stays_tap_major(way, device):
    conv = way(CausalConv1d(4, 6, 3, device=device))
    assert conv.weight.shape == (6, 4, 3)
    assert is_tap_major(conv.weight)


def test_a_weight_that_lies_otherwise_gives_the_same_result(device):
    conv = CausalConv1d(4, 6, 3, device=device)
    x = torch.randn(2, 4, 9, device=device)
    expected = conv(x)
    conv.load_state_dict({name: value.contiguous() for name, value in conv.state_dict().items()}, assign=True)
    assert conv.weight.is_contiguous()
    close(conv(x), expected)


# ---- as a part of PyTorch


def test_state_dict_round_trip(device):
    conv, other = CausalConv1d(4, 6, 3, dilation=2, device=device), CausalConv1d(4, 6, 3, dilation=2, device=device)
    x = torch.randn(2, 4, 9, device=device)
    assert not torch.equal(conv(x), other(x))
    other.load_state_dict(conv.state_dict())
    assert torch.equal(conv(x), other(x))


def test_weight_norm(device):
    conv = CausalConv1d(4, 6, 3, device=device)
    x = torch.randn(2, 4, 9, device=device)
    expected = conv(x)
    weight_norm(conv)
    close(conv(x), expected)
    conv(x).square().sum().backward()
    gain, direction = conv.parametrizations.weight.original0, conv.parametrizations.weight.original1
    assert gain.grad.count_nonzero() == gain.numel()
    torch.testing.assert_close(
        (direction.grad * direction).sum((1, 2)), torch.zeros(6, device=device), atol=1e-4, rtol=0
    )  # the gain takes the radial part
    close(CausalConv1d.from_conv1d(conv.to_conv1d())(x), expected)


def test_on_the_meta_device():
    with torch.device("meta"):
        conv = CausalConv1d(4, 6, 3)
    assert conv(torch.empty(2, 4, 9, device="meta")).shape == (2, 6, 9)


def test_repr():
    assert repr(CausalConv1d(4, 6, 3, dilation=2)) == "CausalConv1d(4, 6, kernel_size=3, dilation=2)"
    assert repr(CausalConv1d(4, 6, 3, bias=False)) == "CausalConv1d(4, 6, kernel_size=3, dilation=1, bias=False)"


# ---- errors


@pytest.mark.parametrize(
    "refused",
    [
        {"stride": 2},
        {"padding": 1},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
        {"padding_mode": "reflect"},
        {"groups": 2},
    ],
    ids=str,
)
def test_a_conv1d_that_is_no_causal_convolution_is_refused_by_name(refused):
    name = next(iter(refused))
    with pytest.raises(ValueError, match=f"conv has {name}="):
        CausalConv1d.from_conv1d(nn.Conv1d(4, 6, 3, **refused))


@pytest.mark.parametrize("conv", [nn.ConvTranspose1d(4, 6, 3), nn.Conv2d(4, 6, 3)], ids=lambda conv: type(conv).__name__)
def test_another_convolution_is_refused_by_name(conv):
    with pytest.raises(ValueError, match=f"conv is a {type(conv).__name__}; expected a torch.nn.Conv1d"):
        CausalConv1d.from_conv1d(conv)


def test_padding_valid_is_none():
    assert CausalConv1d.from_conv1d(nn.Conv1d(4, 6, 3, padding="valid")).kernel_size == 3


@pytest.mark.parametrize("name", ["in_channels", "out_channels", "kernel_size", "dilation"])
def test_a_size_below_one_is_refused_by_name(name):
    sizes = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        CausalConv1d(**sizes)


def test_an_unbatched_input_is_refused_with_a_hint(device):
    with pytest.raises(ValueError, match="unsqueeze"):
        CausalConv1d(4, 6, 3, device=device)(torch.randn(4, 9, device=device))


# ---- the block

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "glu": nn.GLU(dim=1),
    "tanh_sigmoid": lambda p: torch.tanh(p[:, :6]) * torch.sigmoid(p[:, 6:]),
}
NORMS = {
    None: lambda x, norm: x,
    "layer": lambda x, norm: F.layer_norm(x.mT, (6,), norm.weight, norm.bias).mT,
    "rms": lambda x, norm: F.rms_norm(x.mT, (6,), norm.weight).mT,
}


def new_block(device, **kwargs) -> ResidualCausalBlock:
    """On 6 channels, with no parameter at 0 or 1, where it would not show."""
    block = ResidualCausalBlock(6, 3, dilation=2, **kwargs).to(device)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return block


def composed(block: ResidualCausalBlock, x: Tensor) -> Tensor:
    norm = next(name for name, kind in ((None, nn.Identity), ("layer", nn.LayerNorm), ("rms", nn.RMSNorm)) if type(block.norm) is kind)
    return x + ACTIVATIONS[block.activation](block.conv(NORMS[norm](x, block.norm)))


def with_gradients(function, block: ResidualCausalBlock, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_block_is_x_plus_the_activated_convolution(activation, norm, channels_last, device):
    """And the gradients of x and of every parameter are those of the composition."""
    block = new_block(device, activation=activation, norm=norm)
    x = torch.randn(2, 9, 6, device=device).mT
    x = x if channels_last else x.contiguous()
    got, want = (with_gradients(f, block, x) for f in (block, lambda x: composed(block, x)))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_block_output_lies_as_its_input_does(norm, device):
    block = new_block(device, norm=norm)
    for x in (torch.randn(2, 6, 9, device=device), torch.randn(2, 9, 6, device=device).mT):
        assert block(x).stride() == x.stride()


def reaches_back(function, x: Tensor) -> bool:
    """Whether a change of the future changes a bit of any earlier output."""
    before = function(x)
    for t in range(1, x.shape[2]):
        changed = x.clone()
        changed[:, :, t:] += 1 + torch.rand_like(changed[:, :, t:])
        after = function(changed)
        assert not torch.equal(after[:, :, t], before[:, :, t])
        if not torch.equal(after[:, :, :t], before[:, :, :t]):
            return True
    return False


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ["gelu", "tanh_sigmoid"])
def test_block_is_causal(activation, norm, device):
    """The norm is over the channels of each position: one over time would let the past see the future."""
    block = new_block(device, activation=activation, norm=norm)
    x = torch.randn(2, 6, 9, device=device)
    assert not reaches_back(block, x)
    assert reaches_back(lambda x: block(F.layer_norm(x, x.shape[2:])), x)


@pytest.mark.parametrize("activation", ["gelu", "glu"])
@pytest.mark.parametrize("norm", [None, "layer"])
def test_dropout_is_of_the_contribution_and_in_training_alone(norm, activation, device):
    block = new_block(device, activation=activation, norm=norm, dropout=0.25)
    x = torch.randn(16, 6, 99, device=device)
    full = composed(block, x)
    got = with_gradients(block, block, x)
    part, whole = got[0] - x, (full - x) * 4 / 3
    kept = part.abs() > whole.abs() / 2
    assert 0.72 < kept.double().mean() < 0.78
    assert not torch.equal(block(x), got[0])
    want = with_gradients(lambda x: x + kept * (composed(block, x) - x) * 4 / 3, block, x)
    for value, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    block.eval()
    close(block(x), full)


def test_all_dropped_is_x(device):
    x = torch.randn(2, 6, 9, device=device)
    assert torch.equal(new_block(device, dropout=1.0)(x), x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ["gelu", "glu"])
def test_block_state_dict_round_trip(activation, norm, device):
    block, other = (new_block(device, activation=activation, norm=norm) for _ in range(2))
    x = torch.randn(2, 6, 9, device=device)
    assert not torch.equal(block(x), other(x))
    other.load_state_dict(block.state_dict())
    assert torch.equal(block(x), other(x))
    assert block.state_dict().keys() - {"norm.weight", "norm.bias"} == {"conv.weight", "conv.bias"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(activation="tanh"), "activation is 'tanh'; expected one of .*'relu', 'silu', 'gelu', 'gelu_tanh', 'glu', 'tanh_sigmoid'"),
        (dict(activation="none"), "activation is 'none'; expected one of 'relu', "),
        (dict(norm="batch"), "norm is 'batch'; expected one of None, 'layer', 'rms'"),
        (dict(dropout=-0.1), "dropout is -0.1; expected .*between 0 and 1"),
        (dict(dropout=1.5), "dropout is 1.5; expected .*between 0 and 1"),
        (dict(channels=0), "channels is 0; expected at least 1"),
        (dict(channels=0, norm="layer"), "channels is 0; expected at least 1"),
        (dict(kernel_size=0), "kernel_size is 0; expected at least 1"),
        (dict(dilation=0), "dilation is 0; expected at least 1"),
    ],
    ids=str,
)
def test_a_block_refuses_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        ResidualCausalBlock(**{"channels": 6, "kernel_size": 3, **wrong})


def test_block_repr():
    assert "activation='silu'" in repr(ResidualCausalBlock(4, 3, activation="silu"))
    assert "dropout=0.5" in repr(ResidualCausalBlock(4, 3, dropout=0.5))


@pytest.mark.parametrize("norm", NORMS)
def test_block_compiles_whole(norm, device):
    block = new_block(device, norm=norm)
    x = torch.randn(2, 9, 6, device=device).mT
    close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


class Calls(TorchDispatchMode):
    """Counts the calls of our ops, and of what they take the place of."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))

    def ours(self) -> dict[str, int]:
        return {name.removeprefix("fuzzytok::causal_conv1d"): n for name, n in self.counts.items() if name.startswith("fuzzytok::")}


@pytest.mark.parametrize(("fold", "firsts"), [(True, {"fuzzytok::byte_causal_conv1d": 1}), (False, {})])
def test_a_tokenizer_runs_one_fused_op_a_block(fold, firsts, device):
    tokenizer = FuzzyTokenizer(dim=8, dilations=(1, 2, 4), fold=fold).to(device)
    others = 3 - len(firsts)
    ids = torch.randint(256, (2, 19), device=device)
    with Calls() as forward:
        z = tokenizer(ids)
    assert forward.ours() == {**firsts, "_fused": others}
    assert not {"aten::gelu", "aten::convolution", "aten::add.Tensor"} & forward.counts.keys()
    with Calls() as backward:
        z.sum().backward()
    grads = {f"{name}_grad": count for name, count in firsts.items()}
    assert backward.ours() == {**grads, "_activation_grad": others, "_input_grad": others, "_weight_grad": others}
    assert not {"aten::gelu_backward", "aten::add.Tensor"} & backward.counts.keys()


def test_block_calls_its_convolution_as_a_module(device):
    """So that hooks fire, and with them what lives on hooks: weight_norm's older form, pruning, profilers."""
    block = ResidualCausalBlock(6, 3, activation="silu").to(device)
    seen = []
    block.conv.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    normed = torch.nn.utils.weight_norm(block.conv)
    x = torch.randn(2, 6, 9, device=device)
    before = block(x)
    with torch.no_grad():
        normed.weight_g.mul_(2)
    assert not torch.equal(block(x), before)
    assert seen == [(2, 6, 9)] * 2
    for _ in range(2):
        block(x).sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_block_has_one_dtype_under_autocast(dropout, device):
    block, x = ResidualCausalBlock(8, 3, dropout=dropout).to(device), torch.randn(2, 8, 9, device=device)
    with torch.autocast(device.type, dtype=HALF):
        assert block.train()(x).dtype == block.eval()(x).dtype == HALF
