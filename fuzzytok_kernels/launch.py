"""The launchers: allocate, choose a config, make descriptors and a grid, launch. The same three functions as `reference`, on Triton.

What sizes, strides, alignment and the config decide is worked out once and kept as a plan, a function of the tensors alone: a warm call
finds its plan, allocates and launches.
"""

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import KernelInterface
from triton.tools.tensor_descriptor import TensorDescriptor

from fuzzytok_kernels import tuning
from fuzzytok_kernels.checks import check_causal_conv1d, check_causal_conv1d_input_grad, check_causal_conv1d_weight_grad
from fuzzytok_kernels.kernels.conv import conv_pointer_kernel, conv_tma_kernel
from fuzzytok_kernels.kernels.transpose import channels_last_kernel
from fuzzytok_kernels.kernels.weight_grad import reduce_partials_kernel, weight_grad_pointer_kernel, weight_grad_tma_kernel
from fuzzytok_kernels.layout import empty_weight, is_channels_last, output_strides
from fuzzytok_kernels.support import conv_switch, facts
from fuzzytok_kernels.tuning import Config, Problem, rounded_steps
from fuzzytok_kernels.tuning.space import default_config

_plans = functools.lru_cache(maxsize=4096)  # for each op; a training run whose T changes makes one for every (B, T)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """x (B, C_in, T), weight (C_out, C_in, K), bias (C_out,) -> y (B, C_out, T)."""
    traits_of_bias = None if bias is None else _traits(bias)
    return _forward_plan(_traits(x), _traits(weight), traits_of_bias, dilation, _dtype_name(x), tuning.generation())(x, weight, bias)


def causal_conv1d_input_grad(grad_y: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
    """grad_y (B, C_out, T), weight (C_out, C_in, K) -> grad_x (B, C_in, T)."""
    return _input_grad_plan(_traits(grad_y), _traits(weight), dilation, _dtype_name(grad_y), tuning.generation())(grad_y, weight, None)


def causal_conv1d_weight_grad(grad_y: Tensor, x: Tensor, kernel_size: int, dilation: int = 1) -> tuple[Tensor, Tensor]:
    """grad_y (B, C_out, T), x (B, C_in, T) -> grad_weight (C_out, C_in, K), grad_bias (C_out,)."""
    return _weight_grad_plan(_traits(grad_y), _traits(x), kernel_size, dilation, _dtype_name(x), tuning.generation())(grad_y, x)


# Tensor cores cut what they add to fp32 off, always towards zero: after 16 million steps 1 % was gone (seen on an H100, T = 2**31).
_LONGEST_SUM = 4096  # blocks of time that one accumulator takes


# ---- plans: what the tensors' traits decide


class _Traits(NamedTuple):
    """All that a plan, and a check, needs to know of a tensor."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool  # to 16 bytes


def _traits(x: Tensor) -> _Traits:
    return _Traits(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)


@_plans
def _forward_plan(x: _Traits, weight: _Traits, bias: _Traits | None, dilation: int, dtype: str, generation: int) -> Callable[..., Tensor]:
    check_causal_conv1d(x, weight, bias, dilation)
    c_out, c_in, kernel_size = weight.shape
    problem = _problem("causal_conv1d", x, dtype, c_in, c_out, kernel_size, dilation)
    return _plan(problem, x.device, functools.partial(_conv, problem, x, weight, (2, 0, 1), bias, dilation))


@_plans
def _input_grad_plan(grad_y: _Traits, weight: _Traits, dilation: int, dtype: str, generation: int) -> Callable[..., Tensor]:
    check_causal_conv1d_input_grad(grad_y, weight, dilation)
    c_out, c_in, kernel_size = weight.shape
    problem = _problem("causal_conv1d_input_grad", grad_y, dtype, c_in, c_out, kernel_size, dilation)
    return _plan(problem, grad_y.device, functools.partial(_conv, problem, grad_y, weight, (2, 1, 0), None, -dilation))


def _plan(problem: Problem, device: torch.device, build: Callable[[Config], Callable]) -> Callable:
    """What `build` makes of the config of `problem`; of the default, with one warning, if that asks for more than the GPU has."""
    launches = [build(tuning.get_config(_device_index(device), problem))]

    def launch(*tensors: Tensor | None) -> Any:
        try:
            return launches[-1](*tensors)
        except OutOfResources as error:
            if len(launches) > 1 or tuning.is_forced():
                raise
            warnings.warn(
                f"fuzzytok_kernels: the config stored for {problem} does not fit ({error}); the default runs instead", stacklevel=2
            )
            launches.append(build(default_config(problem)))
            return launches[-1](*tensors)

    return _on(device, launch)


def _conv(
    problem: Problem, x: _Traits, weight: _Traits, axes: tuple, bias: _Traits | None, shift: int, config: Config
) -> Callable[..., Tensor]:
    """y[t] = bias + sum_k weight[k] @ x[t - k*shift], where `axes` make of the weight a (K, C_out, C_in), C_in being summed over."""
    (B, c_in, T), (K, c_out, _) = x.shape, (weight.shape[axis] for axis in axes)
    strides = output_strides(x.strides, c_out, T)
    allocate = functools.partial(torch.empty_strided, (B, c_out, T), strides, dtype=x.dtype, device=x.device)
    if B * T == 0:
        return lambda x, weight, bias: allocate()
    shift = max(-T, min(shift, T))  # a tap further back than T sees zeros alone
    stride_bias = 0 if bias is None else bias.strides[0]
    constants = (K, bias is not None, _precision(problem, x.device))
    tiles = B * _cdiv(T, config.BLOCK_T) * _cdiv(c_out, config.BLOCK_C_OUT)
    if config.path == "pointer":
        pointer_kernel = _Kernel(conv_pointer_kernel, tiles, constants, config)
        numbers = (T, c_in, c_out, shift, stride_bias, *x.strides, *(weight.strides[axis] for axis in axes), *strides)

        def launch_pointers(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = allocate()
            pointer_kernel(x, weight, bias, y, *numbers)
            return y

        return launch_pointers

    rows = _rows(x, config.BLOCK_T, config.BLOCK_C_IN)
    taps, in_last = _taps(weight, axes, config)
    last = problem.layout == "last"
    programs = min(tiles, config.programs_per_sm * facts(x.device).multiprocessors)
    tma_kernel = _Kernel(conv_tma_kernel, programs, (*constants, in_last, last), config)
    y_shape, y_strides, y_block = [B, T, c_out], [strides[0], strides[2], 1], [1, config.BLOCK_T, config.BLOCK_C_OUT // 2]

    def launch_descriptors(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = allocate()
        out = TensorDescriptor(y, y_shape, y_strides, y_block) if last else y
        tma_kernel(rows(x), taps(weight), bias, out, B, T, c_in, c_out, shift, stride_bias)
        return y

    return launch_descriptors


@_plans
def _weight_grad_plan(
    grad_y: _Traits, x: _Traits, kernel_size: int, dilation: int, dtype: str, generation: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    check_causal_conv1d_weight_grad(grad_y, x, kernel_size, dilation)
    (B, c_out, T), c_in = grad_y.shape, x.shape[1]
    if B * T == 0:
        return lambda grad_y, x: (empty_weight(x, c_out, c_in, kernel_size).zero_(), x.new_zeros(c_out))
    problem = _problem("causal_conv1d_weight_grad", grad_y, dtype, c_in, c_out, kernel_size, dilation)
    return _plan(problem, x.device, functools.partial(_weight_grad, problem, grad_y, x, min(dilation, T)))


def _weight_grad(problem: Problem, grad_y: _Traits, x: _Traits, shift: int, config: Config) -> Callable[..., tuple[Tensor, Tensor]]:
    (B, c_out, T), c_in, kernel_size = grad_y.shape, x.shape[1], problem.kernel_size
    shares = kernel_size * _cdiv(c_in, config.BLOCK_C_IN)
    tiles, steps = shares * _cdiv(c_out, config.BLOCK_C_OUT), B * _cdiv(T, config.BLOCK_T)
    filling = max(1, config.programs_per_sm * facts(x.device).multiprocessors // tiles)
    splits = min(steps, max(filling, _cdiv(steps, _LONGEST_SUM)))
    weights = kernel_size * c_out * c_in
    # As many rows at a time as there are splits, and 4096 elements: enough loads in flight for a sum that is all latency.
    rows = min(32, 1 << (splits - 1).bit_length())
    columns = 4096 // rows
    reduce = _Kernel(reduce_partials_kernel, _cdiv(weights, columns) + _cdiv(c_out, columns), (rows, columns))
    constants = kernel_size, _precision(problem, x.device)
    numbers: tuple[int, ...] = (B, T, c_in, c_out, shift, splits, weights)
    read_grad_y: Callable[[Tensor], Any] = _as_it_is
    read_x: Callable[[Tensor], Any] = _as_it_is
    if config.path == "tma":
        read_grad_y, grad_y_last = _rows_or_columns(grad_y, config.BLOCK_T, config.BLOCK_C_OUT)
        read_x = _rows(x, config.BLOCK_T, config.BLOCK_C_IN)
        kernel = _Kernel(weight_grad_tma_kernel, tiles * splits, (*constants, grad_y_last), config)
    else:
        kernel = _Kernel(weight_grad_pointer_kernel, tiles * splits, constants, config)
        numbers += (*grad_y.strides, *x.strides)

    def launch(grad_y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        grad_weight, grad_bias = empty_weight(x, c_out, c_in, kernel_size), x.new_empty(c_out)
        partial = x.new_empty(splits * (weights + shares * c_out), dtype=torch.float32)
        kernel(read_grad_y(grad_y), read_x(x), partial, *numbers)
        reduce(partial, grad_weight, grad_bias, weights, c_out, splits, shares)
        return grad_weight, grad_bias

    return launch


class _Kernel:
    """A kernel with its grid and constants: compiled at its first call, then launched past Triton's binder (27 us -> 13 us)."""

    def __init__(self, jit: KernelInterface, programs: int, constants: tuple, config: Config | None = None) -> None:
        blocks = () if config is None else (config.BLOCK_T, config.BLOCK_C_IN, config.BLOCK_C_OUT)
        self._jit, self._grid, self._constants = jit, (programs, 1, 1), (*constants, *blocks)
        self._options = {} if config is None else {"num_warps": config.num_warps, "num_stages": config.num_stages}
        self._compiled: Any = None  # for good under the interpreter

    def __call__(self, *args: Any) -> None:
        if self._compiled is None:
            self._compiled = self._jit[self._grid](*args, *self._constants, **self._options)
        else:
            self._compiled[self._grid](*args, *self._constants)


# ---- the problem


def _problem(op: str, x: _Traits, dtype: str, c_in: int, c_out: int, kernel_size: int, dilation: int) -> Problem:
    B, _, T = x.shape
    row = 16 // x.dtype.itemsize
    aligned = (
        facts(x.device).descriptors and c_in % row == 0 and c_out % row == 0
        and kernel_size * min(dilation, T) + T < 2**31  # coordinates are 32-bit
    )  # fmt: skip
    layout = "last" if is_channels_last(x.strides) else "first"
    return Problem(op, dtype, layout, aligned, kernel_size, c_in, c_out, rounded_steps(B * T))


def _dtype_name(x: Tensor) -> str:
    if x.dtype == torch.bfloat16:
        return "bf16"
    if x.dtype == torch.float16:
        return "fp16"
    return "tf32" if facts(x.device).tf32 and conv_switch.fp32_precision == "tf32" else "fp32"


def _precision(problem: Problem, device: torch.device) -> str:
    """`input_precision` of the dots, which only fp32 needs: strict fp32 is three TF32 products where tensor cores do those."""
    if problem.dtype == "tf32":
        return "tf32"
    return "tf32x3" if problem.dtype == "fp32" and facts(device).tf32 else "ieee"


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


# ---- the device


def _device_index(device: torch.device) -> int:
    return -1 if device.type == "cpu" else device.index


def _on(device: torch.device, launch: Callable) -> Callable:
    """`launch` with `device` current: Triton launches there, whatever the device of its arguments."""
    if device.type == "cpu":
        return launch

    def launch_there(*tensors: Tensor | None) -> Any:
        if torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                return launch_there(*tensors)
        if device.index not in _threads.devices:
            torch.zeros(1, device=device)
            _threads.devices.add(device.index)
        return launch(*tensors)

    return launch_there


class _Threads(threading.local):
    """The devices whose context is known to be current in this thread.

    A descriptor cannot be made without one, and autograd's thread has none until its first launch ("invalid device context", seen on an
    H100 where PyTorch's allocator had memory at hand). PyTorch's own kernels see to it: the smallest of them does.
    """

    def __init__(self) -> None:
        self.devices: set[int] = set()


_threads = _Threads()


# ---- descriptors


def _rows(x: _Traits, block_t: int, block_c: int) -> Callable[[Tensor], TensorDescriptor]:
    """Makes the descriptor of [B, T, C] of an x (B, C, T), copied to channels-last first if it does not lie so already.

    The copy takes 24 us for (32, 256, 2048) in bf16 on an H100, where PyTorch's own takes 114.
    """
    (B, channels, T), (stride_b, stride_c, stride_t) = x.shape, x.strides
    shape, block = [B, T, channels], [1, block_t, block_c]
    if _describable(x, stride_b, stride_t, stride_c):
        strides = [stride_b, stride_t, 1]
        return lambda x: TensorDescriptor(x, shape, strides, block)
    copy = _Kernel(channels_last_kernel, B * _cdiv(T, 64) * _cdiv(channels, 64), (64, 64))

    def copied(x: Tensor) -> TensorDescriptor:
        rows = x.new_empty(shape)
        copy(x, rows, T, channels, stride_b, stride_c, stride_t)
        return TensorDescriptor(rows, shape, [T * channels, channels, 1], block)

    return copied


def _rows_or_columns(x: _Traits, block_t: int, block_c: int) -> tuple[Callable[[Tensor], TensorDescriptor], bool]:
    """Makes the descriptor of [B, T, C] of an x (B, C, T), or of [B, C, T] where it lies so and T is aligned; says whether it is the first.

    For a tensor that is not shifted in time: a shift by less than 16 bytes along the last axis is an illegal instruction on an H100.
    """
    (B, channels, T), (stride_b, stride_c, stride_t) = x.shape, x.strides
    if not _describable(x, stride_b, stride_t, stride_c) and _describable(x, stride_b, stride_c, stride_t):
        return lambda x: TensorDescriptor(x, [B, channels, T], [stride_b, stride_c, 1], [1, block_c, block_t]), False
    return _rows(x, block_t, block_c), True


def _taps(weight: _Traits, axes: tuple, config: Config) -> tuple[Callable[[Tensor], TensorDescriptor], bool]:
    """Makes the descriptor of the weight as [K, C_out, C_in], or as [K, C_in, C_out] where it lies so; and says whether it is the first.

    A weight that lies in neither way is copied.
    """
    K, c_out, c_in = (weight.shape[axis] for axis in axes)
    stride_k, stride_out, stride_in = (weight.strides[axis] for axis in axes)
    block = [1, config.BLOCK_C_OUT, config.BLOCK_C_IN]
    if _describable(weight, stride_k, stride_out, stride_in):
        return lambda weight: TensorDescriptor(weight, [K, c_out, c_in], [stride_k, stride_out, 1], block), True
    # The tensor cores take 32-bit operands only with the summed axis last.
    if weight.dtype.itemsize == 2 and _describable(weight, stride_k, stride_in, stride_out):
        turned = [1, config.BLOCK_C_IN, config.BLOCK_C_OUT]
        return lambda weight: TensorDescriptor(weight, [K, c_in, c_out], [stride_k, stride_in, 1], turned), False

    def copied(weight: Tensor) -> TensorDescriptor:
        taps = weight.permute(axes).clone(memory_format=torch.contiguous_format)
        return TensorDescriptor(taps, [K, c_out, c_in], [c_out * c_in, c_in, 1], block)

    return copied, True


def _describable(x: _Traits, *strides: int) -> bool:
    row = 16 // x.dtype.itemsize
    *outer, inner = strides
    return x.aligned and inner == 1 and all(stride > 0 and stride % row == 0 for stride in outer)


def _as_it_is(x: Tensor) -> Tensor:
    return x
