"""`ParallelStyle`s for `torch.distributed.tensor.parallel.parallelize_module`: channels or time, split over the ranks of a mesh."""

from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DeviceMesh, DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

import fuzzytok_kernels.distributed.sharding  # noqa: F401 (registers the rules)
from fuzzytok_kernels.checks import check_boundaries
from fuzzytok_kernels.distributed.exchange import TimeShards
from fuzzytok_kernels.distributed.sequence import causal_conv1d, with_history, without_history
from fuzzytok_kernels.nn import CausalConv1d


class _ConvParallel(ParallelStyle):
    def __init__(self, weight: Placement, bias: Placement, inputs: Placement, outputs: Placement, use_local_output: bool) -> None:
        self._parameters = {"weight": weight, "bias": bias}
        self._inputs, self._outputs, self._use_local_output = inputs, outputs, use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, CausalConv1d):
            raise TypeError(f"{type(self).__name__} was given a {type(module).__name__}; expected a CausalConv1d")
        for name, placement in self._parameters.items():
            if (value := getattr(module, name)) is not None:
                shard = distribute_tensor(value.detach().contiguous(), device_mesh, [placement], src_data_rank=self.src_data_rank)
                module.register_parameter(name, nn.Parameter(shard, value.requires_grad))

        def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            seen: dict[int, DTensor] = {}  # x may be the residual too, and the backward adds the two gradients where that is cheapest

            def distributed(value: Tensor, placement: Placement) -> DTensor:
                if isinstance(value, DTensor):
                    return value
                if id(value) not in seen:
                    seen[id(value)] = DTensor.from_local(value, device_mesh, [placement], run_check=False)
                return seen[id(value)]

            x = distributed(args[0], self._inputs)
            residual = kwargs.get("residual")
            if residual is not None:
                kwargs = {**kwargs, "residual": distributed(residual, self._outputs)}
            return (x, *args[1:]), kwargs

        def after(module: nn.Module, args: tuple, y: DTensor) -> Any:
            y = y.redistribute(placements=[self._outputs])
            return y.to_local() if self._use_local_output else y

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
        return module


class ColwiseConv1d(_ConvParallel):
    """Splits the output channels of a `CausalConv1d`, as `torch.distributed.tensor.parallel.ColwiseParallel` does those of a linear layer.

    x is (B, C_in, T) on every rank, or a DTensor; y is (B, C_out, T) in `output_layouts`, and so is a residual that is no DTensor. An
    activation needs no communication; a gate, whose two halves lie C_out / 2 apart, gathers the weight first.

    Args:
        output_layouts: of y; by default `Shard(1)`: each rank keeps its channels. `Replicate()` gathers them.
        use_local_output: whether y is this rank's own tensor, or a DTensor.
    """

    def __init__(self, *, output_layouts: Placement | None = None, use_local_output: bool = True) -> None:
        super().__init__(Shard(0), Shard(0), Replicate(), output_layouts or Shard(1), use_local_output)


class RowwiseConv1d(_ConvParallel):
    """Splits the input channels of a `CausalConv1d`, as `torch.distributed.tensor.parallel.RowwiseParallel` does those of a linear layer.

    x is this rank's part of (B, C_in, T), split by channels, or a DTensor; y is (B, C_out, T) in `output_layouts`, and so is a residual
    that is no DTensor. Bias and residual are added once. With an activation everything is gathered first, since no activation of a sum is
    the sum of activations: apply one to the result instead.

    Args:
        output_layouts: of y; by default `Replicate()`: summed over the ranks. `Shard(1)` leaves each rank its channels of the sum.
        use_local_output: whether y is this rank's own tensor, or a DTensor.
    """

    def __init__(self, *, output_layouts: Placement | None = None, use_local_output: bool = True) -> None:
        super().__init__(Shard(1), Replicate(), Shard(1), output_layouts or Replicate(), use_local_output)


class TimeParallel(ParallelStyle):
    """Sequence parallel: each rank holds as many consecutive steps as the others, in the order of the ranks of the mesh.

    On a stack of causal convolutions (a `FuzzyTokenizer`, an `nn.Sequential` of blocks) its ranks exchange once, at its input, and compute
    their receptive field anew; bytes have no gradient, so that nothing comes back. On a `CausalConv1d` they exchange its history, during
    its computation; in a model, `{"blocks.*.conv": TimeParallel()}`. The first is faster as long as the receptive field costs less to
    compute than a message takes: `python3 -m bench.scaling` says where that ends. Whatever else the module does must not mix steps. The
    gradients of parameters are of this rank's steps; `average_gradients`, FSDP2 or DDP over the same ranks averages them.

    The first argument is this rank's part of (B, T) or (..., T), and so is the result of (B, T, ...) or (..., T). `cu_seqlens`, where the
    module takes them, are those of the whole on every rank: a sequence may lie in several.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        base = _ExchangesAtTheConvolution if isinstance(module, CausalConv1d) else _ExchangesAtTheInput
        changed: Any = module
        changed.__class__ = type(f"TimeParallel{type(module).__name__}", (base, type(module)), {})  # as FSDP2 does
        changed.time_group = device_mesh.get_group()
        changed.time_history = sum((conv.kernel_size - 1) * conv.dilation for conv in module.modules() if isinstance(conv, CausalConv1d))
        return module


class _ExchangesAtTheInput(nn.Module):
    time_group: ProcessGroup
    time_history: int

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        shards, T = TimeShards.of(x.shape[-1], self.time_group), x.shape[-1]
        before = shards.before(self.time_history)
        if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
            check_boundaries(cu_seqlens, sum(shards.lengths))  # what is cut to this rank's steps may look right
        sequences = [] if cu_seqlens is None else [shards.boundaries(cu_seqlens, before, T)]
        y = super().forward(with_history(x, self.time_history, shards), *sequences)
        return without_history(y, before, x.dim() - 1)


class _ExchangesAtTheConvolution(CausalConv1d):
    time_group: ProcessGroup

    def forward(  # type: ignore[override]  # no states: those of a rank are its neighbour's steps
        self, x: Tensor, *, activation: str | None = None, residual: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        return causal_conv1d(
            x,
            self.weight,
            self.bias,
            group=self.time_group,
            dilation=self.dilation,
            activation=activation,
            residual=residual,
            cu_seqlens=cu_seqlens,
        )
