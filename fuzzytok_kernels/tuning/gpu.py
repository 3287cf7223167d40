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


# Common GPUs, for those who ask about one that is not there: what their own driver would say.
KNOWN = (
    Gpu("NVIDIA A100-SXM4-40GB", "sm80", 108, 166_912), Gpu("NVIDIA A100-SXM4-80GB", "sm80", 108, 166_912),
    Gpu("NVIDIA A100 80GB PCIe", "sm80", 108, 166_912), Gpu("NVIDIA A10G", "sm86", 80, 101_376),
    Gpu("NVIDIA RTX A6000", "sm86", 84, 101_376),
    Gpu("NVIDIA GeForce RTX 3090", "sm86", 82, 101_376), Gpu("NVIDIA GeForce RTX 4090", "sm89", 128, 101_376),
    Gpu("NVIDIA L4", "sm89", 58, 101_376), Gpu("NVIDIA L40S", "sm89", 142, 101_376), Gpu("NVIDIA H100 PCIe", "sm90", 114, 232_448),
    Gpu("NVIDIA H100 80GB HBM3", "sm90", 132, 232_448), Gpu("NVIDIA H200", "sm90", 132, 232_448), Gpu("NVIDIA B200", "sm100", 148, 232_448),
    Gpu("NVIDIA GeForce RTX 5090", "sm120", 170, 101_376), Gpu("AMD Instinct MI300X", "gfx942", 304, 65_536),
)  # fmt: skip


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
