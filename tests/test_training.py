"""What training loops are made of: loss scaling, optimisers, torch.func on modules, activation checkpointing, DDP and FSDP2."""

import copy
import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from modes import HALF, ON_CUDA, not_interpreted
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fuzzytok_kernels import CausalConv1d, ResidualCausalBlock

FUSED = torch.ops.fuzzytok.causal_conv1d_fused.default


@pytest.fixture(autouse=True)
def strict_fp32(strict):
    """TF32 off, so that two ways to the same numbers are close."""


def new_net(device: torch.device | str = "cpu", seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(CausalConv1d(8, 16, 3, dilation=2), ResidualCausalBlock(16, 3, activation="silu", norm="rms")).to(device)


def batch(device: torch.device | str = "cpu", B: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, 8, 19).to(device), torch.randn(B, 16, 19).to(device)


def loss_of(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return (net(x) - target).float().square().mean()


def with_contiguous_parameters(net: nn.Module) -> nn.Module:
    """As the README says for what refuses parameters that are not."""
    net.load_state_dict({name: value.contiguous() for name, value in net.state_dict().items()}, assign=True)
    return net


def is_tap_major(weight: Tensor) -> bool:
    return weight.permute(2, 0, 1).is_contiguous()


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


def close(got, want, **tolerance) -> None:
    torch.testing.assert_close(got, want, **(tolerance or dict(rtol=1e-4, atol=1e-5)))


# ---- one device


def test_grad_scaler(device):
    """Scaled gradients come out as they would without; an overflow leaves the parameters as they are, and the next step counts."""
    net, (x, target) = new_net(device), batch(device)
    with torch.autocast(device.type, dtype=torch.float16):
        loss_of(net, x, target).backward()
    want = gradients(net)
    scaler, optimiser = torch.amp.GradScaler(device.type, init_scale=2.0**10), torch.optim.SGD(net.parameters(), lr=0.1)
    before = copy.deepcopy(net.state_dict())
    for factor in (float("inf"), 1.0):
        optimiser.zero_grad()
        with torch.autocast(device.type, dtype=torch.float16):
            loss = loss_of(net, x, target)
        scaler.scale(loss * factor).backward()
        scaler.unscale_(optimiser)
        if factor == 1.0:
            close(gradients(net), want, rtol=2e-2, atol=1e-3)
        scaler.step(optimiser)
        scaler.update()
        unchanged = all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert unchanged == (factor != 1.0)
    assert scaler.get_scale() == 2.0**9


@not_interpreted
@pytest.mark.parametrize("how", ["foreach", "fused"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_optimisers(kind, how, device):
    """As one parameter after the other; and the weights stay tap-major."""
    nets = [new_net(device) for _ in range(2)]
    optimisers = [kind(net.parameters(), lr=0.01, **{way: True}) for net, way in zip(nets, (how, "foreach"), strict=True)]
    optimisers[1].param_groups[0]["foreach"] = False
    for _ in range(3):
        for net, optimiser in zip(nets, optimisers, strict=True):
            optimiser.zero_grad()
            loss_of(net, *batch(device)).backward()
            optimiser.step()
    close(*(net.state_dict() for net in nets))
    assert not torch.equal(nets[0][0].weight, new_net(device)[0].weight)
    assert is_tap_major(nets[0][0].weight)


@not_interpreted
def test_what_wants_contiguous_parameters(device):
    """LBFGS, the parameters as one vector, and pruning."""
    net, (x, target) = with_contiguous_parameters(new_net(device)), batch(device)
    optimiser = torch.optim.LBFGS(net.parameters(), lr=0.5)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = loss_of(net, x, target)
        loss.backward()
        return loss

    first = optimiser.step(closure)
    assert loss_of(net, x, target) < 0.8 * first
    other = with_contiguous_parameters(new_net(device, seed=5))
    vector_to_parameters(parameters_to_vector(net.parameters()), other.parameters())
    close(net(x), other(x))
    prune.l1_unstructured(net[0], "weight", 0.5)
    net(x)
    assert int((net[0].weight == 0).sum()) == net[0].weight.numel() // 2


@not_interpreted
def test_functional_call_and_an_ensemble(device):
    nets, (x, target) = [new_net(device, seed) for seed in range(3)], batch(device)

    def loss(parameters: dict, x: Tensor) -> Tensor:
        return (functional_call(nets[0], parameters, (x,)) - target).square().mean()

    parameters, _ = stack_module_state(nets)
    got = vmap(grad(loss), (0, None))(parameters, x)
    for i, net in enumerate(nets):
        loss_of(net, x, target).backward()
        close({name: value[i] for name, value in got.items()}, gradients(net))
        one = grad(loss)({name: value.detach() for name, value in net.named_parameters()}, x)
        close(one, gradients(net))


class Calls(TorchDispatchMode):
    """Counts calls by op."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function] += 1
        return function(*args, **(kwargs or {}))


def _keep_ours(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op is FUSED else CheckpointPolicy.PREFER_RECOMPUTE


CONTEXTS = {"all recomputed": None, "ours kept": functools.partial(create_selective_checkpoint_contexts, _keep_ours)}


@pytest.mark.parametrize("kept", CONTEXTS)
def test_activation_checkpointing(kept, device):
    """Selective too: an op that the policy keeps does not run again in the backward."""
    blocks, x, forward = _checkpointed(kept, device)
    with Calls() as calls:
        got = _step(forward, blocks, x)
    close(got, _step(blocks, blocks, x))
    assert (calls.counts[FUSED] == 2) == (CONTEXTS[kept] is not None)


@pytest.mark.parametrize("kept", CONTEXTS)
def test_activation_checkpointing_compiled(kept, device):
    torch._dynamo.reset()
    blocks, x, forward = _checkpointed(kept, device)
    counts: Counter = Counter()

    def count(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        counts.update(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    close(_step(torch.compile(forward, fullgraph=True, backend=backend), blocks, x), _step(blocks, blocks, x))
    assert counts[FUSED] == (3 if CONTEXTS[kept] is None else 2)  # nobody needs the last block's output again


def _checkpointed(kept: str, device: torch.device) -> tuple[nn.Module, Tensor, Callable]:
    blocks = nn.Sequential(*(ResidualCausalBlock(16, 3, activation="silu", norm="rms") for _ in range(2))).to(device)
    x = torch.randn(2, 16, 11, device=device)
    context_fn = {} if CONTEXTS[kept] is None else dict(context_fn=CONTEXTS[kept])
    return blocks, x, lambda x: checkpoint(blocks, x, use_reentrant=False, **context_fn)


def _step(function: Callable, blocks: nn.Module, x: Tensor) -> dict[str, Tensor]:
    blocks.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **gradients(blocks)}


# ---- two ranks


TWO_GPUS = ON_CUDA and torch.cuda.device_count() >= 2


def _rank(rank: int, file: str, work: Callable) -> None:
    dist.init_process_group("nccl" if TWO_GPUS else "gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    if TWO_GPUS:
        torch.cuda.set_device(rank)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*strides.*")
            work(rank, f"cuda:{rank}" if TWO_GPUS else "cpu")
    finally:
        dist.destroy_process_group()


def on_two_ranks(work: Callable, tmp_path) -> None:
    """`work(rank, device)` in two processes: on a GPU each, or through gloo on the CPU."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"), work), nprocs=2)


def _halves(rank: int, device: str) -> tuple[Tensor, Tensor]:
    x, target = batch(device)
    return x[2 * rank : 2 * rank + 2], target[2 * rank : 2 * rank + 2]


def _ddp(rank: int, device: str) -> None:
    alone, net = new_net(device), DistributedDataParallel(new_net(device, seed=rank))  # rank 0's parameters are everyone's
    optimisers = [torch.optim.AdamW(each.parameters()) for each in (alone, net)]
    for _ in range(2):
        for each, optimiser, data in zip((alone, net), optimisers, (batch(device), _halves(rank, device)), strict=True):
            optimiser.zero_grad()
            loss_of(each, *data).backward()
            optimiser.step()
        close(gradients(net.module), gradients(alone))
    assert is_tap_major(net.module[0].weight) and is_tap_major(net.module[0].weight.grad)


@not_interpreted
def test_ddp(tmp_path):
    """Two steps on halves of a batch are two steps on all of it; no bucket's strides differ from its gradient's."""
    on_two_ranks(_ddp, tmp_path)


def _fsdp2(rank: int, device: str) -> None:
    alone, net, mesh = new_net(device), new_net(device), init_device_mesh(torch.device(device).type, (2,))
    with pytest.raises(NotImplementedError, match="non-contiguous"):  # when this goes, so can the README's advice
        fully_shard(copy.deepcopy(net), mesh=mesh)
    with_contiguous_parameters(net)
    apply_activation_checkpointing(net, check_fn=lambda module: isinstance(module, ResidualCausalBlock))
    policy = MixedPrecisionPolicy(param_dtype=HALF, reduce_dtype=torch.float32)
    for module in itertools.chain(net, [net]):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for each, data in ((alone, batch(device)), (net, _halves(rank, device))):
        loss_of(each, *data).backward()
    sharded, want = dict(net.named_parameters()), gradients(alone)
    for name, parameter in sharded.items():
        wanted = want[name.replace("_checkpoint_wrapped_module.", "")]
        assert parameter.grad.dtype == torch.float32
        assert parameter.to_local().shape[0] == wanted.shape[0] // 2
        close(parameter.grad.full_tensor(), wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.01)
    first = loss_of(net, *_halves(rank, device)).item()
    for _ in range(3):
        optimiser.step()
        optimiser.zero_grad()
        loss = loss_of(net, *_halves(rank, device))
        loss.backward()
    assert net(batch(device)[0]).dtype == HALF
    assert loss.item() < first


@not_interpreted
def test_fsdp2(tmp_path):
    """With a mixed-precision policy and activation checkpointing, after the weights have been made contiguous."""
    on_two_ranks(_fsdp2, tmp_path)
