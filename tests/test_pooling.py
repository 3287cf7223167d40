"""Bytes to segments and back."""

import pytest
import torch
from modes import not_interpreted
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fuzzytok_kernels import FuzzyTokenizer, pool, segments_from_starts, unpool

pytestmark = not_interpreted


def slowly(z: Tensor, segments: Tensor, count: int) -> Tensor:
    """The means one by one, in fp64."""
    pooled = torch.zeros(len(z), count, z.shape[2], dtype=torch.float64)
    for b in range(len(z)):
        for s in range(count):
            if (segments[b] == s).any():
                pooled[b, s] = z[b].double()[segments[b] == s].mean(0)
    return pooled


def test_segments(device):
    starts = torch.tensor([[0, 0, 1, 1, 0], [1, 0, 0, 0, 1], [0, 1, 0, 0, 0]], dtype=torch.bool, device=device)
    assert segments_from_starts(starts).tolist() == [[0, 0, 1, 2, 2], [0, 0, 0, 0, 1], [0, 1, 1, 1, 1]]
    lengths = torch.tensor([4, 5, 0], device=device)
    assert segments_from_starts(starts, lengths).tolist() == [[0, 0, 1, 2, -1], [0, 0, 0, 0, 1], [-1] * 5]
    assert segments_from_starts(starts[:, :0]).shape == (3, 0)


def test_means_and_back(dtype, device):
    z = torch.randn(2, 7, 3, device=device).to(dtype)
    segments = torch.tensor([[0, 0, 1, 1, 1, 3, -1], [0, 1, 2, 2, -1, -1, -1]], device=device)
    pooled = pool(z, segments)
    assert pooled.dtype == dtype
    want = slowly(z.cpu(), segments.cpu(), 4)
    torch.testing.assert_close(pooled.cpu().double(), want, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)
    assert (pooled[0, 2] == 0).all()
    assert torch.equal(pool(z, segments, 6)[:, :4], pooled)
    assert (pool(z, segments, 6)[:, 4:] == 0).all()
    back = unpool(pooled, segments)
    for b in range(2):
        for t in range(7):
            assert torch.equal(back[b, t], pooled[b, segments[b, t]] if segments[b, t] >= 0 else torch.zeros_like(back[b, t]))
    assert torch.equal(unpool(pooled, segments - 1)[0, 2:5], pooled[0, :1].expand(3, -1))
    assert (unpool(pooled, segments - 1)[:, 0] == 0).all()


def test_nothing_to_pool(device):
    z = torch.ones(2, 4, 3, device=device)
    padding = torch.full((2, 4), -1, device=device)
    assert pool(z, padding).shape == (2, 0, 3)
    assert (pool(z, padding, 2) == 0).all()
    assert pool(z, padding - 1).shape == (2, 0, 3)
    assert pool(z[:, :0], padding[:, :0]).shape == (2, 0, 3)
    assert (unpool(pool(z, padding), padding) == 0).all()


def test_what_is_left_out_may_be_nan(device):
    """Padding counts nowhere whatever it is, and the first segment learns nothing of itself from `segments - 1`."""
    z = torch.ones(1, 4, 3, device=device)
    z[0, 3] = torch.nan
    segments = torch.tensor([[0, 0, 1, -1]], device=device)
    assert (pool(z, segments) == 1).all()
    pooled = torch.full((1, 2, 3), torch.inf, device=device)
    assert (unpool(pooled, segments - 1)[0, [0, 1, 3]] == 0).all()


def test_gradients(device):
    z = torch.randn(2, 5, 2, dtype=torch.float64, device=device, requires_grad=True)
    segments = torch.tensor([[0, 0, 1, 1, -1], [0, 1, 1, 2, 2]], device=device)
    for function in (lambda z: pool(z, segments, 3), lambda z: unpool(z[:, :3], segments)):
        assert gradcheck(function, z)
        assert gradgradcheck(function, z)


def test_the_same_bits_every_time(device):
    z = torch.randn(4, 500, 16, device=device, requires_grad=True)
    segments = segments_from_starts(torch.rand(4, 500, device=device) < 0.1)
    results = []
    for _ in range(3):
        pooled = pool(z, segments)
        y = unpool(pooled, segments)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), z)))
    for y, grad in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_words_that_do_not_see_what_comes_later(device, strict_dtype):
    """A byte with the words before its own: no output depends on a later byte."""
    tokenizer = FuzzyTokenizer(16, dilations=(1, 2)).to(device)
    ids, _ = tokenizer.encode("some words of a text")

    def run(ids: Tensor) -> Tensor:
        z = tokenizer(ids)
        segments = segments_from_starts(ids == ord(" "))
        return z + unpool(pool(z, segments).cumsum(1), segments - 1)

    changed = ids.clone()
    changed[0, 12:] = ord("x")
    torch.testing.assert_close(run(ids)[:, :12], run(changed)[:, :12])


def test_refusals(device):
    z, segments = torch.zeros(2, 4, 3, device=device), torch.zeros(2, 4, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match=r"segments has shape \(2, 3\); expected \(2, 4\), one a byte of z"):
        pool(z, segments[:, :3])
    with pytest.raises(ValueError, match=r"z has shape \(4, 3\); expected 3 dimensions"):
        pool(z[0], segments)
    with pytest.raises(ValueError, match=r"segments has shape \(1, 4\); expected \(2, 4\)"):
        unpool(z, segments[:1])
    with pytest.raises(ValueError, match=r"pooled has shape \(4, 3\); expected 3 dimensions"):
        unpool(z[0], segments)
    with pytest.raises(ValueError, match="starts has shape"):
        segments_from_starts(segments[0].bool())
    with pytest.raises(TypeError, match=r"starts has dtype torch\.int64; expected bool"):
        segments_from_starts(segments)
    with pytest.raises(ValueError, match="lengths has shape"):
        segments_from_starts(segments.bool(), torch.zeros(3, device=device))
    for call in (lambda: pool(z, segments.float()), lambda: unpool(z, segments.to(torch.uint8))):
        with pytest.raises(TypeError, match=r"segments has dtype torch\.\w+; expected int32 or int64"):
            call()
    with pytest.raises(ValueError, match="count is -1; expected at least 0"):
        pool(z, segments - 1, -1)
    with pytest.raises(TypeError, match=r"count is 2\.5; expected an integer"):
        pool(z, segments, 2.5)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="segments reaches 4; expected at most 3, the last of pooled"):
            unpool(z, segments + 4)
        with pytest.raises(ValueError, match="segments reaches 2; expected at most count - 1, 1"):
            pool(z, segments + 2, 2)
