"""Time sharded over the ranks of a group: which steps of its history a rank gets from which rank on its left, and the way back.

Rank r holds the steps `starts[r]` to `starts[r + 1]` of every sequence, in the order of the ranks.
"""

from functools import lru_cache
from itertools import accumulate, takewhile
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Piece(NamedTuple):
    """The steps `begin` to `end` of the whole, sent to or received from `peer`."""

    peer: int
    begin: int
    end: int


class TimeShards(NamedTuple):
    """How many steps each rank of `group` holds, as seen by `rank`."""

    group: dist.ProcessGroup | None
    rank: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, T: int, group: dist.ProcessGroup | None = None, lengths: tuple[int, ...] | None = None) -> "TimeShards":
        """This rank's, which holds T steps; `lengths` of all ranks, or None where all hold T.

        Raises:
            ValueError: `lengths` are not those of the group, or none of this rank's T.
        """
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        if lengths is None:
            lengths = (T,) * ranks
        if len(lengths) != ranks or lengths[rank] != T:
            raise ValueError(f"lengths is {lengths}; expected one for each of {ranks} ranks, and {T} for rank {rank}, as it was given")
        return cls(group, rank, tuple(lengths))

    @property
    def start(self) -> int:
        return sum(self.lengths[: self.rank])

    def before(self, history: int) -> int:
        """How many of the `history` steps before this rank's first there are."""
        return min(history, self.start)

    def received(self, history: int) -> tuple[Piece, ...]:
        """What this rank receives of the `history` steps before its own, from the left to the right."""
        return _received(self.lengths, self.rank, history)

    def sent(self, history: int) -> tuple[Piece, ...]:
        """What this rank sends of its steps, as histories of ranks on its right."""
        return _sent(self.lengths, self.rank, history)

    def boundaries(self, cu_seqlens: Tensor | None, before: int, steps: int) -> Tensor | None:
        """Those of the sequences within this rank's first `steps` steps and the `before` steps before them, from those of the whole."""
        return None if cu_seqlens is None else (cu_seqlens - (self.start - before)).clamp(0, before + steps)


@lru_cache(maxsize=1024)  # no more than the neighbours are looked at, but 1,024 lengths are summed
def _received(lengths: tuple[int, ...], rank: int, history: int) -> tuple[Piece, ...]:
    starts = list(accumulate(lengths, initial=0))
    first = max(0, starts[rank] - history)
    sources = takewhile(lambda source: starts[source + 1] > first, range(rank - 1, -1, -1))
    pieces = [Piece(source, max(first, starts[source]), starts[source + 1]) for source in sources]
    return tuple(piece for piece in reversed(pieces) if piece.begin < piece.end)


@lru_cache(maxsize=1024)
def _sent(lengths: tuple[int, ...], rank: int, history: int) -> tuple[Piece, ...]:
    starts = list(accumulate(lengths, initial=0))
    targets = takewhile(lambda target: starts[target] - history < starts[rank + 1], range(rank + 1, len(lengths)))
    pieces = [Piece(target, max(starts[rank], starts[target] - history), starts[rank + 1]) for target in targets]
    return tuple(piece for piece in pieces if piece.begin < piece.end)


def history_bytes(lengths: tuple[int, ...], history: int, bytes_of_step: int) -> int:
    """What all ranks together send in one exchange: of every rank the history, or as much of it as there is on its left."""
    return bytes_of_step * sum(min(history, start) for start in accumulate(lengths[:-1]))


class Exchange:
    """Messages under way: computing between its making and `wait` hides them."""

    def __init__(self, shards: TimeShards, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]) -> None:
        self._received = [buffer for _, buffer in receives]
        messages = [(dist.isend, peer, part) for peer, part in sends] + [(dist.irecv, peer, buffer) for peer, buffer in receives]
        operations = [dist.P2POp(way, tensor, group=shards.group, group_peer=peer) for way, peer, tensor in messages if tensor.numel()]
        self._works = dist.batch_isend_irecv(operations) if operations else []
        self._sent = [part for _, part in sends]  # they must outlive the messages

    def wait(self) -> list[Tensor]:
        """What has been received. On a GPU its stream waits, not the host."""
        for work in self._works:
            work.wait()
        self._sent.clear()
        return self._received


def send_history(x: Tensor, history: int, shards: TimeShards) -> Exchange:
    """Begin to exchange the last steps of x (..., T) for those before its first: pieces (..., n), which together are `before(history)`."""
    sends = [(piece.peer, x[..., piece.begin - shards.start : piece.end - shards.start].contiguous()) for piece in shards.sent(history)]
    receives = [(piece.peer, x.new_empty((*x.shape[:-1], piece.end - piece.begin))) for piece in shards.received(history)]
    return Exchange(shards, sends, receives)


def return_gradient(grad_past: Tensor, history: int, shards: TimeShards) -> Exchange:
    """Begin to send the gradient (..., before(history)) of what `send_history` received back to where it came from."""
    first = shards.start - shards.before(history)
    sends = [(piece.peer, grad_past[..., piece.begin - first : piece.end - first].contiguous()) for piece in shards.received(history)]
    receives = [(piece.peer, grad_past.new_empty((*grad_past.shape[:-1], piece.end - piece.begin))) for piece in shards.sent(history)]
    return Exchange(shards, sends, receives)


def add_returned(grad_x: Tensor, returned: Exchange, history: int, shards: TimeShards) -> None:
    """Add to the gradient of x, in place, what the ranks on the right found for the steps that they got from here."""
    for piece, part in zip(shards.sent(history), returned.wait(), strict=True):
        grad_x[..., piece.begin - shards.start : piece.end - shards.start] += part


def joined(past: list[Tensor], x: Tensor) -> Tensor:
    """The received pieces and x (..., T) as one tensor; channels-last in memory if x is."""
    if x.dim() == 3 and x.stride(1) == 1:
        return torch.cat([part.mT for part in (*past, x)], 1).mT
    return torch.cat([*past, x], -1)
