"""Compile an op's kernels for any GPU without having it: what they take of its registers and shared memory."""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from fuzzytok_kernels import support
from fuzzytok_kernels.private_triton import DriverBase, GPUTarget, before_each_load, cuobjdump, driver
from fuzzytok_kernels.tuning import Config, Problem, force
from fuzzytok_kernels.tuning.run import arguments, run, strict_switch

# How the assembly of each generation names the products of its tensor cores.
_PRODUCTS = {"mma.sync": "mma", "wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "v_mfma": "mfma"}
_FROM_REGISTERS = re.compile(r"wgmma\.mma_async\S+ \{[^}]*\}, *\{")  # Hopper's, of a left operand in registers
_READ = re.compile(r"cp\.async\.bulk\.tensor\S*\.shared::(?:cta|cluster)\.global")
_CALL = re.compile(r"^\s*(@\S+\s+)?call[.\s]", re.MULTILINE)


class Resources(NamedTuple):
    """The most that any kernel of a launch takes."""

    shared: int  # bytes a program
    registers: int  # a thread
    local: int  # bytes of local memory a thread
    products: str = ""  # the instructions of its tensor cores: of _PRODUCTS, or "" if it has none
    overwrites: bool = False  # whether registers may be loaded anew while a product still reads them
    reads: int = 0  # through Hopper's descriptors, as they are written: those of a loop, and those ahead of it
    serialized: bool = False  # whether each of Hopper's products waits for the last: a kernel that calls a function has ptxas do so

    @property
    def spills(self) -> bool:
        """Whether registers were spilled that a loop needs: the weight-grad of three taps keeps 24 bytes on the stack around its own."""
        return self.local > 32


def resources(problem: Problem, config: Config, target: GPUTarget, T: int = 64) -> Resources:
    """Compile `problem` with `config` for `target`, which fills Triton's cache too; only T's divisibility by 16 matters.

    Leaves the process with a driver that launches nothing: call it in a process of its own.
    """
    with strict_switch(problem), force(config):
        return resources_of(lambda: run(problem, *arguments(problem, "cpu", 2, 64 if T % 16 == 0 else 50), 1), target)


def resources_of(call: Callable[[], object], target: GPUTarget) -> Resources:
    """Compile what `call`, on tensors of the CPU, launches; as `resources`."""
    pretended = _Pretended(target)
    driver.set_active(pretended)
    before_each_load(pretended.keep_assembly)
    nvidia = target.backend == "cuda"
    support.cpu_facts = support.Facts(multiprocessors=128, descriptors=nvidia and target.arch >= 90, tf32=nvidia)
    call()
    return Resources(*(max(values) for values in zip(*pretended.compiled, strict=True)))


_numbers = itertools.count()


class _Pretended(DriverBase):
    """A driver of a GPU that is not there: loading a kernel notes what it takes, launching it does nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.number = target, next(_numbers)
        self.compiled: list[Resources] = []
        self.assembly = ""  # of the kernel that is loaded next
        self.utils = self

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> tuple:
        return self.target, self.number  # the key of Triton's cache of loaded kernels: each pretended driver loads its own

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable:
        return triton.testing.do_bench

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}

    def launcher_cls(self, src: object, metadata: object) -> Callable:
        return lambda *args: None

    def keep_assembly(self, files: dict[str, str]) -> None:
        """Read that of the kernel that is loaded next from `files`, the stages of its compilation by name."""
        (path,) = (path for file, path in files.items() if file.endswith((".ptx", ".amdgcn")))
        self.assembly = Path(path).read_text("utf-8")

    def load_binary(self, name: str, binary: bytes, shared: int, device: object) -> tuple:
        registers, local = _registers(binary) if self.target.backend == "cuda" else _amd_registers(self.assembly)
        products = max((name for sign, name in _PRODUCTS.items() if sign in self.assembly), default="")
        overwrites, serialized = _overwrites(self.assembly), _serialized(self.assembly)
        reads = len(_READ.findall(self.assembly))
        self.compiled.append(Resources(shared, registers, local, products, overwrites, reads, serialized))
        return name, name, registers, local, 1024


def _overwrites(assembly: str) -> bool:
    """Whether a wait behind products from registers leaves some under way: see `kernels/dot.waited`."""
    stretches = assembly.split("wgmma.wait_group.sync.aligned")
    return any(_FROM_REGISTERS.search(some) and wait.split(";")[0].strip() != "0" for some, wait in itertools.pairwise(stretches))


def _serialized(assembly: str) -> bool:
    return "wgmma.mma_async" in assembly and bool(_CALL.search(assembly))


def _registers(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([cuobjdump(), "-res-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _amd_registers(assembly: str) -> tuple[int, int]:
    registers, local = (
        re.search(rf"^ +\.{name}: +(\d+)$", assembly, re.MULTILINE) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    assert registers and local, assembly
    return int(registers[1]), int(local[1])
