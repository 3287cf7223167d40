"""The facts of a GPU that a tuning file belongs to, and the versions that it was measured with."""

import importlib.metadata
import re
from pathlib import Path
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """One model of GPU. One named "generic" stands for all of its architecture."""

    name: str  # as torch.cuda.get_device_name gives it
    arch: str  # "sm90", "gfx942"
    sm_count: int  # multiprocessors
    shared_memory: int  # bytes, the most that one program can ask for

    @staticmethod
    def current(device: int) -> "Gpu | None":
        """GPU number `device`; None for the CPU (-1) and where there is no GPU."""
        if device < 0 or not torch.cuda.is_available():
            return None
        facts = torch.cuda.get_device_properties(device)
        arch = facts.gcnArchName.partition(":")[0] if torch.version.hip else f"sm{facts.major}{facts.minor}"
        shared = getattr(facts, "shared_memory_per_block_optin", facts.shared_memory_per_block)  # HIP has no opt-in
        return Gpu(facts.name, arch, facts.multi_processor_count, shared)

    @property
    def slug(self) -> str:
        """The name as a folder's: "nvidia_h100_80gb_hbm3"."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")

    @property
    def descriptors(self) -> bool:
        """Whether its tensor descriptors are worth using: `support.facts` for a GPU that need not be here."""
        return self.arch.startswith("sm") and int(self.arch[2:]) >= 90

    def __str__(self) -> str:
        return f"{self.name} ({self.arch}, {self.sm_count} multiprocessors, {self.shared_memory:,} bytes of shared memory a program)"


def versions() -> dict[str, str | None]:
    """Versions of what compiles and runs the kernels; None for what is not there."""
    return {"torch": torch.__version__, "triton": _triton(), "CUDA": torch.version.cuda or torch.version.hip, "driver": _driver()}


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")  # without importing it
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            found = re.search(r"\d+\.\d+(\.\d+)?", Path(path).read_text())
        except OSError:
            continue
        if found:
            return found[0]
    return None
