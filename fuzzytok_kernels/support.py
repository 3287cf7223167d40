"""Which devices the Triton kernels run well on."""

import functools
import importlib.util
import warnings

import torch


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
