"""What a profile says of a kernel: a name that tells what runs, and its FLOPs and bytes for Triton's proton.

Neither costs a launch anything: a name is made when a kernel is compiled (`repr` of triton.jit), the figures when proton asks for them
(`launch_metadata`). One kernel serves the forward and the input-grad, so that only proton tells these two apart; in a trace of
torch.profiler the op that launched it stands above.
"""

import math
from collections.abc import Callable
from typing import Any


def conv_name(path: str) -> Callable[[Any], str]:
    """Of the convolution's kernel on `path`: the op, and what is fused into it, as "causal_conv1d_gelu_residual_tma"."""

    def name(specialization: Any) -> str:
        constants = specialization.constants
        op = "causal_conv1d_activation_grad" if constants["EXTRA"] == "grad_y" else "causal_conv1d"
        fused = [part for part in (constants["ACTIVATION"], constants["EXTRA"]) if part not in ("none", "grad_y")]
        return "_".join((op, *fused, path))

    return name


def byte_name(specialization: Any) -> str:
    """Of the look-ups' kernel."""
    return "byte_causal_conv1d_activation_grad" if specialization.constants["GRAD"] else "byte_causal_conv1d"


def fixed_name(name: str) -> Callable[[Any], str]:
    """Of a kernel that does one thing."""
    return lambda specialization: name


def conv_metadata(grid: tuple, metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Of a launch of the convolution's kernel, by what it is told."""
    name = metadata.name.replace("causal_conv1d", "causal_conv1d_input_grad") if args["shift"] < 0 else metadata.name
    x, steps = args["x"], _tensor(args["x"]).shape[0] * args["T"]
    return {
        "name": name,
        _flops(x): 2 * steps * args["c_in"] * args["c_out"] * args["K"],
        "bytes": sum(_bytes(args[tensor]) for tensor in ("x", "weight", "extra", "y")),
    }


def weight_grad_metadata(grid: tuple, metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Of a launch of the weight-grad's first stage; its partial sums count as they are written, and so do products of planes."""
    planes = args.get("PLANES", 1)
    x, weights = args["x"], args["K"] * args["c_out"] * args["c_in"]
    written = weights * (1 if args["DIRECT"] else args["n_splits"]) * args["weight_out"].element_size()
    return {
        "name": metadata.name,
        _flops(x): 2 * args["B"] * args["T"] * weights * (2 * planes - 1),
        "bytes": _bytes(args["grad_y"]) + _bytes(x) + written,
    }


def update_metadata(grid: tuple, metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Of a launch behind a state, of which each step reads K - 1 entries at most."""
    x, rows, taps = args["x"], args["B"] * args["L"], args["K"] * args["c_in"]
    entries = rows * (taps - args["c_in"]) * x.element_size()
    return {
        "name": metadata.name,
        _flops(x): 2 * rows * taps * args["c_out"],
        "bytes": entries + sum(_bytes(args[tensor]) for tensor in ("x", "weight", "residual", "y")),
    }


def moved_metadata(grid: tuple, metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Of a kernel that reads and writes each of its tensors once."""
    return {"name": metadata.name, "bytes": sum(_bytes(value) for value in args.values() if hasattr(value, "data_ptr"))}


def _flops(x: Any) -> str:
    """Proton's name for floating-point operations on elements like those of x."""
    return f"flops{8 * _tensor(x).element_size()}"


def _bytes(value: Any) -> int:
    return 0 if value is None else math.prod(_tensor(value).shape) * _tensor(value).element_size()


def _tensor(value: Any) -> Any:
    """The tensor of a descriptor."""
    return getattr(value, "base", value)
