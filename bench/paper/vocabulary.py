"""Bytes to ids and back: the bytes themselves, and byte pair encodings trained by Hugging Face's `tokenizers`.

A document is its ids and one end mark. A vocabulary of V ids has 256 bytes, V - 257 merges and the end mark, which is the last id.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

BYTES = "bytes"
SIZES = {BYTES: 257, "bpe385": 385, "bpe4096": 4096}
# Bytes are handed to `tokenizers` as the characters of Latin-1, so that every byte string has an encoding. A piece is a run of letters
# (bytes from 0x80 on count as such), of digits or of signs, with the space before it, or of white space.
_PIECES = " ?[A-Za-z\u0080-\u00ff]+| ?[0-9]+| ?[^ \t\r\n\u000b\u000cA-Za-z0-9\u0080-\u00ff]+|[ \t\r\n\u000b\u000c]+"


class Vocabulary(NamedTuple):
    """What each id stands for; the end mark stands for no bytes."""

    name: str
    pieces: tuple[bytes, ...]

    @property
    def end(self) -> int:
        return len(self.pieces) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(V,) source bytes of each id."""
        return np.array([len(piece) for piece in self.pieces], dtype=np.int32)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """ids (N,) -> the ids of the byte vocabulary for the same documents, as int16."""
        if self.name == BYTES:
            return ids.astype(np.int16)
        spelt = [*self.pieces[:-1], b"\0"]  # the end mark takes one place, filled below
        table = np.frombuffer(b"".join(spelt), dtype=np.uint8).astype(np.int16)
        lengths = np.array([len(piece) for piece in spelt], dtype=np.int64)
        table[-1] = BYTE_VOCABULARY.end
        first = np.cumsum(lengths) - lengths  # where each id's bytes begin in the table
        counts = lengths[ids]
        places = np.arange(counts.sum(), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
        return table[np.repeat(first[ids], counts) + places]


BYTE_VOCABULARY = Vocabulary(BYTES, (*(bytes([byte]) for byte in range(256)), b""))


class Encoder(NamedTuple):
    """A trained byte pair encoding."""

    vocabulary: Vocabulary
    tokenizer: Any

    @staticmethod
    def train(name: str, documents: Iterable[bytes]) -> "Encoder":
        """Of the size that `SIZES` gives `name`, on these documents alone."""
        try:
            from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("tokenizers is not installed: pip install tokenizers") from error
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
        alphabet = [chr(byte) for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=SIZES[name] - 1, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
        tokenizer.train_from_iterator((document.decode("latin-1") for document in documents), trainer)
        ids = tokenizer.get_vocab()
        pieces = [piece.encode("latin-1") for piece in sorted(ids, key=lambda piece: ids[piece])]
        return Encoder(Vocabulary(name, (*pieces, b"")), tokenizer)

    def encode(self, documents: Sequence[bytes]) -> np.ndarray:
        """The ids of the documents, an end mark behind each, as uint16."""
        parts: list[np.ndarray] = []
        for begin in range(0, len(documents), 256):
            texts = [document.decode("latin-1") for document in documents[begin : begin + 256]]
            for encoding in self.tokenizer.encode_batch(texts):
                parts.append(np.array([*encoding.ids, self.vocabulary.end], dtype=np.uint16))
        return np.concatenate(parts)


def byte_ids(documents: Iterable[bytes]) -> np.ndarray:
    """The documents as ids of the byte vocabulary, an end mark behind each."""
    parts = [np.append(np.frombuffer(document, dtype=np.uint8).astype(np.int16), np.int16(BYTE_VOCABULARY.end)) for document in documents]
    return np.concatenate(parts)
