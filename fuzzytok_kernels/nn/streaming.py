"""What a tokenizer remembers of the bytes that it has seen, so that the next ones need no other."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class StreamState(NamedTuple):
    """The state of `slots` streams; `FuzzyTokenizer.step` updates it in place. A tuple of tensors: it may be compiled, moved and saved,
    as `tuple(state)`: of another class `torch.load` would unpickle nothing by default.

    history (slots, sum of (K-1)*d over the blocks, dim): what each block saw last, one block after the other, each circular.
    positions (slots,) int64: how many bytes each stream has seen.
    """

    history: Tensor
    positions: Tensor

    def reset(self, slots: Tensor | Sequence[int] | int | None = None) -> None:
        """Begin anew, in place: the streams at `slots`, all if None. A tensor of slots stays on the device: fit for a CUDA graph.

        As in a step, a slot that there is not, by custom -1, is no stream's.

        Raises:
            TypeError: slots that are no integers, of int32 or int64 as a tensor.
        """
        if slots is None:
            self.history.zero_()
            self.positions.zero_()
            return
        slots = torch.as_tensor(slots, device=self.positions.device)
        if slots.numel() and slots.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"slots has dtype {slots.dtype}; expected int32 or int64")
        # Not index_fill_: that takes -1 for the last slot.
        begins = (slots.reshape(-1, 1) == torch.arange(len(self.positions), device=slots.device)).any(0)  # (slots,)
        self.history.masked_fill_(begins[:, None, None], 0)
        self.positions.masked_fill_(begins, 0)


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype that the convolutions have: autocast's where it is on, else the parameters'."""
    device = parameter.device.type
    if torch.is_autocast_enabled(device) and parameter.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return parameter.dtype
