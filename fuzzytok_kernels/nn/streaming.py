"""What a tokenizer remembers of the bytes that it has seen, so that the next ones need no other."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class StreamState(NamedTuple):
    """The state of `slots` streams; `FuzzyTokenizer.step` updates it in place. A tuple of tensors: it may be compiled, saved and moved.

    history (slots, sum of (K-1)*d over the blocks, dim): what each block saw last, one block after the other, each circular.
    positions (slots,) int64: how many bytes each stream has seen.
    """

    history: Tensor
    positions: Tensor

    def reset(self, slots: Tensor | Sequence[int] | int | None = None) -> None:
        """Begin anew, in place: the streams at `slots`, all if None. A tensor of slots stays on the device: fit for a CUDA graph."""
        if slots is None:
            self.history.zero_()
            self.positions.zero_()
            return
        if not isinstance(slots, Tensor):
            slots = torch.tensor(slots, dtype=torch.long, device=self.positions.device)
        self.history.index_fill_(0, slots.long(), 0)
        self.positions.index_fill_(0, slots.long(), 0)


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype that the convolutions have: autocast's where it is on, else the parameters'."""
    device = parameter.device.type
    if torch.is_autocast_enabled(device) and parameter.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return parameter.dtype
