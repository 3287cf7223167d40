"""Guard zones: every tensor of a case lies between zones that nobody may write, and whoever reads them gets NaN."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ZONE = 64  # elements before and behind each tensor; a multiple of 16 bytes, so that alignment is as it was
_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


class Inputs:
    """Tensors that must come out as they went in, with all the storage around them."""

    def __init__(self) -> None:
        self._kept: list[tuple[str, Tensor, Tensor]] = []

    def place(self, name: str, values: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Tensor:
        """A tensor of `shape` and `strides`, `offset` elements behind its zone, with `values`, whose sizes are 1 where a stride is 0."""
        size = sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True)) if values.numel() else 0
        storage = torch.full((2 * ZONE + offset + size + 1,), float("nan"), dtype=values.dtype, device=values.device)
        view = storage.as_strided(values.shape, strides, ZONE + offset)
        view.copy_(values)
        self._kept.append((name, storage, storage.clone()))
        return view.expand(shape)

    def check(self) -> None:
        """Raise AssertionError if any byte has changed."""
        same = all_at_once([storage.view(torch.uint8) == copy.view(torch.uint8) for _, storage, copy in self._kept])
        for (name, *_), unchanged in zip(self._kept, same, strict=True):
            assert unchanged, f"{name}, or what lies around it, was written"


class Allocations(TorchDispatchMode):
    """Inside, fresh memory is full of NaN, outputs and scratch alike, and lies between zones."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        value = func(*args, **(kwargs or {}))
        return self._guarded(value) if func in _ALLOCATIONS and value.numel() and value.dtype.is_floating_point else value

    def _guarded(self, value: Tensor) -> Tensor:
        size = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True)) + 1
        storage = torch.full((size + 2 * ZONE,), float("nan"), dtype=value.dtype, device=value.device)
        storage.view(torch.uint8).fill_(0xFF)  # NaN in every dtype, of known bits
        self._kept.append((storage, size))
        return storage.as_strided(value.shape, value.stride(), ZONE)

    def check(self) -> None:
        """Raise AssertionError if a zone has changed, or if nothing was allocated that could have been guarded."""
        assert self._kept, "nothing was allocated"
        zones = [
            (side, size, zone) for kept, size in self._kept for side, zone in (("before", kept[:ZONE]), ("behind", kept[ZONE + size :]))
        ]
        same = all_at_once([zone.view(torch.uint8) == 0xFF for *_, zone in zones])
        for (side, size, _), unchanged in zip(zones, same, strict=True):
            assert unchanged, f"memory {side} an allocation of {size} elements was written"


def all_at_once(masks: list[Tensor]) -> list[bool]:
    """Whether each is all true. One wait for the GPU: some forty processes take turns on it."""
    return torch.stack([mask.all() for mask in masks]).tolist()
