"""What the package uses of Triton beyond `triton.jit`, `autotune` and the tensor descriptors: none of it is documented.

tests/test_private.py says of each what breaks without it.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
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
    "described",
    "driver",
    "interprets",
    "launcher",
]


def described(args: Iterable[Any]) -> Iterator[Any]:
    """`args` as Triton's binder takes them: to a kernel a descriptor is a pair, what makes it and its tensor, until one is asked for."""
    return (arg[0](arg[1]) if type(arg) is tuple else arg for arg in args)


def launcher(compiled: Any, grid: tuple[int, int, int], args: tuple, constants: tuple) -> Callable:
    """What launches a compiled kernel, which a first call with `args` and `constants` returned, past Triton's binder (27 us -> 13 us).

    It takes arguments like these. Where no profiler hooks launches it makes no dictionary for one, and goes past the Python of Triton's
    launcher too (another 7 us -> 2).
    """
    hooked, runtime, active = compiled[grid], triton.knobs.runtime, driver.active
    stream_of, device = active.get_current_stream, active.get_current_device()
    places = [place for place, arg in enumerate(args) if type(arg) is tuple]
    unhooked = _below_python(compiled, grid, places, constants) or _by_triton(compiled, grid, constants)

    def launch(*args: Any) -> None:
        if _calls(runtime.launch_enter_hook) or _calls(runtime.launch_exit_hook):
            hooked(*described(args), *constants)
        else:
            unhooked(stream_of(device), args)

    return launch


def _by_triton(compiled: Any, grid: tuple[int, int, int], constants: tuple) -> Callable[[int, tuple], None]:
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    return lambda stream, args: run(*grid, stream, function, metadata, None, None, None, *described(args), *constants)


def _below_python(compiled: Any, grid: tuple[int, int, int], places: list[int], constants: tuple) -> Callable[[int, tuple], None] | None:
    """The launch by the C function that Triton's launcher calls; None unless all is as in Triton 3.6 to 3.9.

    What the launcher hands that function besides the arguments is noted once; at `places` are descriptors.
    """
    run, stream, rest = copy.copy(compiled.run), object(), object()
    noted: list[Any] = []
    try:
        encode = sys.modules[type(run).__module__].make_tensordesc_arg
        function = inspect.getclosurevars(run.launch).nonlocals["launcher"] if places else run.launch
        if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
            return None
        run.launch = lambda *args: noted.extend(args)
        run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, rest)
        at, in_one = noted.index(stream), {rest: False, (rest,): True}[noted[-1]]  # how the arguments follow, from 3.7 on as one
        metas = zip(places, compiled.metadata.tensordesc_meta, strict=True) if places else ()
        descriptors = [(place, meta, object()) for place, meta in metas]
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    before, behind, unused = noted[:at], noted[at + 1 : -1], (None,) * (encode.__code__.co_argcount - 2)

    def launch(stream: int, args: tuple) -> None:
        flat = [*args, *constants]
        for place, meta, which in reversed(descriptors):
            describe, x = args[place]
            key = which, x.data_ptr()
            if (encoded := _encoded.get(key)) is None:
                if len(_encoded) >= _MOST_ENCODED:
                    _encoded.clear()
                encoded = _encoded[key] = encode(describe(x), meta, *unused)
            flat[place : place + 1] = encoded
        function(*before, stream, *behind, *((flat,) if in_one else flat))

    return launch


# What Triton's launcher makes of a descriptor, by which it is and by address: a training step comes back to the same ones.
_encoded: dict[tuple[object, int], list] = {}
_MOST_ENCODED = 4096  # some 600 bytes each


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
