"""A kernel as a launcher holds it, and the device that it runs on."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuzzytok_kernels.private_triton import KernelInterface, OutOfResources, described, launcher
from fuzzytok_kernels.support import facts
from fuzzytok_kernels.tuning import Config


class Kernel:
    """A kernel with its grid and constants: compiled at its first call, then launched past Triton's binder."""

    def __init__(
        self, jit: KernelInterface, programs: int, constants: tuple, config: Config | None = None, *more: int, **options: Any
    ) -> None:
        blocks = () if config is None else (config.BLOCK_T, config.BLOCK_C_IN, config.BLOCK_C_OUT, *more)
        self._jit, self._grid, self._constants = jit, (programs, 1, 1), (*constants, *blocks)
        self._options = options if config is None else {"num_warps": config.num_warps, "num_stages": config.num_stages, **options}
        self._launch: Callable | None = None  # for good under the interpreter

    def __call__(self, *args: Any) -> None:
        if self._launch is not None:
            self._launch(*args)
        elif compiled := self._jit[self._grid](*described(args), *self._constants, **self._options):
            self._launch = launcher(compiled, self._grid, args, self._constants)


def on(device: torch.device, launch: Callable) -> Callable:
    """`launch` with `device` current: Triton launches there, whatever the device of its arguments."""
    if device.type == "cpu":
        return launch

    def launch_there(*tensors: Tensor | None) -> Any:
        if torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                return launch_there(*tensors)
        if device.index not in _threads.devices:
            torch.zeros(1, device=device)
            _threads.devices.add(device.index)
        return launch(*tensors)

    return launch_there


def may_overlap(device: torch.device) -> bool:
    """Whether a launch there may start before the one in front of it has ended (PDL): on Hopper and newer, as the descriptors."""
    return device.type == "cuda" and facts(device).descriptors


def overlapping(pdl: bool) -> dict[str, Any]:
    """The options of a launch that does."""
    return {"launch_pdl": True} if pdl else {}


def named(name: str, launch: Callable) -> Callable:
    """`launch` of an op whose configs are fixed; what fails says of which op and shapes, as in `launch._plan` of which problem."""

    def launch_by_name(*args: Any) -> Any:
        try:
            return launch(*args)
        except OutOfResources as error:
            raise OutOfResources(error.required, error.limit, f"{error.name} for {_told(name, args)}") from error
        except RuntimeError as error:
            tell(_told(name, args), error)
            raise

    return launch_by_name


def tell(what: object, error: RuntimeError) -> None:
    """Has `error`, which keeps its type, say of what it is: a caller may wait for torch.OutOfMemoryError."""
    hint = "; a kernel's first call cannot be captured in a graph: call it once before" if is_capturing() else ""
    error.args = (f"{what}: {error}{hint}",)


def is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _told(name: str, args: tuple) -> str:
    return f"{name} of {', '.join(str(tuple(arg.shape)) for arg in args if isinstance(arg, Tensor))}"


class _Threads(threading.local):
    """The devices whose context is known to be current in this thread.

    A descriptor cannot be made without one, and autograd's thread has none until its first launch ("invalid device context", seen on an
    H100 where PyTorch's allocator had memory at hand). PyTorch's own kernels see to it: the smallest of them does.
    """

    def __init__(self) -> None:
        self.devices: set[int] = set()


_threads = _Threads()


def persistent(device: torch.device, blocks: int, tiles: int, most: int) -> int:
    """How many programs: as many for each of `blocks` of channels, for all `tiles` of time, `most` a multiprocessor."""
    return blocks * max(1, min(tiles, most * facts(device).multiprocessors // blocks))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
