"""What devices can do."""

import functools
import importlib.util
import warnings
from typing import Any, NamedTuple

import torch

# PyTorch's own switch for fp32 convolutions, `fp32_precision`; its older form, `allow_tf32`, raises once a user has set this newer one.
conv_switch: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]


class Facts(NamedTuple):
    """What the launchers need to know of a device."""

    multiprocessors: int
    descriptors: bool  # whether tensor descriptors are worth using: Ampere's and CDNA's are emulated, and not pipelined
    tf32: bool  # whether its tensor cores do TF32


cpu_facts = Facts(multiprocessors=2, descriptors=True, tf32=False)  # the interpreter's; `tuning.compile` puts another GPU's here


def facts(device: torch.device) -> Facts:
    """The facts of `device`."""
    return cpu_facts if device.type == "cpu" else _gpu_facts(device)


@functools.cache
def _gpu_facts(device: torch.device) -> Facts:
    properties = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    return Facts(properties.multi_processor_count, descriptors=nvidia and properties.major >= 9, tf32=nvidia)


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """True for a GPU whose tensor cores Triton uses, and for the CPU under `TRITON_INTERPRET=1`; warns once of a GPU that is left out."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    if device.type != "cuda":
        return triton.knobs.runtime.interpret
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0):
        return True
    warnings.warn(
        f"fuzzytok_kernels: Triton does not use the tensor cores of {torch.cuda.get_device_name(device)}; "
        "its convolutions run on PyTorch's own, here and from now on",
        stacklevel=2,
    )
    return False
