"""How the commands name a problem."""

import argparse
import sys

from fuzzytok_kernels.reference import GATES
from fuzzytok_kernels.tuning.gpu import Gpu
from fuzzytok_kernels.tuning.problem import DTYPES, EPILOGUES, LAYOUTS, Problem, describable, rounded_steps
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
    epilogue = "residual" if options.op == "causal_conv1d_fused" and options.activation == "none" else options.activation
    if epilogue not in OPS[options.op].epilogues:
        sys.exit(f"fuzzytok: --activation {epilogue} is none of {options.op}; expected one of {', '.join(OPS[options.op].epilogues)}")
    if epilogue in GATES and c_out % 2:
        sys.exit(f"fuzzytok: --activation {epilogue} halves the output channels, and C_OUT is {c_out}; expected an even number")
    size = 4 if options.dtype in ("tf32", "fp32") else 2
    aligned = gpu is not None and gpu.descriptors and describable(c_in, c_out, K, epilogue, size, T, options.dilation)
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
