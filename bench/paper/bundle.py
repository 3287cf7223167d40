"""One corpus in one compressed file: its texts as token streams, its vocabularies, and what was measured of it once and for all.

The bytes of a text are those of its longest tokens, spelt out, and lie in the file no second time.
"""

import functools
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper.vocabulary import BYTE_VOCABULARY, BYTES, Vocabulary

PARTS = ("train", "validation", "test")
SPELT = "bpe4096"  # the stream that the bytes are taken from


class Bundle:
    """`facts` is what JSON can hold; `streams` are ids by (vocabulary, text), an end mark behind every document."""

    def __init__(self, facts: dict[str, Any], vocabularies: dict[str, Vocabulary], streams: Mapping[tuple[str, str], np.ndarray]) -> None:
        self.facts, self.vocabularies, self.streams = facts, vocabularies, streams
        self._spelt: dict[str, np.ndarray] = {}

    def ids(self, vocabulary: str, text: str) -> np.ndarray:
        """(N,) the documents of `text`: a part of the split, "noise/<name>" or "words/<language>"."""
        if vocabulary != BYTES:
            return self.streams[vocabulary, text]
        if text not in self._spelt:
            self._spelt[text] = self.vocabularies[SPELT].decode(self.streams[SPELT, text])
        return self._spelt[text]

    def vocabulary(self, name: str) -> Vocabulary:
        return BYTE_VOCABULARY if name == BYTES else self.vocabularies[name]

    def bytes_per_id(self, vocabulary: str) -> float:
        """In the training text, end marks among the ids."""
        count = self.facts["ids"][vocabulary]
        return self.facts["bytes"]["train"] / count

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        spelling = {name: [piece.hex() for piece in each.pieces] for name, each in self.vocabularies.items()}
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_LZMA) as file:
            _write(file, "facts.json", json.dumps({"facts": self.facts, "vocabularies": spelling}).encode())
            for (vocabulary, text), ids in self.streams.items():
                buffer = io.BytesIO()
                np.save(buffer, ids)
                _write(file, f"{vocabulary}/{text}.npy", buffer.getvalue())
        unfinished.replace(path)

    @staticmethod
    def load(path: Path) -> "Bundle":
        """Each stream is unpacked when it is first asked for.

        Raises:
            FileNotFoundError: no such file, with the command that makes it.
        """
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: python3 -m bench.paper prepare")
        with zipfile.ZipFile(path) as file:
            stored = json.loads(file.read("facts.json"))
            names = [name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")]
        vocabularies = {
            name: Vocabulary(name, tuple(bytes.fromhex(piece) for piece in pieces)) for name, pieces in stored["vocabularies"].items()
        }
        keys = [(name.partition("/")[0], name.partition("/")[2]) for name in names]
        return Bundle(stored["facts"], vocabularies, _Streams(path, keys))


class _Streams(Mapping[tuple[str, str], np.ndarray]):
    def __init__(self, path: Path, keys: list[tuple[str, str]]) -> None:
        self.path, self.keys_ = path, keys
        self._read = functools.cache(self._unpacked)

    def __getitem__(self, key: tuple[str, str]) -> np.ndarray:
        if key not in self.keys_:
            raise KeyError(key)
        return self._read(key)

    def __iter__(self) -> Any:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)

    def _unpacked(self, key: tuple[str, str]) -> np.ndarray:
        with zipfile.ZipFile(self.path) as file:
            return np.load(io.BytesIO(file.read("/".join(key) + ".npy")))


def _write(file: zipfile.ZipFile, name: str, content: bytes) -> None:
    """With no date, so that the same corpus is the same file."""
    file.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_LZMA)
