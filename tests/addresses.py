"""Under the interpreter: every address that a kernel reads or writes has to lie in one of the tensors that it was given.

A GPU tells of such a one only where it happens to be no memory of the process at all. And no descriptor may store from a negative
coordinate on: an illegal instruction on an H100, where loads are none.
"""

from typing import Any

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor


class _Storages:
    """Where the storages of the running launch's tensors begin and end."""

    begins, ends = np.zeros(0, np.uint64), np.zeros(0, np.uint64)


def watch() -> None:
    """From now on such an access raises AssertionError, as InterpreterError's cause."""
    prepare = GridExecutor._init_args_hst

    def prepared(self: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = prepare(self, args, kwargs)
        storages = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in _storages((*args, *kwargs.values()))})
        _Storages.begins, _Storages.ends = np.array(storages, np.uint64).reshape(-1, 2).T
        return args, kwargs

    GridExecutor._init_args_hst = prepared
    for access, at_mask in (("create_masked_load", 0), ("create_masked_store", 1)):
        setattr(InterpreterBuilder, access, _checked(access, getattr(InterpreterBuilder, access), at_mask))
    store = InterpreterBuilder.create_descriptor_store

    def store_from_within(self: Any, descriptor: Any, value: Any, indices: Any) -> Any:
        at = [int(index.data.item()) for index in indices]
        assert min(at) >= 0, f"create_descriptor_store: from the negative coordinate of {at} on"
        return store(self, descriptor, value, indices)

    InterpreterBuilder.create_descriptor_store = store_from_within


def _checked(access: str, run: Any, at_mask: int) -> Any:
    def checked(self: Any, pointers: Any, *args: Any, **kwargs: Any) -> Any:
        mask = args[at_mask] if len(args) > at_mask else kwargs["mask"]
        inside = mask if isinstance(mask, np.ndarray) else mask.data  # a bare array of a descriptor, under Triton 3.6
        addresses = pointers.data[np.broadcast_to(inside.astype(bool), pointers.data.shape)].astype(np.uint64)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        at = np.searchsorted(_Storages.begins, addresses, side="right")
        ends = np.concatenate([np.zeros(1, np.uint64), _Storages.ends])[at]  # of the last storage that begins before, if there is one
        outside = addresses + np.uint64(size) > ends
        assert not outside.any(), f"{access}: {outside.sum()} of {outside.size} elements lie in no tensor of the launch"
        return run(self, pointers, *args, **kwargs)

    return checked


def _storages(values: tuple) -> Any:
    for value in values:
        if isinstance(value, tuple):
            yield from _storages(value)
        elif isinstance(value, TensorDescriptor):
            yield value.base.untyped_storage()
        elif hasattr(value, "data_ptr"):
            yield getattr(value, "base", value).untyped_storage()
