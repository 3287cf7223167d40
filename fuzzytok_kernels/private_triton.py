"""What the package uses of Triton beyond `triton.jit`, `autotune` and the tensor descriptors: none of it is documented.

tests/test_private.py says of each what breaks without it.
"""

from collections.abc import Callable
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import KernelInterface

__all__ = [
    "DriverBase",
    "GPUTarget",
    "KernelInterface",
    "OutOfResources",
    "before_each_load",
    "cuobjdump",
    "driver",
    "interprets",
    "launcher",
]


def launcher(compiled: Any, grid: tuple[int, int, int]) -> Callable:
    """What launches a compiled kernel, which a first call returned, past Triton's binder (27 us -> 13 us).

    It takes all arguments in order, constants too, and no options. Where no profiler hooks launches, it makes no dictionary for one.
    """
    hooked, (run, runtime) = compiled[grid], (compiled.run, triton.knobs.runtime)
    function, metadata = compiled.function, compiled.packed_metadata

    def launch(*args: Any) -> None:
        if _calls(runtime.launch_enter_hook) or _calls(runtime.launch_exit_hook):
            hooked(*args)
        else:
            active = driver.active
            stream = active.get_current_stream(active.get_current_device())
            run(*grid, stream, function, metadata, None, None, None, *args)

    return launch


def _calls(hook: Any) -> Any:
    """What a hook of Triton's calls: nothing, if it is None or a chain without links."""
    return getattr(hook, "calls", hook)


def interprets() -> bool:
    """Whether `triton.jit` makes kernels for the interpreter."""
    return triton.knobs.runtime.interpret


def cuobjdump() -> str:
    """Where the cuobjdump is that comes with Triton."""
    return triton.knobs.nvidia.cuobjdump.path


def before_each_load(hook: Callable[[dict[str, str]], None]) -> None:
    """Have `hook` called before a compiled kernel is loaded, with the files of its stages by name, in place of any other such hook."""
    triton.knobs.runtime.kernel_load_start_hook = lambda module, function, name, files, hash: hook(files)
