"""The launchers: allocate, choose a config, make descriptors and a grid, launch. The same three functions as `reference`, on Triton."""

from contextlib import nullcontext

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fuzzytok_kernels.kernels.conv import conv_pointer_kernel, conv_tma_kernel
from fuzzytok_kernels.kernels.transpose import channels_last_kernel
from fuzzytok_kernels.kernels.weight_grad import reduce_partials_kernel, weight_grad_pointer_kernel, weight_grad_tma_kernel
from fuzzytok_kernels.layout import empty_output, empty_weight, is_channels_last
from fuzzytok_kernels.support import facts
from fuzzytok_kernels.tuning import Config, Problem, get_config, rounded_steps

_DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """x (B, C_in, T), weight (C_out, C_in, K), bias (C_out,) -> y (B, C_out, T)."""
    return _conv("causal_conv1d", x, weight.permute(2, 0, 1), bias, dilation)


def causal_conv1d_input_grad(grad_y: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
    """grad_y (B, C_out, T), weight (C_out, C_in, K) -> grad_x (B, C_in, T)."""
    return _conv("causal_conv1d_input_grad", grad_y, weight.permute(2, 1, 0), None, -dilation)


def causal_conv1d_weight_grad(grad_y: Tensor, x: Tensor, kernel_size: int, dilation: int = 1) -> tuple[Tensor, Tensor]:
    """grad_y (B, C_out, T), x (B, C_in, T) -> grad_weight (C_out, C_in, K), grad_bias (C_out,)."""
    (B, c_out, T), c_in = grad_y.shape, x.shape[1]
    grad_weight, grad_bias = empty_weight(x, c_out, c_in, kernel_size), x.new_empty(c_out)
    if B * T == 0:
        return grad_weight.zero_(), grad_bias.zero_()
    shift = min(dilation, T)
    problem = _problem("causal_conv1d_weight_grad", grad_y, kernel_size, shift, c_in, c_out)
    with _on(x.device):
        config = get_config(_device_index(x.device), problem)
        n_steps = B * _cdiv(T, config.BLOCK_T)
        n_tiles = kernel_size * _cdiv(c_in, config.BLOCK_C_IN) * _cdiv(c_out, config.BLOCK_C_OUT)
        n_splits = max(1, min(n_steps, config.programs_per_sm * facts(x.device).multiprocessors // n_tiles))
        n_weight, n_shares = grad_weight.numel(), kernel_size * _cdiv(c_in, config.BLOCK_C_IN)
        partial = x.new_empty(n_splits * (n_weight + n_shares * c_out), dtype=torch.float32)
        sizes = (B, T, c_in, c_out, shift, n_splits, n_weight)
        blocks = dict(
            K=kernel_size, PRECISION=_precision(problem, x.device), BLOCK_T=config.BLOCK_T, BLOCK_C_IN=config.BLOCK_C_IN,
            BLOCK_C_OUT=config.BLOCK_C_OUT, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if config.path == "tma":
            rows = (_rows(grad_y, config.BLOCK_T, config.BLOCK_C_OUT), _rows(x, config.BLOCK_T, config.BLOCK_C_IN))
            weight_grad_tma_kernel[(n_tiles * n_splits,)](*rows, partial, *sizes, **blocks)
        else:
            weight_grad_pointer_kernel[(n_tiles * n_splits,)](grad_y, x, partial, *sizes, *grad_y.stride(), *x.stride(), **blocks)
        reduce_partials_kernel[(_cdiv(n_weight, 128) + _cdiv(c_out, 128),)](
            partial, grad_weight, grad_bias, n_weight, c_out, n_splits, n_shares, BLOCK=128
        )
    return grad_weight, grad_bias


def _conv(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, shift: int) -> Tensor:
    """x (B, C_in, T), weight (K, C_out, C_in), C_in being the channels summed over: y[t] = bias + sum_k weight[k] @ x[t - k*shift]."""
    (B, c_in, T), (K, c_out, _) = x.shape, weight.shape
    y = empty_output(x, c_out)
    if y.numel() == 0:
        return y
    shift = max(-T, min(shift, T))
    problem = _problem(op, x, K, shift, c_in, c_out)
    with _on(x.device):
        config = get_config(_device_index(x.device), problem)
        n_tiles = B * _cdiv(T, config.BLOCK_T) * _cdiv(c_out, config.BLOCK_C_OUT)
        blocks = dict(
            K=K, HAS_BIAS=bias is not None, PRECISION=_precision(problem, x.device), BLOCK_T=config.BLOCK_T, BLOCK_C_IN=config.BLOCK_C_IN,
            BLOCK_C_OUT=config.BLOCK_C_OUT, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if config.path == "tma":
            taps, in_last = _taps(weight, config)
            rows = _rows(x, config.BLOCK_T, config.BLOCK_C_IN)
            last = problem.layout == "last"
            out = _descriptor(y.transpose(1, 2), config.BLOCK_T, config.BLOCK_C_OUT // 2) if last else y
            programs = min(n_tiles, config.programs_per_sm * facts(x.device).multiprocessors)
            conv_tma_kernel[(programs,)](rows, taps, bias, out, B, T, c_in, c_out, shift, IN_LAST=in_last, Y_CHANNELS_LAST=last, **blocks)
        else:
            conv_pointer_kernel[(n_tiles,)](x, weight, bias, y, T, c_in, c_out, shift, *x.stride(), *weight.stride(), *y.stride(), **blocks)
    return y


# ---- the problem


def _problem(op: str, x: Tensor, kernel_size: int, shift: int, c_in: int, c_out: int) -> Problem:
    B, _, T = x.shape
    row = 16 // x.element_size()
    aligned = (
        facts(x.device).descriptors and c_in % row == 0 and c_out % row == 0
        and kernel_size * abs(shift) + T < 2**31  # coordinates are 32-bit
    )  # fmt: skip
    layout = "last" if is_channels_last(x) else "first"
    return Problem(op, _dtype_name(x), layout, kernel_size, aligned, c_in, c_out, rounded_steps(B * T))


def _dtype_name(x: Tensor) -> str:
    if x.dtype != torch.float32:
        return _DTYPE_NAMES[x.dtype]
    # F.conv1d's own switch; its older form, `allow_tf32`, raises once a user has set this newer one.
    return "tf32" if facts(x.device).tf32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else "fp32"


def _precision(problem: Problem, device: torch.device) -> str:
    """`input_precision` of the dots, which only fp32 needs: strict fp32 is three TF32 products where tensor cores do those."""
    if problem.dtype == "tf32":
        return "tf32"
    return "tf32x3" if problem.dtype == "fp32" and facts(device).tf32 else "ieee"


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv takes 2 us


# ---- the device


def _device_index(device: torch.device) -> int:
    return device.index or 0


def _on(device: torch.device) -> torch.cuda.device | nullcontext:
    """Triton launches on the current device, whatever its arguments' is."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


# ---- descriptors


def _rows(x: Tensor, block_t: int, block_c: int) -> TensorDescriptor:
    """A descriptor of [B, T, C] over x (B, C, T), copied to channels-last first if it does not lie so already."""
    rows = x.transpose(1, 2)
    if not _describable(rows):
        rows = _channels_last(x)
    return _descriptor(rows, block_t, block_c)


def _taps(weight: Tensor, config: Config) -> tuple[TensorDescriptor, bool]:
    """A descriptor of [K, C_out, C_in] over `weight`, or of [K, C_in, C_out] where it lies so, and whether it is the first."""
    if _describable(weight):
        return _descriptor(weight, config.BLOCK_C_OUT, config.BLOCK_C_IN), True
    swapped = weight.transpose(1, 2)
    if _describable(swapped) and weight.element_size() == 2:  # the tensor cores take TF32 operands only with the summed axis last
        return _descriptor(swapped, config.BLOCK_C_IN, config.BLOCK_C_OUT), False
    return _descriptor(weight.clone(memory_format=torch.contiguous_format), config.BLOCK_C_OUT, config.BLOCK_C_IN), True


def _describable(x: Tensor) -> bool:
    row = 16 // x.element_size()
    b, t, c = x.stride()
    return c == 1 and b > 0 and t > 0 and b % row == 0 and t % row == 0 and x.data_ptr() % 16 == 0


def _descriptor(x: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, x.shape, x.stride(), [1, block_rows, block_columns])


def _channels_last(x: Tensor) -> Tensor:
    """A contiguous (B, T, C) copy of x (B, C, T): 24 us for (32, 256, 2048) in bf16 on an H100, where PyTorch's own copy takes 114."""
    B, channels, T = x.shape
    rows = x.new_empty((B, T, channels))
    grid = (B * _cdiv(T, 64) * _cdiv(channels, 64),)
    channels_last_kernel[grid](x, rows, T, channels, *x.stride(), BLOCK_T=64, BLOCK_C=64)
    return rows
