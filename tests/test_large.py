"""Sizes that only a GPU holds, beside those of test_launch.py: 2^31 partial sums or look-ups, a million steps, dilations up to T."""

import pytest
import torch
from filelock import FileLock
from modes import needs_cuda
from oracle import OPS, Problem, make_inputs, naive, ours

pytestmark = needs_cuda


@pytest.fixture
def alone(tmp_path_factory):
    """One at a time: up to 30 GiB each."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "huge.lock"):
        yield
        torch.cuda.empty_cache()


def test_more_than_2_31_partial_sums(alone, device):
    """Of the weight-grad: three slices of 64 * 4096 * 4096 taps. Corners against products in fp64."""
    from fuzzytok_kernels import tuning

    B, channels, T, K, d = 1, 4096, 140_001, 64, 5
    grad_y, x = (torch.empty((B, T, channels), dtype=torch.bfloat16, device=device).normal_().mT for _ in range(2))
    with tuning.force(path="pointer", BLOCK_T=16, BLOCK_C_IN=64, BLOCK_C_OUT=64, num_warps=4, num_stages=3, programs_per_sm=1):
        grad_weight, grad_bias = OPS["causal_conv1d_weight_grad"](grad_y, x, K, d)
    edge = 8
    for k in (0, 31, K - 1):
        seen = T - k * d
        for o in (slice(0, edge), slice(channels - edge, channels)):
            for c in (slice(0, edge), slice(channels - edge, channels)):
                want = grad_y[0, o, k * d :].double() @ x[0, c, :seen].double().mT
                got = grad_weight[o, c, k].double()
                assert (got - want).norm() <= 2**-7 * want.norm(), (k, o, c)
    assert grad_weight.isfinite().all()
    want = grad_y[0].double().sum(1)
    assert (grad_bias.double() - want).norm() <= 2**-7 * want.norm()


def test_more_than_2_31_look_ups(alone, device):
    """Of bytes: the last steps as when they are alone, and gradients that counts of bytes tell."""
    T, channels, K, V = 2**23 + 77, 256, 3, 256
    ids = torch.randint(V, (1, T), device=device, dtype=torch.uint8)
    embedding, weight = (torch.randn(shape, device=device).bfloat16() for shape in ((V, channels), (channels, channels, K)))
    arguments = embedding, weight, None, 1, "none"
    y = torch.ops.fuzzytok.byte_causal_conv1d(ids, *arguments)
    assert torch.equal(y[:, :, -1000:], torch.ops.fuzzytok.byte_causal_conv1d(ids[:, -1002:], *arguments)[:, :, 2:])
    del y
    grad_y = torch.ones((), device=device, dtype=torch.bfloat16).expand(1, channels, T)
    grad_embedding, grad_weight, grad_bias = torch.ops.fuzzytok.byte_causal_conv1d_grad(grad_y, ids, *arguments)
    counts = torch.stack([ids[0, : T - k].long().bincount(minlength=V) for k in range(K)]).double()  # [K, V]
    want = {
        "embedding": (grad_embedding, counts[0][:, None] + torch.einsum("kv,oik->vi", counts, weight.double())),
        "weight": (grad_weight, torch.einsum("kv,vi->ik", counts, embedding.double()).expand(channels, -1, -1)),
        "bias": (grad_bias, torch.full((channels,), float(T), device=device).double()),
    }
    for name, (got, value) in want.items():
        assert (got.double() - value).norm() <= 2**-7 * value.norm(), name


MILLION = 1_000_000


@pytest.mark.parametrize("d", [1, 1024, 333_333, MILLION // 2, MILLION - 1, MILLION, MILLION + 1], ids=str)
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
def test_a_million_steps(layout, d, alone, device, path):
    """With dilations up to all of T, against Eq. 2 and 3 in fp64."""
    inputs = make_inputs(Problem(B=1, c_in=32, c_out=40, T=MILLION, K=3, d=d), torch.bfloat16, device, layout, layout)
    got, wide = ours(inputs), inputs.map(torch.Tensor.double)
    grad_y, x = wide.grad_y, wide.x
    want = {"y": naive(wide), "grad_x": torch.zeros_like(x), "grad_bias": grad_y.sum((0, 2))}
    want["grad_weight"] = torch.zeros_like(wide.weight)
    for k in range(3):
        if (seen := MILLION - k * d) > 0:
            want["grad_x"][:, :, :seen] += wide.weight[:, :, k].T @ grad_y[:, :, MILLION - seen :]
            want["grad_weight"][:, :, k] = (grad_y[:, :, MILLION - seen :] @ x[:, :, :seen].mT).sum(0)
    for name, value in want.items():
        assert (got[name].double() - value).norm() <= 2**-8 * value.norm(), name  # one rounding to bf16
