"""FuzzyTok: bytes to continuous embeddings, without a vocabulary. Equations 1 to 4 of the paper."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuzzytok_kernels.checks import check_at_least, check_ids, check_lengths
from fuzzytok_kernels.functional import byte_causal_conv1d
from fuzzytok_kernels.nn.block import ResidualCausalBlock
from fuzzytok_kernels.nn.fold import foldable
from fuzzytok_kernels.nn.hub import Pretrained
from fuzzytok_kernels.nn.streaming import StreamState, compute_dtype
from fuzzytok_kernels.streaming import ops as streaming_ops

_BYTES = 256
_IGNORED = -100  # a target that cross_entropy leaves out


class FuzzyTokenizer(nn.Module, Pretrained):
    """Bytes (B, T) -> z (B, T, embedding_dim or dim): the embedding of each byte in the light of the `receptive_field` bytes up to it.

    An embedding with a LayerNorm (Eq. 1), one residual causal block for each dilation (Eq. 2 and 3), and a linear projection if
    `embedding_dim` is given. No output depends on a later byte.

    Args:
        dim: channels of the blocks.
        kernel_size: taps of every convolution.
        dilations: one residual block each.
        activation: of the blocks, see `ResidualCausalBlock`.
        embedding_dim: size of z; None leaves it at `dim`, without a projection.
        fold: whether embedding, LayerNorm and first block become look-ups in a table of what each id gives, see
            `fuzzytok_kernels.byte_causal_conv1d`: the same up to rounding, in a fraction of the time. Where one of these modules has hooks,
            another forward or parameters of its own that a look-up cannot respect, they run one by one all the same.
        num_special: ids beyond the 256 bytes; the first four have names and attributes, None where there are fewer:
            `pad_id` (256), `begin_id` (257), `end_id` (258), `document_id` (259).

    Attributes:
        receptive_field: how many bytes an output sees, its own included (Eq. 4); 43 for the defaults.
        num_ids: 256 + num_special.
        config: the arguments that make it anew, as `save_pretrained` writes them; `fold` is not among them.

    Raises:
        ValueError: a size below 1, a num_special below 0, or another activation.
        TypeError: a size that is no integer, or dilations that are no sequence.
    """

    model_type = "fuzzytok"

    def __init__(
        self,
        dim: int = 256,
        kernel_size: int = 3,
        dilations: Sequence[int] = (1, 2, 4) * 3,
        activation: str = "gelu",
        embedding_dim: int | None = None,
        num_special: int = 0,
        fold: bool = True,
    ) -> None:
        super().__init__()
        check_at_least(0, "num_special", num_special)
        if not isinstance(dilations, Iterable):
            raise TypeError(f"dilations is {dilations!r}; expected a sequence of integers, one a block")
        dilations = tuple(dilations)
        sizes = {"dim": dim, "kernel_size": kernel_size, "embedding_dim": 1 if embedding_dim is None else embedding_dim}
        for name, value in [*sizes.items(), *(("dilation", dilation) for dilation in dilations)]:
            check_at_least(1, name, value)
        self.fold = fold
        self.config = dict(
            dim=dim, kernel_size=kernel_size, dilations=list(dilations), activation=activation, embedding_dim=embedding_dim,
            num_special=num_special,
        )  # fmt: skip
        self.num_ids, self.activation = _BYTES + num_special, activation
        specials = [i if i < self.num_ids else None for i in range(_BYTES, _BYTES + 4)]
        self.pad_id, self.begin_id, self.end_id, self.document_id = specials
        self.receptive_field = 1 + sum((kernel_size - 1) * dilation for dilation in dilations)
        self.embedding = nn.Embedding(self.num_ids, dim)
        self.norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(ResidualCausalBlock(dim, kernel_size, dilation, activation) for dilation in dilations)
        self.projection = nn.Identity() if embedding_dim is None else nn.Linear(dim, embedding_dim)

    def forward(self, ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """ids (B, T) uint8 or long -> z (B, T, embedding_dim or dim), in the dtype of the parameters (or as autocast promotes it).

        With cu_seqlens (N + 1,) int32, ids is (1, T): N texts end to end, without padding, of which none sees another. Text n is
        `ids[0, cu_seqlens[n]:cu_seqlens[n + 1]]`; see `fuzzytok_kernels.causal_conv1d`.

        Raises:
            ValueError: ids is not (B, T).
            TypeError: ids is neither uint8 nor long.
            IndexError: on the CPU, an id below 0 or from `num_ids` up. A check on a GPU would wait for it: there z is NaN where such an id
                is seen, or, without the fold, the embedding's device-side assertion fails.
        """
        check_ids(ids)
        blocks: list[Any] = list(self.blocks)
        folded = self.fold and foldable(self)
        h = self._folded(ids, blocks.pop(0), cu_seqlens) if folded else self._embed(ids).mT
        for block in blocks:  # h (B, C, T), channels-last in memory: a view on the way in and on the way out
            h = block(h) if cu_seqlens is None else block(h, cu_seqlens)  # so that a block of the user's need not take it
        return self.projection(h.mT)

    def _embed(self, ids: Tensor) -> Tensor:
        try:
            return self.norm(self.embedding(ids.long()))
        except IndexError as error:
            raise IndexError(f"ids reach from {ids.min()} to {ids.max()}; expected 0 to {self.num_ids - 1}") from error

    def _folded(self, ids: Tensor, first: Any, cu_seqlens: Tensor | None) -> Tensor:
        """What the `first` block makes of `_embed`, by look-ups."""
        rows, conv = self.norm(self.embedding.weight), first.conv  # (num_ids, C)
        return byte_causal_conv1d(
            ids, rows, conv.weight, conv.bias, dilation=conv.dilation, activation=first.activation, cu_seqlens=cu_seqlens
        )

    def init_state(self, slots: int) -> StreamState:
        """The state of `slots` streams that have seen nothing, for `step`, on the device of the parameters, in the dtype of the blocks.

        It holds receptive_field - 1 vectors of size dim and a position for each.
        """
        check_at_least(1, "slots", slots)
        weight = self.embedding.weight
        history = weight.new_zeros(slots, self.receptive_field - 1, weight.shape[1], dtype=compute_dtype(weight))
        return StreamState(history, torch.zeros(slots, dtype=torch.long, device=weight.device))

    def step(self, ids: Tensor, state: StreamState, slots: Tensor | None = None) -> Tensor:
        """The next ids (B, L), any L >= 0, of B streams -> their z (B, L, embedding_dim or dim); state, from `init_state`, goes on by L.

        Chunk by chunk it returns what `forward` returns on all the ids at once, to rounding, without gradients. Row b belongs to slot b,
        or to slot `slots[b]` of int32 or int64 slots (B,), none twice; a row whose slot there is not, by custom -1, is empty: it changes
        no state, and its z means nothing. Nothing waits for the GPU, so that a call can be captured in a CUDA graph and replayed.
        Weights that have changed since hold for what comes, not for what the state remembers. It reads the parameters of the blocks, and
        runs neither their hooks nor a forward of their own.

        Raises:
            ValueError: ids is not (B, L), or B is not the number of slots although `slots` is None; a block has been replaced by one with
                a norm, another activation or of another class.
            TypeError: ids is neither uint8 nor long, or the state is of another dtype (as after a change of autocast).
            IndexError: on the CPU, as `forward`. On a GPU such an id gives NaN, here and as long as the state remembers it.
        """
        check_ids(ids)  # the op does too, but PyTorch has more to say to what is no tensor
        for i, block in enumerate(self.blocks):
            # By what it has, not by its class: the wrappers of torch.compile and of checkpointing show what they wrap.
            if getattr(block, "activation", None) != self.activation or not isinstance(getattr(block, "norm", None), nn.Identity):
                wanted = f"a ResidualCausalBlock without a norm, with activation={self.activation!r}"
                raise ValueError(f"blocks[{i}] is {type(block).__name__}({block.extra_repr()}); expected {wanted}, as step computes it")
        convs: list[Any] = [block.conv for block in self.blocks]
        layers = [conv.weight for conv in convs], [conv.bias for conv in convs], [conv.dilation for conv in convs]
        with torch.no_grad():
            e = streaming_ops.embedding_norm(ids, self.embedding.weight, self.norm.weight, self.norm.bias, self.norm.eps)  # (B, L, C)
            h = streaming_ops.residual_stack_update(e.mT, *state, slots, *layers, self.activation)  # (B, C, L)
            return self.projection(h.mT)

    def encode(self, texts: str | bytes | Sequence[str | bytes]) -> tuple[Tensor, Tensor]:
        """Text to the ids that `forward` takes: long ids (B, T) and lengths (B,), on the device of the parameters.

        A text alone is a batch of one. A str becomes its UTF-8 bytes (`surrogateescape`, so that bytes which Python read as invalid
        UTF-8 come out as they were); bytes are taken as they are, 0 and invalid UTF-8 included. Behind its length each row is filled
        with `pad_id`, or with 0 if there is none.

        Raises:
            TypeError: something that is neither str nor bytes.
        """
        rows = to_bytes("texts", texts)
        ids = torch.full((len(rows), max(map(len, rows), default=0)), self.pad_id or 0)
        for row_ids, row in zip(ids, rows, strict=True):
            if row:  # frombuffer refuses an empty one
                row_ids[: len(row)] = torch.frombuffer(bytearray(row), dtype=torch.uint8)
        device = self.embedding.weight.device
        return ids.to(device), torch.tensor([len(row) for row in rows], dtype=torch.long, device=device)

    def decode(self, ids: Tensor, lengths: Tensor | None = None) -> list[bytes]:
        """The bytes that `encode` was given: ids (B, T) and lengths (B,), or None where nothing is padding; special ids are left out.

        For a str, decode the bytes as you see fit: `data.decode(errors="replace")`, or `errors="surrogateescape"` to lose nothing.

        Raises:
            ValueError: ids is not (B, T) or has one below 0, or lengths is not (B,) or has one below 0.
            TypeError: ids is neither uint8 nor long, or lengths neither int32 nor int64.
        """
        check_ids(ids)
        if lengths is not None:
            check_lengths(lengths, "ids", ids)
        ends = [ids.shape[1]] * len(ids) if lengths is None else lengths.tolist()
        if min(ends, default=0) < 0:
            raise ValueError(f"lengths is {ends}; expected none below 0")
        return [bytes(i for i in row[:end] if i < _BYTES) for row, end in zip(ids.tolist(), ends, strict=True)]


def bits_per_byte(logits: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of logits (B, T, num_ids) against targets (B, T), in bits: a scalar in at least fp32, to train on or to report.

    `logits[:, t]` is scored on `targets[:, t]`: for a next-byte head pass `logits[:, :-1]` and `ids[:, 1:]`. With lengths (B,), only the
    first `lengths[b]` positions of row b count; without, all. nan if no position does.

    Raises:
        ValueError: the shapes do not go together.
        TypeError: targets or lengths are no integers.
    """
    if logits.dim() != 3 or logits.shape[:2] != targets.shape:
        raise ValueError(f"targets has shape {tuple(targets.shape)}; expected the (B, T) of logits, {tuple(logits.shape)}")
    if targets.is_floating_point():
        raise TypeError(f"targets has dtype {targets.dtype}; expected integers")
    if lengths is not None:
        check_lengths(lengths, "targets", targets)
    targets = targets.long()
    if lengths is not None:
        steps = torch.arange(targets.shape[1], device=targets.device)
        targets = targets.masked_fill(steps >= lengths[:, None], _IGNORED)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED) / math.log(2)


def to_bytes(name: str, texts: str | bytes | Sequence[str | bytes]) -> list[bytes]:
    """The bytes of each text; a text alone is one of them."""
    if isinstance(texts, str | bytes):
        texts = [texts]
    if not isinstance(texts, Iterable) or isinstance(texts, bytearray | memoryview):
        raise TypeError(f"{name} is of type {type(texts).__name__}; expected str, bytes, or a sequence of these")
    rows = []
    for text in texts:
        if not isinstance(text, str | bytes):
            raise TypeError(f"{name} has one of type {type(text).__name__}; expected str or bytes")
        rows.append(text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text)
    return rows
