"""What devices can do."""

import functools
import importlib.util
import re
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


def approximates(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether activations go through the GPU's own tanh, which is as exact as results in bf16 need: see `kernels/activation.py`."""
    return dtype == torch.bfloat16 and facts(device).tf32  # what does TF32 has an instruction for tanh, too


@functools.cache
def _gpu_facts(device: torch.device) -> Facts:
    properties = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    return Facts(properties.multi_processor_count, descriptors=nvidia and properties.major >= 9, tf32=nvidia)


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """True for a GPU that Triton uses well, and for the CPU under `TRITON_INTERPRET=1`; warns once of a GPU that is left out."""
    if device.type != "cuda":
        return _installed() and not _too_old() and _interprets()
    reason = _reason_against(device)
    if reason is not None:
        warnings.warn(
            f"fuzzytok_kernels: {reason}; convolutions on {torch.cuda.get_device_name(device)} run on PyTorch's own, here and from now on",
            stacklevel=2,
        )
    return reason is None


def _reason_against(device: torch.device) -> str | None:
    if not _installed():
        return "Triton is not installed"
    if too_old := _too_old():
        return too_old
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton does not use the tensor cores of GPUs before Ampere"
    from fuzzytok_kernels.private_triton import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # whatever a driver that does not load may raise
        return f"Triton cannot use the driver ({error})"
    return None


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _too_old() -> str | None:
    """Why this Triton cannot run the kernels: before 3.6, what `private_triton` imports may be missing."""
    import triton

    numbers = [int(number) for number in re.findall(r"\d+", triton.__version__)[:2]]
    return f"Triton {triton.__version__} is older than 3.6" if numbers < [3, 6] else None


def _interprets() -> bool:
    from fuzzytok_kernels.private_triton import interprets

    return interprets()
