"""What the README's "Swapping in" says is equal."""

import copy

import pytest
import torch
import torch.nn.functional as F
from modes import not_interpreted
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fuzzytok_kernels import CausalConv1d, ResidualCausalBlock, causal_conv1d, causal_conv1d_update

K, D, HISTORY = 3, 4, 8
pytestmark = not_interpreted


@pytest.fixture
def x(strict_dtype, device):
    return torch.randn(2, 8, 20, device=device)


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_from_a_padded_convolution(x, device):
    w, b = torch.randn(6, 8, K, device=device), torch.randn(6, device=device)
    close(causal_conv1d(x, w.flip(2), b, dilation=D), F.conv1d(F.pad(x, (HISTORY, 0)), w, b, dilation=D))


def test_from_one_that_pads_both_sides_and_is_trimmed(x, device):
    conv = nn.Conv1d(8, 6, K, dilation=D, padding=HISTORY).to(device)
    want = conv(x)[..., :20]
    conv.padding = (0,)
    close(CausalConv1d.from_conv1d(conv)(x), want)


def test_a_checkpoint_goes_through_from_conv1d(x, device):
    """Names and shapes are equal, so that nothing else would tell."""
    conv = nn.Conv1d(8, 6, K, dilation=D).to(device)
    want = conv(F.pad(x, (HISTORY, 0)))
    ours = CausalConv1d(8, 6, K, dilation=D).to(device)
    ours.load_state_dict(conv.state_dict())
    assert (ours(x) - want).norm() > 0.1 * want.norm()
    close(CausalConv1d.from_conv1d(conv)(x), want)


def test_a_tcn_block(x, device):
    block = ResidualCausalBlock(8, K, D, activation="relu").to(device)
    conv = block.conv.to_conv1d()
    close(block(x), x + F.relu(conv(F.pad(x, (HISTORY, 0)))))


def test_weight_norm(x, device):
    conv = CausalConv1d(8, 6, K, D).to(device)
    plain = weight_norm(copy.deepcopy(conv).to_conv1d())
    ours = weight_norm(conv)
    y, want = ours(x), plain(F.pad(x, (HISTORY, 0)))
    close(y, want)
    grads = [torch.autograd.grad(value.square().sum(), list(module.parameters())) for value, module in ((y, ours), (want, plain))]
    assert [grad.shape for grad in grads[0]] == [grad.shape for grad in grads[1]]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(
            got, expected.flip(2) if expected.dim() == 3 and expected.shape[2] == K else expected, atol=1e-3, rtol=1e-3
        )


def test_a_depthwise_filter_as_a_dense_one(x, device):
    filters, b = torch.randn(8, K, device=device), torch.randn(8, device=device)
    want = F.silu(F.conv1d(F.pad(x, (K - 1, 0)), filters[:, None], b, groups=8))
    dense = torch.diag_embed(filters.flip(-1).T).permute(1, 2, 0)  # (C, C, K)
    close(causal_conv1d(x, dense, b, activation="silu"), want)
    close(causal_conv1d(x.mT.contiguous().mT, dense, b, activation="silu"), want)  # (B, T, C) seen through .mT
    y, final_state = causal_conv1d(x[..., 5:], dense, b, activation="silu", initial_state=x[..., 3:5], return_final_state=True)
    close(y, want[..., 5:])
    assert torch.equal(final_state, x[..., -2:])
    ends = torch.tensor([0, 5, 20], dtype=torch.int32, device=x.device)  # the sequence of each step is 0 for five of them, then 1
    split = [F.silu(F.conv1d(F.pad(part, (K - 1, 0)), filters[:, None], b, groups=8)) for part in (x[:1, :, :5], x[:1, :, 5:])]
    close(causal_conv1d(x[:1], dense, b, activation="silu", cu_seqlens=ends), torch.cat(split, 2))
    state = x.new_zeros(2, 8, K - 1)
    close(torch.stack([causal_conv1d_update(x[..., t], state, dense, b, activation="silu") for t in range(20)], 2), want)
    assert torch.equal(state, x[..., -2:])
