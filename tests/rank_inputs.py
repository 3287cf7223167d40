"""What the checks of several ranks share: inputs that are the same on every rank, and what one device makes of them."""

import warnings

import torch
from modes import DEVICE, ON_CUDA, STRICT
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fuzzytok_kernels import FuzzyTokenizer

TOLERANCE = dict(rtol=1e-4, atol=1e-4) if ON_CUDA else {}


def close(got: Tensor, want: Tensor, name: str = "") -> None:
    got = got.full_tensor() if isinstance(got, DTensor) else got
    torch.testing.assert_close(got, want, **TOLERANCE, msg=lambda message: f"{name}: {message}")


def randn(*shape: int) -> Tensor:
    """The same on every rank."""
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, STRICT)


def problem(B: int, C: int, T: int, K: int, activation: str | None) -> dict[str, Tensor]:
    c_out = 2 * C if activation in ("glu", "tanh_sigmoid") else C
    return {"x": randn(B, C, T), "weight": randn(c_out, C, K) * (C * K) ** -0.5, "bias": randn(c_out), "residual": randn(B, C, T)}


def with_gradients(f, tensors: dict[str, Tensor], residual: str, grad_y, **how) -> dict[str, Tensor]:
    """The result of `f` and its gradients; `residual` is "none", "x" or "own"."""
    leaves = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    if residual != "own":
        del leaves["residual"]
    y = f(*(leaves[name] for name in ("x", "weight", "bias")), residual=leaves.get("x" if residual == "x" else "residual"), **how)
    gradients = torch.autograd.grad(y, list(leaves.values()), grad_y(y))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def new_tokenizer(**how) -> FuzzyTokenizer:
    """Its weights contiguous, as FSDP2 wants them."""
    torch.manual_seed(3)
    tokenizer = FuzzyTokenizer(dim=8, embedding_dim=6, **how)
    tokenizer.load_state_dict({name: value.contiguous() for name, value in tokenizer.state_dict().items()}, assign=True)
    return tokenizer.to(DEVICE, STRICT)


def shard(tokenizer: FuzzyTokenizer, mesh) -> None:
    for block in tokenizer.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(tokenizer, mesh=mesh)


def backward(tokenizer: FuzzyTokenizer, z: Tensor, grad_z: Tensor) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gloo's and NCCL's collectives have no derivative, says autograd to FSDP's own
        z.backward(grad_z)
    return {name: parameter.grad for name, parameter in tokenizer.named_parameters()}
