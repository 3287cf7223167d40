"""How the commands name a problem."""

import argparse
import sys

from fuzzytok_kernels.reference import GATES
from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.problem import DTYPES, EPILOGUES, LAYOUTS, Problem, rounded_steps
from fuzzytok_kernels.tuning.space import OPS


def add_problem_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `problem_from` reads."""
    parser.add_argument("--op", choices=OPS, help="its name under torch.ops.fuzzytok")
    parser.add_argument("--shape", type=_shape, metavar="B,T,C_IN,C_OUT,K", help="of the convolution, for its gradients too")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="tf32 and fp32 are float32, as PyTorch's switches have it")
    parser.add_argument("--dilation", type=_positive, default=1, help="has no influence on the choice, unless it is huge (default: 1)")
    parser.add_argument("--activation", choices=EPILOGUES, default="none", help="what follows the product in the same kernel")
    parser.add_argument("--layout", choices=LAYOUTS, default="last", help="where the channels lie (default: %(default)s)")


def problem_from(options: argparse.Namespace, gpu: Gpu | None = None) -> tuple[Problem, int, int, int]:
    """The problem that `launch` would look up on `gpu`, or on the one at hand, and its dilation, B and T. Exits without op or shape."""
    if options.op is None or options.shape is None:
        sys.exit("fuzzytok: a problem needs --op and --shape")
    gpu = gpu or Gpu.current(0)
    B, T, c_in, c_out, K = options.shape
    row = 4 if options.dtype in ("tf32", "fp32") else 8  # elements in the 16 bytes that descriptors ask for
    coordinates = (K + 2) * min(options.dilation, T) + T
    epilogue = "residual" if options.op == "causal_conv1d_fused" and options.activation == "none" else options.activation
    whole = row * (2 if epilogue in GATES else 1)
    aligned = gpu is not None and gpu.descriptors and c_in % row == 0 and c_out % whole == 0 and coordinates < 2**31
    problem = Problem(options.op, options.dtype, options.layout, aligned, epilogue, K, c_in, c_out, rounded_steps(B * T))
    return problem, options.dilation, B, T


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if len(sizes) != 5:
        raise argparse.ArgumentTypeError(f"{text!r}; expected five sizes, B,T,C_IN,C_OUT,K")
    return tuple(map(_positive, sizes))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a positive integer")
    return int(text)
