"""The launchers: allocate, choose a config, make descriptors and a grid, launch. The same functions as `reference`, on Triton.

What sizes, strides, alignment and the config decide is worked out once and kept as a plan, a function of the tensors alone: a warm call
finds its plan, allocates and launches.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuzzytok_kernels import tuning
from fuzzytok_kernels.asserted import assertion
from fuzzytok_kernels.checks import CHECKS
from fuzzytok_kernels.descriptors import PLANES, Traits, as_it_is, descriptor, planes, rows, rows_or_columns, taps, traits
from fuzzytok_kernels.kernels.conv import conv_pointer_kernel, conv_tma_kernel
from fuzzytok_kernels.kernels.weight_grad import reduce_partials_kernel, weight_grad_pointer_kernel, weight_grad_tma_kernel
from fuzzytok_kernels.layout import empty_weight, is_channels_last, output_strides
from fuzzytok_kernels.private_triton import OutOfResources
from fuzzytok_kernels.program import Kernel, cdiv, may_overlap, on, persistent, tell
from fuzzytok_kernels.reference import GATES
from fuzzytok_kernels.support import approximates, conv_switch, facts
from fuzzytok_kernels.tuning import Config, Problem, rounded_steps
from fuzzytok_kernels.tuning.problem import describable
from fuzzytok_kernels.tuning.space import default_config

_Maybe = Tensor | None
_plans = functools.lru_cache(maxsize=4096)  # for each op; a training run whose T changes makes one for every (B, T)

# Tensor cores cut what they add to fp32 off, always towards zero: after 16 million steps 1 % was gone (seen on an H100, T = 2**31).
_LONGEST_SUM = 4096  # blocks of time that one accumulator takes


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """x (B, C_in, T), weight (C_out, C_in, K), bias (C_out,) -> y (B, C_out, T)."""
    plan = _forward_plan(traits(x), traits(weight), _traits_or_none(bias), dilation, _dtype_name(x), tuning.generation())
    return plan(x, weight, bias, None, None, None)


def causal_conv1d_fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dilation: int,
    activation: str,
) -> Tensor:
    """x (B, C_in, T), weight (C_out, C_in, K), bias (C_out,), residual (B, C, T) -> y (B, C, T); C is C_out, or half of it for a gate.

    initial_state (N, C_in, (K - 1) * dilation), cu_seqlens (N + 1,).
    """
    tensors = x, weight, bias, residual, initial_state, _contiguous(cu_seqlens)
    return _fused_plan(*map(_traits_or_none, tensors), dilation, activation, _dtype_name(x), tuning.generation())(*tensors)


def causal_conv1d_activation_grad(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dilation: int,
    activation: str,
) -> Tensor:
    """grad_y (B, C, T), x (B, C_in, T), weight (C_out, C_in, K), bias (C_out,) -> the gradient (B, C_out, T) before the activation.

    initial_state (N, C_in, (K - 1) * dilation), cu_seqlens (N + 1,).
    """
    tensors = x, weight, bias, grad_y, initial_state, _contiguous(cu_seqlens)
    return _activation_grad_plan(*map(_traits_or_none, tensors), dilation, activation, _dtype_name(x), tuning.generation())(*tensors)


def causal_conv1d_input_grad(
    grad_y: Tensor, weight: Tensor, dilation: int = 1, residual: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """grad_y (B, C_out, T), weight (C_out, C_in, K), residual (B, C_in, T), cu_seqlens (N + 1,) -> grad_x (B, C_in, T)."""
    cu_seqlens = _contiguous(cu_seqlens)
    traits_of_all = traits(grad_y), traits(weight), _traits_or_none(residual), _traits_or_none(cu_seqlens)
    plan = _input_grad_plan(*traits_of_all, dilation, _dtype_name(grad_y), tuning.generation())
    return plan(grad_y, weight, None, residual, None, cu_seqlens)


def causal_conv1d_weight_grad(
    grad_y: Tensor, x: Tensor, kernel_size: int, dilation: int = 1, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """grad_y (B, C_out, T), x (B, C_in, T), cu_seqlens (N + 1,) -> grad_weight (C_out, C_in, K), grad_bias (C_out,)."""
    cu_seqlens = _contiguous(cu_seqlens)
    traits_of_all = traits(grad_y), traits(x), _traits_or_none(cu_seqlens)
    return _weight_grad_plan(*traits_of_all, kernel_size, dilation, _dtype_name(x), tuning.generation())(grad_y, x, cu_seqlens)


# ---- plans: what the tensors' traits decide


@_plans
def _forward_plan(x: Traits, weight: Traits, bias: Traits | None, dilation: int, dtype: str, generation: int) -> Callable[..., Tensor]:
    CHECKS["causal_conv1d"](x, weight, bias, dilation)
    problem = _problem("causal_conv1d", x, weight, dtype, dilation)
    return _conv_plan(problem, x, weight, (2, 0, 1), bias, _NOTHING, _ROWS, dilation)


@_plans
def _fused_plan(
    x: Traits,
    weight: Traits,
    bias: Traits | None,
    residual: Traits | None,
    state: Traits | None,
    cu_seqlens: Traits | None,
    dilation: int,
    activation: str,
    dtype: str,
    generation: int,
) -> Callable[..., Tensor]:
    CHECKS["causal_conv1d_fused"](x, weight, bias, residual, state, cu_seqlens, dilation, activation)
    after, sequences = _After(activation, "none" if residual is None else "residual", residual), _Sequences(state, cu_seqlens)
    if after == _NOTHING:
        problem = _problem("causal_conv1d", x, weight, dtype, dilation, sequences=sequences)
    else:
        epilogue = "residual" if activation == "none" else activation
        problem = _problem("causal_conv1d_fused", x, weight, dtype, dilation, epilogue, sequences)
    return _conv_plan(problem, x, weight, (2, 0, 1), bias, after, sequences, dilation)


@_plans
def _activation_grad_plan(
    x: Traits,
    weight: Traits,
    bias: Traits | None,
    grad_y: Traits,
    state: Traits | None,
    cu_seqlens: Traits | None,
    dilation: int,
    activation: str,
    dtype: str,
    generation: int,
) -> Callable[..., Tensor]:
    CHECKS["causal_conv1d_activation_grad"](grad_y, x, weight, bias, state, cu_seqlens, dilation, activation)
    after, sequences = _After(activation, "grad_y", grad_y), _Sequences(state, cu_seqlens)
    problem = _problem("causal_conv1d_activation_grad", x, weight, dtype, dilation, activation, sequences)
    return _conv_plan(problem, x, weight, (2, 0, 1), bias, after, sequences, dilation)


@_plans
def _input_grad_plan(
    grad_y: Traits,
    weight: Traits,
    residual: Traits | None,
    cu_seqlens: Traits | None,
    dilation: int,
    dtype: str,
    generation: int,
) -> Callable[..., Tensor]:
    CHECKS["causal_conv1d_input_grad"](grad_y, weight, dilation, residual, cu_seqlens)
    after, sequences = _After("none", "none" if residual is None else "residual", residual), _Sequences(None, cu_seqlens)
    # Packed, it has the config of one with a residual: neither loop is flattened, see _conv (52 -> 48 us).
    epilogue = "residual" if sequences.packed else after.kind
    problem = _problem("causal_conv1d_input_grad", grad_y, weight, dtype, dilation, epilogue, sequences)
    return _conv_plan(problem, grad_y, weight, (2, 1, 0), None, after, sequences, -dilation)


def _plan(problem: Problem, device: torch.device, build: Callable[[Config], Callable], packed: tuple[int, int] | None = None) -> Callable:
    """What `build` makes of the config of `problem`; of the default, with one warning, if that asks for more than the GPU has.

    What else fails says of which problem.
    """
    stored = build(tuning.get_config(_device_index(device), problem, packed))
    launches = [stored]

    def launch(*tensors: Tensor | None) -> Any:
        run = launches[-1]
        try:
            return run(*tensors)
        except OutOfResources as error:
            if run is not stored or tuning.is_forced():
                raise OutOfResources(error.required, error.limit, f"{error.name} for {problem}") from error
            if len(launches) == 1:  # else another thread was here before
                warnings.warn(f"fuzzytok_kernels: the config for {problem} does not fit ({error}); the default runs instead", stacklevel=2)
                launches.append(build(default_config(problem)))
        except RuntimeError as error:
            tell(problem, error)
            raise
        return launch(*tensors)

    return on(device, launch)


class _After(NamedTuple):
    """What follows the product and its bias in the same kernel."""

    activation: str
    kind: str  # what `extra` is: "none", "residual" or "grad_y"
    extra: Traits | None


_NOTHING = _After("none", "none", None)


class _Sequences(NamedTuple):
    """What lies before the first steps, and where those are, if not zeros and the beginning of each row."""

    state: Traits | None
    cu_seqlens: Traits | None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def n_sequences(self) -> int | None:
        """How many are packed; None of a batch."""
        return self.cu_seqlens.shape[0] - 1 if self.cu_seqlens else None

    def tiles(self, B: int, T: int, block_t: int) -> int:
        """Of time, in all; where sequences are packed the slots of `kernels/sequences.py`, of which some may be empty."""
        return B * cdiv(T, block_t) if self.n_sequences is None else T // block_t + max(1, self.n_sequences)

    def strides_between(self, strides: tuple[int, ...]) -> tuple[int, ...]:
        """Those of a tensor, the first of them as the kernels count sequences: packed ones by the step at which they begin."""
        return (strides[2], *strides[1:]) if self.cu_seqlens else strides

    @property
    def numbers(self) -> tuple[int | None, ...]:
        """How many sequences are packed, and the strides of the state."""
        return self.n_sequences, *(self.state.strides if self.state else (None,) * 3)


_ROWS = _Sequences(None, None)


def _conv_plan(
    problem: Problem, x: Traits, weight: Traits, axes: tuple, bias: Traits | None, after: _After, sequences: _Sequences, shift: int
) -> Callable[..., Tensor]:
    n, T = sequences.n_sequences, x.shape[2]
    packed = (n, T) if n and T and sequences.state is None else None  # behind a state _conv bounds no registers, and three would not fit
    return _plan(problem, x.device, functools.partial(_conv, problem, x, weight, axes, bias, after, sequences, shift), packed)


def _conv(
    problem: Problem,
    x: Traits,
    weight: Traits,
    axes: tuple,
    bias: Traits | None,
    after: _After,
    sequences: _Sequences,
    shift: int,
    config: Config,
) -> Callable[..., Tensor]:
    """p[t] = bias + sum_k weight[k] @ x[t - k*shift], and what comes after; `axes` make of the weight a (K, C_out, C_in)."""
    (B, c_in, T), (K, c_out, _) = x.shape, (weight.shape[axis] for axis in axes)
    parts = 2 if after.activation in GATES else 1
    parts_of_y = parts if after.kind == "grad_y" else 1
    channels = c_out // parts * parts_of_y
    strides = output_strides(x.strides, channels, T)
    allocate = functools.partial(torch.empty_strided, (B, channels, T), strides, dtype=x.dtype, device=x.device)
    if B * T == 0:
        return lambda *tensors: allocate()
    if sequences.state is None:
        shift = max(-T, min(shift, T))  # a tap further back than T sees zeros alone
    stride_bias = 0 if bias is None else bias.strides[0]
    strides_of_extra = after.extra.strides if after.extra else (0, 0, 0)
    approximate = approximates(x.dtype, x.device)
    constants = (K, parts, bias is not None, after.activation, approximate, after.kind, _precision(problem, x.device))
    blocks, times = cdiv(c_out // parts, config.BLOCK_C_OUT // parts), sequences.tiles(B, T, config.BLOCK_T)
    unasserted = sequences.cu_seqlens if shift > 0 and after.kind != "grad_y" else None  # those of a backward its forward has asserted
    if config.path == "pointer":
        pointer_kernel, assert_sequences = Kernel(conv_pointer_kernel, times * blocks, constants, config), assertion(unasserted, T)
        strides_of_weight = [weight.strides[axis] for axis in axes]
        of_x, of_extra, of_y = map(sequences.strides_between, (x.strides, strides_of_extra, strides))
        numbers = (T, c_in, c_out, shift, stride_bias, *of_x, *strides_of_weight, *of_extra, *of_y, *sequences.numbers)

        def launch_pointers(x: Tensor, weight: Tensor, bias: _Maybe, extra: _Maybe, state: _Maybe, cu_seqlens: _Maybe) -> Tensor:
            y = allocate()
            pointer_kernel(x, weight, bias, extra, y, state, cu_seqlens, *numbers)
            assert_sequences(cu_seqlens)
            return y

        return launch_pointers

    read_x = rows(x, config.BLOCK_T, config.BLOCK_C_IN, sequences.packed, looks_on=shift < 0)
    read_weight, in_last = taps(weight, axes, parts, config.BLOCK_C_IN, config.BLOCK_C_OUT, _precision(problem, x.device) == "tf32")
    described, half = problem.layout == "last", config.BLOCK_C_OUT // 2
    read_extra: Callable[[Any], Any] = rows(after.extra, config.BLOCK_T, half) if described and after.extra else as_it_is
    if sequences.packed:  # each program keeps to one block of channels
        programs = persistent(x.device, blocks, times, config.programs_per_sm)
    else:
        programs = min(times * blocks, config.programs_per_sm * facts(x.device).multiprocessors)
    # Blocks outside of a row are not free: with two taps in three 512 and 1,024 of 2,048 steps back a forward took 50 us, without such
    # blocks 42, with near taps 43; 256 and 512 steps back even a loop fused by hand gained nothing (C=256, B*T=65,536, H100).
    far = sequences == _ROWS and (K - 1) * abs(shift) > T // 3
    # A second read in the epilogue of a flattened loop leaves no room for two programs: 49 -> 54 us. A loop that skips taps, has two loops
    # in it, or hands values on to its next turn, as that of packed sequences does, cannot be flattened.
    flatten = after.kind == "none" and sequences == _ROWS and not far
    # ptxas takes some registers more than for a batch. Strict fp32 and a state would spill, at 1 program.
    options: dict[str, Any] = {}
    if sequences.packed and sequences.state is None and problem.dtype != "fp32":
        options["maxnreg"] = min(255, 65_536 // (32 * config.num_warps * config.programs_per_sm) // 8 * 8)
    early = unasserted is not None and may_overlap(x.device)
    tma_kernel = Kernel(conv_tma_kernel, programs, (*constants, in_last, described, flatten, far, early), config, **options)
    assert_sequences = assertion(unasserted, T, early)
    width = channels // parts_of_y
    write_y = descriptor([B, T, parts_of_y, width], [strides[0], strides[2], width, 1], [1, config.BLOCK_T, 1, half])
    numbers = (B, T, c_in, c_out, shift, stride_bias, *strides_of_extra, *strides, *sequences.numbers)

    def launch_descriptors(x: Tensor, weight: Tensor, bias: _Maybe, extra: _Maybe, state: _Maybe, cu_seqlens: _Maybe) -> Tensor:
        y = allocate()
        out, memory = (write_y(y), y if sequences.packed else None) if described else (y, None)
        tma_kernel(read_x(x), read_weight(weight), bias, read_extra(extra), out, memory, state, cu_seqlens, *numbers)
        assert_sequences(cu_seqlens)
        return y

    return launch_descriptors


@_plans
def _weight_grad_plan(
    grad_y: Traits, x: Traits, cu_seqlens: Traits | None, kernel_size: int, dilation: int, dtype: str, generation: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    CHECKS["causal_conv1d_weight_grad"](grad_y, x, kernel_size, dilation, cu_seqlens)
    (B, c_out, T), c_in = grad_y.shape, x.shape[1]
    if B * T == 0:
        return lambda grad_y, x, cu_seqlens: (empty_weight(x, c_out, c_in, kernel_size).zero_(), x.new_zeros(c_out))
    weight = x._replace(shape=torch.Size((c_out, c_in, kernel_size)))
    sequences = _Sequences(None, cu_seqlens)
    problem = _problem("causal_conv1d_weight_grad", grad_y, weight, dtype, dilation, sequences=sequences)
    return _plan(problem, x.device, functools.partial(_weight_grad, problem, grad_y, x, sequences, min(dilation, T)))


def _weight_grad(
    problem: Problem, grad_y: Traits, x: Traits, sequences: _Sequences, shift: int, config: Config
) -> Callable[..., tuple[Tensor, Tensor]]:
    (B, c_out, T), c_in, kernel_size = grad_y.shape, x.shape[1], problem.kernel_size
    shares = cdiv(kernel_size, config.TAPS) * cdiv(c_in, config.BLOCK_C_IN)
    tiles, steps = shares * cdiv(c_out, config.BLOCK_C_OUT), sequences.tiles(B, T, config.BLOCK_T)
    filling = max(1, config.programs_per_sm * facts(x.device).multiprocessors // tiles)
    splits = min(steps, max(filling, cdiv(steps, _LONGEST_SUM)))
    precision = _precision(problem, x.device)
    if config.path == "tma" and precision == "bf16x3":
        return _weight_grad_of_planes(problem, grad_y, x, sequences, shift, config, splits, tiles)
    direct = splits == 1
    constants = kernel_size, precision, direct
    numbers: tuple[int | None, ...] = (B, T, c_in, c_out, shift, splits, sequences.n_sequences)
    read_grad_y: Callable[[Tensor], Any] = as_it_is
    read_x: Callable[[Tensor], Any] = as_it_is
    if config.path == "tma":
        read_grad_y, grad_y_last = rows_or_columns(grad_y, config.BLOCK_T, config.BLOCK_C_OUT, sequences.packed)
        read_x = rows(x, config.BLOCK_T, config.BLOCK_C_IN, sequences.packed)
        kernel = Kernel(weight_grad_tma_kernel, tiles * splits, (*constants, grad_y_last, 1), config, config.TAPS)
    else:
        kernel = Kernel(weight_grad_pointer_kernel, tiles * splits, constants, config, config.TAPS)
        numbers += (*sequences.strides_between(grad_y.strides), *sequences.strides_between(x.strides))
    reduce, weights = _reduction(splits, kernel_size * c_out * c_in, c_out), kernel_size * c_out * c_in

    def launch(grad_y: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        grad_weight, grad_bias = empty_weight(x, c_out, c_in, kernel_size), x.new_empty(c_out)
        if direct:
            kernel(read_grad_y(grad_y), read_x(x), grad_weight, grad_bias, cu_seqlens, *numbers)
        else:
            partial = x.new_empty(splits * (weights + shares * c_out), dtype=torch.float32)
            kernel(read_grad_y(grad_y), read_x(x), partial, partial, cu_seqlens, *numbers)
            reduce(partial, grad_weight, grad_bias, weights, c_out, splits, splits * shares)
        return grad_weight, grad_bias

    return launch


def _weight_grad_of_planes(
    problem: Problem, grad_y: Traits, x: Traits, sequences: _Sequences, shift: int, config: Config, splits: int, tiles: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Of TF32 through descriptors: planes of both in bf16, and the bias's sums by the copy that makes those of grad_y."""
    (B, c_out, T), c_in, kernel_size = grad_y.shape, x.shape[1], problem.kernel_size
    weights, multiprocessors = kernel_size * c_out * c_in, facts(x.device).multiprocessors
    # Eight copying programs a multiprocessor: 101 us for both copies at C=256, 65,536 steps, where four take 106.
    n_rows, n_rows_of_x = (max(1, min(B * cdiv(T, 64), 8 * multiprocessors // cdiv(channels, 64))) for channels in (c_out, c_in))
    read_grad_y = planes(grad_y, config.BLOCK_T, config.BLOCK_C_OUT, sequences.packed, n_rows)
    read_x = planes(x, config.BLOCK_T, config.BLOCK_C_IN, sequences.packed, n_rows_of_x)
    kernel = Kernel(weight_grad_tma_kernel, tiles * splits, (kernel_size, "ieee", False, True, PLANES), config, config.TAPS)
    numbers = (B, T, c_in, c_out, shift, splits, sequences.n_sequences)
    reduce = _reduction(max(splits, min(16, n_rows)), weights, c_out)  # the bias has more rows than the weight

    def launch(grad_y: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        grad_weight, grad_bias = empty_weight(x, c_out, c_in, kernel_size), x.new_empty(c_out)
        partial = x.new_empty(splits * weights + n_rows * c_out)
        described = read_grad_y(grad_y, partial[splits * weights :]), read_x(x, None)
        kernel(*described, partial, partial, cu_seqlens, *numbers)
        reduce(partial, grad_weight, grad_bias, weights, c_out, splits, n_rows)
        return grad_weight, grad_bias

    return launch


def _reduction(n_rows: int, weights: int, c_out: int) -> Kernel:
    # As many rows at a time as there are, and 4096 elements: enough loads in flight for a sum that is all latency.
    block_rows = min(32, 1 << (n_rows - 1).bit_length())
    block_columns = 4096 // block_rows
    return Kernel(reduce_partials_kernel, cdiv(weights, block_columns) + cdiv(c_out, block_columns), (block_rows, block_columns))


# ---- the problem


def _problem(
    op: str, x: Traits, weight: Traits, dtype: str, dilation: int, epilogue: str = "none", sequences: _Sequences = _ROWS
) -> Problem:
    (B, _, T), (c_out, c_in, K) = x.shape, weight.shape
    reach = T if sequences.state is None else T + dilation  # a tap further back than T sees the state
    sizes = c_in, c_out, K, epilogue, x.dtype.itemsize, reach, dilation
    aligned = facts(x.device).descriptors and describable(*sizes, sequences.packed)
    layout = "last" if is_channels_last(x.strides) else "first"
    return Problem(op, dtype, layout, aligned, epilogue, K, c_in, c_out, rounded_steps(B * T))


def _dtype_name(x: Tensor) -> str:
    if x.dtype == torch.bfloat16:
        return "bf16"
    if x.dtype == torch.float16:
        return "fp16"
    return "tf32" if facts(x.device).tf32 and conv_switch.fp32_precision == "tf32" else "fp32"


def _precision(problem: Problem, device: torch.device) -> str:
    """`input_precision` of the dots, which only fp32 needs: TF32, or three TF32 products for strict fp32.

    The weight-grad sums over T, the slower axis in memory, which the tensor cores take in 16 bits alone: there three or six bf16 products
    (58 times as exact as TF32, of numbers above 1e-36, and as exact as strict). Under TF32 through descriptors planes in memory are read,
    else split in registers: 591 us, with the copies, and 1,295 at C=512, B*T=65,536 on an H100.
    """
    if problem.dtype not in ("tf32", "fp32") or not facts(device).tf32:
        return "ieee"
    if problem.op == "causal_conv1d_weight_grad":
        return "bf16x3" if problem.dtype == "tf32" else "bf16x6"
    return "tf32" if problem.dtype == "tf32" else "tf32x3"


def _device_index(device: torch.device) -> int:
    return -1 if device.type == "cpu" else device.index


def _contiguous(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.contiguous()


def _traits_or_none(x: Tensor | None) -> Any:
    return None if x is None else traits(x)
