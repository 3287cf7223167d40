"""A byte language model: the tokenizer and a head that says the next byte. It writes on the tokenizer's streaming state."""

import codecs
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fuzzytok_kernels.checks import check_at_least, check_lengths
from fuzzytok_kernels.nn.hub import Pretrained
from fuzzytok_kernels.nn.tokenizer import FuzzyTokenizer, bits_per_byte, to_bytes

_BYTES = 256


class ByteLM(nn.Module, Pretrained):
    """ids (B, T) -> logits (B, T, num_ids) of the id that follows each, from the `tokenizer.receptive_field` bytes up to it.

    Args:
        dim, kernel_size, dilations, activation, num_special: of the `FuzzyTokenizer`.
        tied: whether the head's weight is the embedding's, which then begins smaller, so that the first logits are near 1.
    """

    model_type = "fuzzytok_byte_lm"

    def __init__(
        self,
        dim: int = 256,
        kernel_size: int = 3,
        dilations: Sequence[int] = (1, 2, 4) * 3,
        activation: str = "gelu",
        num_special: int = 0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer = FuzzyTokenizer(dim, kernel_size, dilations, activation, num_special=num_special)
        self.head = nn.Linear(dim, self.tokenizer.num_ids)
        if tied:
            nn.init.normal_(self.tokenizer.embedding.weight, std=dim**-0.5)
            self.head.weight = self.tokenizer.embedding.weight
        config = {name: value for name, value in self.tokenizer.config.items() if name != "embedding_dim"}
        self.config = {**config, "tied": tied}

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) uint8 or long -> logits (B, T, num_ids); `logits[:, t]` are of the id at t + 1."""
        return self.head(self.tokenizer(ids))

    def loss(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Bits per byte, a scalar to train on: each id but the first is predicted from those before. With lengths (B,), the first of each
        row count, and what is behind is padding."""
        if lengths is not None:
            check_lengths(lengths, "ids", ids)
        return bits_per_byte(self(ids)[:, :-1], ids[:, 1:], None if lengths is None else lengths - 1)

    @torch.no_grad()
    def score(self, ids: Tensor, chunk: int = 1 << 14) -> float:
        """Bits per byte of one long text, ids (T,) with T >= 2: all but the first id, each from those before, `chunk` at a time."""
        if ids.dim() != 1 or len(ids) < 2:
            raise ValueError(f"ids has shape {tuple(ids.shape)}; expected (T,), at least 2 ids")
        check_at_least(1, "chunk", chunk)
        state = self.tokenizer.init_state(1)
        bits = ids.new_zeros((), dtype=torch.float64)
        for start in range(0, len(ids) - 1, chunk):
            targets = ids[start + 1 : start + 1 + chunk]
            logits = self.head(self.tokenizer.step(ids[None, start : start + len(targets)], state))
            bits += bits_per_byte(logits, targets[None]).double() * len(targets)
        return bits.item() / (len(ids) - 1)

    def generate(
        self,
        prompts: str | bytes | Sequence[str | bytes],
        max_bytes: int = 256,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        stop: bytes = b"",
        errors: str = "replace",
    ) -> Iterator[list[str]]:
        """Goes on from each prompt, and gives what is new as it is written: lists of one piece a prompt, "" where it has none.

        A piece ends where a character of UTF-8 ends; one that the prompt began is completed. The prompts may be of any lengths, and what
        is written does not depend on who else is in the batch, but for rounding and the random numbers. A model with a `begin_id`
        (num_special >= 2) has it in front of every prompt.

        Args:
            prompts: a text alone is a batch of one. Only its last `tokenizer.receptive_field` bytes matter, and are read.
            max_bytes: at most so many bytes a prompt.
            temperature: the logits are divided by it; 0 takes the most likely byte.
            top_k: draw from the so many most likely; None from all.
            seed: the same one gives the same text for the same prompts; None draws from PyTorch's generator.
            stop: any of these bytes ends its text and is no part of it, as does `end_id`; the other special ids are never drawn.
            errors: what invalid UTF-8 becomes, as in `bytes.decode`; "surrogateescape" loses nothing.

        Raises:
            ValueError: at once, not at the first piece: a prompt that is empty without a begin_id, or a number out of range.
            TypeError: a prompt that is neither str nor bytes, a stop that is not bytes, or a number that is no integer.
        """
        rows = to_bytes("prompts", prompts)
        if not all(rows) and self.tokenizer.begin_id is None:
            raise ValueError("prompts has an empty one; expected at least a byte each, or a model with a begin_id (num_special >= 2)")
        check_at_least(0, "max_bytes", max_bytes)
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; expected a finite number from 0 on")
        if top_k is not None:
            check_at_least(1, "top_k", top_k)
        if not isinstance(stop, bytes):
            raise TypeError(f"stop is {stop!r}; expected bytes, of which any ends a text")
        codecs.lookup_error(errors)
        if seed is not None and not isinstance(seed, int):
            raise TypeError(f"seed is {seed!r}; expected an integer")
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed is {seed}; expected at least -2**63 and below 2**64")
        generator = None if seed is None else torch.Generator(self.head.weight.device).manual_seed(seed)
        return self._written(rows, max_bytes, _Sampler(self.tokenizer.end_id, temperature, top_k, generator), set(stop), errors)

    @torch.no_grad()
    def _written(self, prompts: list[bytes], max_bytes: int, sampler: "_Sampler", stop: set[int], errors: str) -> Iterator[list[str]]:
        decoders = [codecs.getincrementaldecoder("utf-8")(errors) for _ in prompts]
        for decoder, prompt in zip(decoders, prompts, strict=True):
            decoder.decode(prompt[-3:].lstrip(bytes(range(0x80, 0xC0))))  # of a character that is not complete, its first bytes remain
        going = [True] * len(prompts)
        if not prompts or not max_bytes:
            return
        state = self.tokenizer.init_state(len(prompts))
        logits = self._after(prompts, state)
        for count in range(1, max_bytes + 1):
            drawn = sampler(logits)  # (B,)
            pieces = []
            for b, i in enumerate(drawn.tolist()):
                was_going = going[b]
                going[b] &= i < _BYTES and i not in stop
                piece = decoders[b].decode(bytes([i])) if going[b] else ""
                ends = was_going and (not going[b] or count == max_bytes)
                pieces.append(piece + decoders[b].decode(b"", final=True) if ends else piece)
            if any(pieces):
                yield pieces
            if not any(going):
                return
            logits = self.head(self.tokenizer.step(drawn[:, None], state))[:, 0]

    def _after(self, prompts: list[bytes], state: Any) -> Tensor:
        """The logits (B, num_ids) behind each prompt, and the state there: rows of one length go together."""
        begin = [] if self.tokenizer.begin_id is None else [self.tokenizer.begin_id]
        rows = [(begin + list(prompt[-self.tokenizer.receptive_field :]))[-self.tokenizer.receptive_field :] for prompt in prompts]
        device = self.head.weight.device
        logits: list[Tensor] = [torch.empty(0)] * len(rows)
        for length in sorted(set(map(len, rows))):
            chosen = [b for b, row in enumerate(rows) if len(row) == length]
            ids = torch.tensor([rows[b] for b in chosen], device=device)
            z = self.tokenizer.step(ids, state, torch.tensor(chosen, device=device))
            for b, row in zip(chosen, self.head(z[:, -1]), strict=True):
                logits[b] = row
        return torch.stack(logits)


class _Sampler:
    """Draws an id for each row of logits (B, num_ids): a byte, or `end_id`."""

    def __init__(self, end_id: int | None, temperature: float, top_k: int | None, generator: torch.Generator | None) -> None:
        self.end_id, self.temperature, self.top_k, self.generator = end_id, temperature, top_k, generator

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        allowed = torch.arange(logits.shape[1], device=logits.device) < _BYTES
        if self.end_id is not None:
            allowed[self.end_id] = True
        logits = logits.masked_fill(~allowed, -math.inf)
        if self.temperature == 0:
            return logits.argmax(1)
        if self.top_k is not None and self.top_k < logits.shape[1]:
            best = logits.topk(self.top_k, 1)  # by index: of equal logits, of which 16 bits have many, no more than so many
            logits = torch.full_like(logits, -math.inf).scatter(1, best.indices, best.values)
        logits = logits - logits.amax(1, keepdim=True)  # so that no temperature, however near to 0, makes one of them infinite
        shares = (logits / max(self.temperature, torch.finfo(logits.dtype).tiny)).softmax(1)
        return torch.multinomial(shares, 1, generator=self.generator)[:, 0]
