"""What the ranks of ranks.py run for test_distributed.py: sequence parallel, against one device."""

import copy
import itertools
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from modes import DEVICE, STRICT
from rank_inputs import backward, close, new_tokenizer, problem, randn, shard, with_gradients
from ranks import mesh_of, mesh_of_two_by
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

import bench.sequence_parallel
from fuzzytok_kernels import CausalConv1d, ResidualCausalBlock, causal_conv1d, distributed, ops
from fuzzytok_kernels.distributed import ColwiseConv1d, TimeParallel, history_bytes


def shards_of(value: Tensor, lengths: tuple[int, ...], dim: int = -1) -> Tensor:
    return value.split(lengths, dim)[mesh_of(len(lengths)).get_local_rank()]


def summed(value: Tensor, size: int) -> Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=mesh_of(size).get_group())
    return total


def sequence_parallel(lengths: tuple[int, ...], activation: str | None) -> None:
    """Result and gradients of the convolution are those of one device, whatever its history."""
    size = len(lengths)
    group = mesh_of(size).get_group()
    for residual, (K, d), last in itertools.product(("none", "x", "own"), ((1, 1), (3, 1), (3, 4)), (False, True)):
        case = f"{residual}, K={K}, d={d}, channels-last={last}"
        tensors = problem(2, 8, sum(lengths), K, activation)
        grad_y = randn(2, 8, sum(lengths))
        if last:
            tensors["x"] = tensors["x"].mT.contiguous().mT
        want = with_gradients(causal_conv1d, tensors, residual, lambda y, g=grad_y: g, dilation=d, activation=activation)
        mine = {name: shards_of(value, lengths) if name in ("x", "residual") else value for name, value in tensors.items()}
        how = dict(dilation=d, activation=activation, group=group, lengths=lengths)
        got = with_gradients(distributed.causal_conv1d, mine, residual, lambda y, g=grad_y: shards_of(g, lengths), **how)
        for name, value in want.items():
            if name in ("weight", "bias"):
                close(summed(got[name], size), value, f"{case}: {name}")
            else:
                close(got[name], shards_of(value, lengths), f"{case}: {name}")


def stored_pre_activation(size: int) -> None:
    """From C_in * K = 2,048 on the pre-activation is kept: another way through autograd."""
    lengths = (300,) * size
    tensors, grad_y = problem(1, 8, sum(lengths), 256, "silu"), randn(1, 8, sum(lengths))
    want = with_gradients(causal_conv1d, tensors, "x", lambda y: grad_y, dilation=2, activation="silu")
    mine = {name: shards_of(value, lengths) if name in ("x", "residual") else value for name, value in tensors.items()}
    how = dict(dilation=2, activation="silu", group=mesh_of(size).get_group())
    got = with_gradients(distributed.causal_conv1d, mine, "x", lambda y: shards_of(grad_y, lengths), **how)
    for name in ("y", "x"):
        close(got[name], shards_of(want[name], lengths), name)
    close(summed(got["weight"], size), want["weight"], "weight")


def sequence_parallel_autocast(size: int) -> None:
    lengths = (9,) * size
    conv = CausalConv1d(8, 8, 3, dilation=2).to(DEVICE)
    x = randn(2, 8, sum(lengths)).float()
    mine = shards_of(x, lengths).clone().requires_grad_()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        want = conv(x, activation="silu", residual=x)
        got = distributed.causal_conv1d(
            mine, conv.weight, conv.bias, dilation=2, activation="silu", residual=mine, group=mesh_of(size).get_group()
        )
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, shards_of(want, lengths), rtol=1.6e-2, atol=1e-2)
    got.float().sum().backward()
    assert mine.grad.dtype == conv.weight.grad.dtype == torch.float32


def lengths_are_refused(size: int) -> None:
    conv, x = CausalConv1d(4, 4, 3), torch.zeros(1, 4, 5)
    for lengths in ((5,) * (size + 1), (6,) * size):
        with pytest.raises(ValueError) as caught:
            distributed.causal_conv1d(x, conv.weight, group=mesh_of(size).get_group(), lengths=lengths)
        assert str(caught.value).startswith(f"lengths is {lengths}; expected one for each of {size} ranks, and 5 for rank ")


class Messages:
    """Inside, the bytes that this rank sends, and in which order it exchanges, computes (an op, and on how many steps) and waits."""

    def __init__(self) -> None:
        self.bytes, self.log = 0, []

    def __enter__(self) -> "Messages":
        self._patches = pytest.MonkeyPatch()
        exchange = dist.batch_isend_irecv

        def batch_isend_irecv(operations):
            self.bytes += sum(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
            self.log.append("exchange")
            return [Waited(work, self.log) for work in exchange(operations)]

        self._patches.setattr(dist, "batch_isend_irecv", batch_isend_irecv)
        for name in ("causal_conv1d_fused", "causal_conv1d_activation_grad", "causal_conv1d_input_grad", "causal_conv1d_weight_grad"):
            self._patches.setattr(ops, name, partial(self._logged, name.removeprefix("causal_conv1d_"), getattr(ops, name)))
        return self

    def _logged(self, name: str, op, first: Tensor, *args):
        self.log.append(f"{name} {first.shape[-1]}")
        return op(first, *args)

    def __exit__(self, *_) -> None:
        self._patches.undo()


class Waited:
    def __init__(self, work, log: list[str]) -> None:
        self.work, self.log = work, log

    def wait(self) -> None:
        if self.log[-1] != "wait":  # NCCL has one work for all messages
            self.log.append("wait")
        self.work.wait()


def bytes_sent(lengths: tuple[int, ...]) -> None:
    """Those of the formula: nothing but the history, forward and backward, whatever lies between."""
    size = len(lengths)
    for history, dtype in ((2, torch.float32), (8, torch.bfloat16)):
        x, conv = torch.randn(3, 5, lengths[mesh_of(size).get_local_rank()]), CausalConv1d(5, 7, 3).to(DEVICE, dtype)
        x = x.to(DEVICE, dtype).requires_grad_()
        expected = history_bytes(lengths, history, bytes_of_step=3 * 5 * dtype.itemsize)
        assert expected == 3 * 5 * dtype.itemsize * sum(min(history, sum(lengths[:rank])) for rank in range(size))
        how = dict(dilation=history // 2, activation="relu", group=mesh_of(size).get_group(), lengths=lengths)
        with Messages() as forward:
            y = distributed.causal_conv1d(x, conv.weight, conv.bias, **how)
        with Messages() as back:
            y.sum().backward()
        for messages in (forward, back):
            total = torch.tensor(float(messages.bytes), device=DEVICE)
            assert summed(total, size).item() == expected


def overlap(size: int) -> None:
    """Everything but the first steps is computed while the history is on the way; the backward sends first and receives last."""
    x, conv = randn(2, 5, 20).requires_grad_(), CausalConv1d(5, 5, 3).to(DEVICE, STRICT)
    group = mesh_of(size).get_group()
    with Messages() as forward:
        y = distributed.causal_conv1d(x, conv.weight, conv.bias, dilation=2, activation="relu", group=group)
    with Messages() as back:
        y.sum().backward()
    rank = dist.get_rank(group)
    head = rank > 0  # 4 steps that came and the 4 first ones of its own
    assert forward.log == ["exchange", "fused 20", "wait", *["fused 8"] * head]
    assert back.log == [
        *["activation_grad 8", "input_grad 8"] * head, "exchange",
        "activation_grad 20", "weight_grad 20", *["weight_grad 8"] * head, "input_grad 20", "wait",
    ]  # fmt: skip


def stack(lengths: tuple[int, ...], where: str, fsdp: bool) -> None:
    """A tokenizer whose time is split, with one exchange or one a convolution: z and gradients are those of one device."""
    size = len(lengths)
    mesh, alone, split = mesh_of(size), new_tokenizer(), new_tokenizer()
    ids, grad_z = torch.randint(256, (2, sum(lengths))).to(DEVICE), randn(2, sum(lengths), 6)
    parallelize_module(split, mesh, TimeParallel() if where == "input" else {"blocks.*.conv": TimeParallel()})
    assert list(split.state_dict()) == list(alone.state_dict())
    if fsdp:
        shard(split, mesh)
    with Messages() as messages:
        z = split(shards_of(ids, lengths))
    want = alone(ids)
    close(z, shards_of(want, lengths, 1), "z")
    wanted = backward(alone, want, grad_z)
    with Messages() as back:
        got = backward(split, z, shards_of(grad_z, lengths, 1))
    for name, value in got.items():
        close(size * value.full_tensor() if fsdp else summed(value, size), wanted[name], name)
    if where == "input":  # bytes, as long as they are 8 bytes each; and nothing comes back
        assert summed(torch.tensor(float(messages.bytes), device=DEVICE), size).item() == history_bytes(lengths, 42, 2 * 8)
        assert back.bytes == 0
    else:
        a_step = 2 * 8 * STRICT.itemsize
        expected = sum(history_bytes(lengths, 2 * dilation, a_step) for dilation in (1, 2, 4) * 3)
        for sent in (messages, back):
            assert summed(torch.tensor(float(sent.bytes), device=DEVICE), size).item() == expected


def averaged_gradients(size: int) -> None:
    """Twice the same, without `zero_grad` between: what is accumulated is averaged once each; a parameter of no use stays without.

    After a backward that raised, and with a parameter that has gaps in memory.
    """
    alone, split, lengths = new_tokenizer(), new_tokenizer(), (20,) * size
    other = torch.float32 if STRICT.itemsize == 8 else torch.float64  # a call is of one dtype
    split.unused, split.offset = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4, dtype=other, device=DEVICE)[::2])
    parallelize_module(split, mesh_of(size), TimeParallel())
    distributed.average_gradients(split, mesh_of(size).get_group())
    ids, grad_z = torch.randint(256, (2, sum(lengths))).to(DEVICE), randn(2, sum(lengths), 6)
    wanted = backward(alone, alone(ids), grad_z)
    broken = split.embedding.weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward(split, split(shards_of(ids, lengths)), shards_of(grad_z, lengths, 1))
    broken.remove()
    split.zero_grad()
    for times in (1, 2):
        z = split(shards_of(ids, lengths)) + split.offset.sum()
        got = backward(split, z, shards_of(grad_z, lengths, 1))
        assert got.pop("unused") is None
        close(got.pop("offset"), torch.full_like(split.offset, times * grad_z.sum().item() / size), "offset")
        for name, value in got.items():
            close(value, times * wanted[name] / size, f"{name}, {times}")


def averaged_in_two_messages(size: int) -> None:
    """The first as soon as all but the first parameters' gradients are complete; nothing of a backward that raised counts.

    Gradients of a nested backward are averaged too, whether they come before the first message or behind it.
    """
    group = mesh_of(size).get_group()
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 8), nn.Linear(8, 8)).to(DEVICE, STRICT)
    alone = copy.deepcopy(layers)
    distributed.average_gradients(layers, group)
    x, log, all_reduce = randn(size, 4, 2), [], dist.all_reduce
    layers[0].weight.register_hook(lambda grad: log.append("the last gradient"))
    first, others = 2 * 3 + 3, 8 * 3 + 8 + 8 * 8 + 8

    def logged(tensor: Tensor, *args, **how):
        log.append(tensor.numel())
        return all_reduce(tensor, *args, **how)

    def backward(net: nn.Module, x: Tensor, nested: str = "") -> None:
        def again(x: Tensor) -> Tensor:
            return checkpoint(net[1:], net[0](x), use_reentrant=True)

        ways = {"": [net], "before": [net, again], "behind": [again, net]}[nested]  # what was computed last goes back first
        sum(way(x).sin().sum() for way in ways).backward()

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(dist, "all_reduce", logged)
        broken = layers[0].bias.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backward(layers, x[dist.get_rank(group)])
        broken.remove()
        layers.zero_grad()
        for nested in ("", "", "before", "behind"):
            log.clear()
            backward(layers, x[dist.get_rank(group)], nested)
            assert nested or log == [others, "the last gradient", first]
            for rank in range(size):
                backward(alone, x[rank], nested)
            for (name, got), want in zip(layers.named_parameters(), alone.parameters(), strict=True):
                close(got.grad, want.grad / size, f"{name}, {nested}")


def stack_of_blocks(size: int) -> None:
    """Blocks on a tensor that has a gradient, one exchange for both; the last of them split by hand."""
    torch.manual_seed(3)
    alone = nn.Sequential(ResidualCausalBlock(8, 3, 4, norm="rms"), ResidualCausalBlock(8, 2, 7)).to(DEVICE, STRICT)
    split = parallelize_module(copy.deepcopy(alone), mesh_of(size), TimeParallel())
    lengths = (10,) * size
    for last in (False, True):
        x, grad_y = randn(2, 8, sum(lengths)), randn(2, 8, sum(lengths))
        x = x.mT.contiguous().mT if last else x
        leaf, mine = x.clone().requires_grad_(), shards_of(x, lengths).clone().requires_grad_()
        want, got = alone(leaf), split(mine)
        close(got, shards_of(want, lengths))
        want.backward(grad_y)
        got.backward(shards_of(grad_y, lengths))
        close(mine.grad, shards_of(leaf.grad, lengths))


def channels_and_time(lengths: tuple[int, ...]) -> None:
    """Both at once, on the two dimensions of a mesh."""
    mesh, alone, split = mesh_of_two_by(2), new_tokenizer(), new_tokenizer()
    ids, grad_z = torch.randint(256, (2, sum(lengths))).to(DEVICE), randn(2, sum(lengths), 6)
    parallelize_module(split, mesh["model"], {"blocks.*.conv": ColwiseConv1d(output_layouts=Replicate())})
    parallelize_module(split, mesh["data"], TimeParallel())
    here = mesh["data"].get_local_rank()
    z, want = split(ids.split(lengths, 1)[here]), alone(ids)
    close(z, want.split(lengths, 1)[here], "z")
    wanted = backward(alone, want, grad_z)
    for name, value in backward(split, z, grad_z.split(lengths, 1)[here]).items():
        total = (value.full_tensor() if isinstance(value, DTensor) else value).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=mesh["data"].get_group())
        close(total, wanted[name], name)


def compiled(where: str) -> None:
    """The exchange breaks the graph, without a word; what lies between is compiled."""
    lengths = (30, 30)
    alone, split = new_tokenizer(), new_tokenizer()
    parallelize_module(split, mesh_of(2), TimeParallel() if where == "input" else {"blocks.*.conv": TimeParallel()})
    ids, grad_z = torch.randint(256, (2, sum(lengths))).to(DEVICE), randn(2, sum(lengths), 6)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(Dynamo|lru_cache)")
        z = torch.compile(split, backend="aot_eager")(shards_of(ids, lengths))
    want = alone(ids)
    close(z, shards_of(want, lengths, 1), "z")
    wanted = backward(alone, want, grad_z)
    for name, value in backward(split, z, shards_of(grad_z, lengths, 1)).items():
        close(summed(value, 2), wanted[name], name)


def bench_runs() -> list[bench.sequence_parallel.Row]:
    scaling = bench.sequence_parallel
    scaling.ROUNDS = scaling.EAGER_ROUNDS = scaling.EAGER_STEPS = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forms = [name for name in scaling.FORMS if not name.endswith("one unit")]
        return list(scaling.rows([64, 20], 16, forms, torch.device(DEVICE.type)))


# ---- packed sequences


def packed_convolution(lengths: tuple[int, ...], ends: tuple[int, ...], activation: str | None) -> None:
    """Sequences that lie in one rank, in several, or in none."""
    size, total = len(lengths), sum(lengths)
    cu_seqlens = torch.tensor([0, *ends, total], dtype=torch.int32, device=DEVICE)
    for residual, (K, d) in itertools.product(("none", "x", "own"), ((3, 1), (3, 4))):
        tensors, grad_y = problem(1, 8, total, K, activation), randn(1, 8, total)
        how = dict(dilation=d, activation=activation, cu_seqlens=cu_seqlens)
        want = with_gradients(causal_conv1d, tensors, residual, lambda y, g=grad_y: g, **how)
        mine = {name: shards_of(value, lengths) if name in ("x", "residual") else value for name, value in tensors.items()}
        how |= dict(group=mesh_of(size).get_group(), lengths=lengths)
        got = with_gradients(distributed.causal_conv1d, mine, residual, lambda y, g=grad_y: shards_of(g, lengths), **how)
        for name, value in want.items():
            if name in ("weight", "bias"):
                close(summed(got[name], size), value, f"{residual}, K={K}, d={d}: {name}")
            else:
                close(got[name], shards_of(value, lengths), f"{residual}, K={K}, d={d}: {name}")


def packed_tokenizer(lengths: tuple[int, ...], ends: tuple[int, ...], where: str) -> None:
    size, total = len(lengths), sum(lengths)
    alone, split = new_tokenizer(), new_tokenizer()
    parallelize_module(split, mesh_of(size), TimeParallel() if where == "input" else {"blocks.*.conv": TimeParallel()})
    ids, grad_z = torch.randint(256, (1, total)).to(DEVICE), randn(1, total, 6)
    cu_seqlens = torch.tensor([0, *ends, total], dtype=torch.int32, device=DEVICE)
    z, want = split(shards_of(ids, lengths), cu_seqlens), alone(ids, cu_seqlens)
    close(z, shards_of(want, lengths, 1), "z")
    wanted = backward(alone, want, grad_z)
    for name, value in backward(split, z, shards_of(grad_z, lengths, 1)).items():
        close(summed(value, size), wanted[name], name)


def boundaries_are_refused(size: int) -> None:
    """Before anything is sent, by every rank alike: they are of the whole."""
    conv, x = CausalConv1d(4, 4, 3), torch.zeros(1, 4, 5)
    with pytest.raises(ValueError, match=rf"^cu_seqlens ends with 5; expected the time steps of the packed batch, {5 * size}$"):
        ends = torch.tensor([0, 5], dtype=torch.int32)
        distributed.causal_conv1d(x, conv.weight, group=mesh_of(size).get_group(), cu_seqlens=ends)


def boundaries_of_a_stack_are_refused(size: int) -> None:
    """By every rank with the same words, though what is cut to a rank's steps may look right there."""
    tokenizer = parallelize_module(new_tokenizer(), mesh_of(size), TimeParallel())
    ids, total = torch.zeros(1, 50, dtype=torch.long), 50 * size
    for ends, message in {
        (0, 30, total + 1): f"cu_seqlens ends with {total + 1}; expected the time steps of the packed batch, {total}",
        (0, 50): f"cu_seqlens ends with 50; expected the time steps of the packed batch, {total}",
        (7, 30, total): "cu_seqlens begins with 7; expected 0",
        (0, 30, 10, total): "cu_seqlens falls from 30 to 10 at number 2; expected values that never decrease",
    }.items():
        with pytest.raises(ValueError, match=f"^{message}$"):
            tokenizer(ids, torch.tensor(ends, dtype=torch.int32))
