"""What the ranks of ranks.py run for test_distributed.py: DTensor and the styles that split channels, against one device."""

import copy

import pytest
import torch
from modes import DEVICE, STRICT
from rank_inputs import backward, close, new_tokenizer, problem, randn, shard, with_gradients
from ranks import mesh_of, mesh_of_two_by
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fuzzytok_kernels import CausalConv1d, ResidualCausalBlock, byte_causal_conv1d, causal_conv1d
from fuzzytok_kernels.distributed import ColwiseConv1d, RowwiseConv1d

R, P = Replicate(), Partial()
WAYS = {  # placements of x, weight, bias; and of y without an activation
    "batch": (Shard(0), R, R, Shard(0)),
    "column": (R, Shard(0), Shard(0), Shard(1)),
    "row": (Shard(1), Shard(1), R, P),
    "replicated": (R, R, R, R),
    "time": (Shard(2), R, R, R),
}


def dtensor(size: int, way: str, activation: str | None, sizes: tuple) -> None:
    """Result and gradients are those of one device; what needs no message sends none, and leaves the result where it was computed."""
    mesh, (*placements, placement_of_y) = mesh_of(size), WAYS[way]
    for residual in ("none", "x", "own"):
        tensors = problem(*sizes, activation)
        grad_y = randn(*tensors["residual"].shape)
        want = with_gradients(causal_conv1d, tensors, residual, lambda y, g=grad_y: g, dilation=2, activation=activation)
        placed = dict(zip(tensors, (*placements, Shard(0) if way == "batch" else R), strict=True))
        sharded = {name: distribute_tensor(value, mesh, [placed[name]]) for name, value in tensors.items()}
        count = CommDebugMode()

        def counted(*args, count=count, **kwargs) -> Tensor:
            with count:
                return causal_conv1d(*args, **kwargs)

        def gradient(y: DTensor, grad_y=grad_y) -> Tensor:
            return distribute_tensor(grad_y, mesh, [R if placement.is_partial() else placement for placement in y.placements])

        got = with_gradients(counted, sharded, residual, gradient, dilation=2, activation=activation)
        for name, value in want.items():
            close(got[name], value, f"{residual} {name}")
        gathers = way == "time" or (way == "column" and activation == "glu") or (way == "row" and (activation or residual == "x"))
        if not gathers and min(sizes[:2]) % size == 0:
            assert count.get_total_counts() == 0
            assert got["y"].placements == (placement_of_y,)


def dtensor_on_two_dimensions(first: str, second: str) -> None:
    """One way on each dimension of a mesh; no message but for the sum of what is partial."""
    mesh, ways = mesh_of_two_by(2), (WAYS[first], WAYS[second])
    tensors, grad_y = problem(4, 8, 10, 3, None), randn(4, 8, 10)
    want = with_gradients(causal_conv1d, tensors, "none", lambda y: grad_y, dilation=2)
    placed = dict(zip(("x", "weight", "bias", "y"), zip(*ways, strict=True), strict=True)) | {"residual": (R, R)}
    sharded = {name: distribute_tensor(value, mesh, placed[name]) for name, value in tensors.items()}

    def gradient(y: DTensor) -> Tensor:
        assert y.placements == placed["y"]
        return distribute_tensor(grad_y, mesh, [R if placement.is_partial() else placement for placement in y.placements])

    got = with_gradients(causal_conv1d, sharded, "none", gradient, dilation=2)
    for name, value in want.items():
        close(got[name], value, name)


def dtensor_sequences(size: int, way: str, kind: str) -> None:
    """Initial states, which are sharded as x is, and packed sequences, whose batch of one is not."""
    mesh, (*placements, _) = mesh_of(size), WAYS[way]
    B, history = (1, 8) if kind == "packed" else (4, 8)
    tensors, grad_y = problem(B, 8, 20, 3, "gelu" if way != "row" else None), randn(B, 8, 20)
    extra = {"initial_state": randn(B, 8, history)} if kind == "state" else {"cu_seqlens": torch.tensor([0, 3, 3, 20], dtype=torch.int32)}
    extra = {name: value.to(DEVICE) for name, value in extra.items()}
    how = dict(dilation=4, activation=None if way == "row" else "gelu")
    want = with_gradients(causal_conv1d, tensors, "own", lambda y: grad_y, **how, **extra)
    placed = dict(zip(tensors, (*placements, R), strict=True))
    sharded = {name: distribute_tensor(value, mesh, [placed[name]]) for name, value in tensors.items()}
    moved = {name: distribute_tensor(value, mesh, [placements[0] if kind == "state" else R]) for name, value in extra.items()}

    def gradient(y: DTensor) -> Tensor:
        return distribute_tensor(grad_y, mesh, [R if placement.is_partial() else placement for placement in y.placements])

    got = with_gradients(causal_conv1d, sharded, "own", gradient, **how, **moved)
    for name, value in want.items():
        close(got[name], value, name)


def dtensor_bytes(size: int, way: str) -> None:
    """The tokenizer's front as look-ups: without a message forward, and the gradients of the table's makers are sums over the ranks."""
    mesh, placement = mesh_of(size), Shard(0) if way == "batch" else R
    tensors = {"embedding": randn(9, 8), "weight": randn(8, 8, 3), "bias": randn(8)}
    ids, grad_y = torch.randint(9, (4, 11)).to(DEVICE), randn(4, 8, 11)

    def with_gradients(place) -> dict[str, Tensor]:
        leaves = {name: place(value, R).requires_grad_() for name, value in tensors.items()}
        placed_ids = place(ids, placement)
        with CommDebugMode() as count:
            y = byte_causal_conv1d(placed_ids, *leaves.values(), dilation=2, activation="gelu")
        assert count.get_total_counts() == 0
        return {"y": y, **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), place(grad_y, placement)), strict=True))}

    want = with_gradients(lambda value, placement: value.detach())
    got = with_gradients(lambda value, placement: distribute_tensor(value, mesh, [placement]))
    for name, value in want.items():
        close(got[name], value, name)


def column_activation_row(size: int) -> None:
    """One sum over the ranks, and a bias that counts once."""
    mesh = mesh_of(size)
    torch.manual_seed(3)
    alone = nn.Sequential(CausalConv1d(8, 16, 3, dilation=2), nn.GELU(), CausalConv1d(16, 8, 3)).to(DEVICE, STRICT)
    nn.init.constant_(alone[2].bias, 100.0)
    split = parallelize_module(copy.deepcopy(alone), mesh, {"0": ColwiseConv1d(), "2": RowwiseConv1d()})
    assert split[0].weight.to_local().shape[0] == 16 // size
    assert split[2].weight.to_local().shape[1] == 16 // size
    x, grad_y = randn(2, 8, 11), randn(2, 8, 11)
    results = []
    with CommDebugMode() as count:
        y = split(x)
    assert count.get_total_counts() == 1
    for net, result in ((split, y), (alone, alone(x))):
        result.backward(grad_y)
        results.append({"y": result, **{name: parameter.grad for name, parameter in net.named_parameters()}})
    for name, value in results[1].items():
        close(results[0][name], value, name)


def column_gate(size: int) -> None:
    """A gated block, whose weight is gathered, and the results of the styles as DTensors."""
    torch.manual_seed(3)
    alone = ResidualCausalBlock(8, 3, activation="tanh_sigmoid", norm="layer").to(DEVICE, STRICT)
    x = randn(2, 8, 11)
    for output in (R, Shard(1)):
        split = copy.deepcopy(alone)
        parallelize_module(split, mesh_of(size), {"conv": ColwiseConv1d(output_layouts=output, use_local_output=output == Shard(1))})
        y = split.conv(x, activation="tanh_sigmoid")
        want = alone.conv(x, activation="tanh_sigmoid")
        rank = mesh_of(size).get_local_rank()
        close(y, want if output == R else want.chunk(size, 1)[rank])
    close(parallelize_module(copy.deepcopy(alone), mesh_of(size), {"conv": ColwiseConv1d(output_layouts=R)})(x), alone(x))


def styles_refuse_other_modules(size: int) -> None:
    for style in (ColwiseConv1d(), RowwiseConv1d()):
        with pytest.raises(TypeError, match="was given a Linear; expected a CausalConv1d"):
            parallelize_module(nn.Linear(8, 8), mesh_of(size), style)


def parallel_tokenizer_under_fsdp(kind: str) -> None:
    """Channels split over two ranks, parameters and batch over the other dimension of the mesh."""
    mesh = mesh_of_two_by(2)
    alone, split = new_tokenizer(), new_tokenizer()
    ids, grad_z = torch.randint(256, (4, 50)).to(DEVICE), randn(4, 50, 6)
    gathered = ColwiseConv1d(output_layouts=R)
    plan = {"column": {"blocks.*.conv": gathered, "projection": ColwiseParallel(output_layouts=R)}, "gate": {"blocks.*.conv": gathered}}
    if kind == "gate":
        alone, split = new_tokenizer(activation="glu"), new_tokenizer(activation="glu")
    parallelize_module(split, mesh["model"], plan[kind])
    shard(split, mesh["data"])
    mine = slice(2 * mesh["data"].get_local_rank(), 2 * mesh["data"].get_local_rank() + 2)
    z, want = split(ids[mine]), alone(ids)
    close(z, want[mine], "z")
    wanted = backward(alone, want, grad_z)
    for name, value in backward(split, z, grad_z[mine]).items():
        close(2 * value.full_tensor(), wanted[name], name)  # FSDP averages
