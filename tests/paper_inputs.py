"""What the tests of `bench.paper` share: a made-up corpus, models and runs in small."""

import hashlib

import numpy as np

from bench.paper import noises
from bench.paper.bundle import PARTS, Bundle
from bench.paper.config import ModelConfig, Run, load_settings, resolve
from bench.paper.models import Size
from bench.paper.vocabulary import Vocabulary, byte_ids

MERGED = Vocabulary("bpe4096", (*(bytes([byte]) for byte in range(256)), b"th", b"the", b""))
SIZES = {
    "conv": Size("conv", 257, 2, 16),
    "lstm": Size("lstm", 257, 2, 16),
    "transformer": Size("transformer", 257, 1, 64, 80),
}


def encoded(documents: list[bytes]) -> np.ndarray:
    """The longest piece first, an end mark behind each document."""
    ids: list[int] = []
    for document in documents:
        while document:
            piece = next(piece for piece in (b"the", b"th", document[:1]) if document.startswith(piece))
            ids.append(MERGED.pieces.index(piece))
            document = document[len(piece) :]
        ids.append(MERGED.end)
    return np.array(ids, dtype=np.uint16)


def small_bundle(name: str = "smoke") -> Bundle:
    random = np.random.default_rng(0)
    words = [b"the", b"other", b"that", b"bath", b"cat", b"sat", "é".encode()]
    texts = {
        part: [b" ".join(words[i] for i in random.integers(7, size=60)) for _ in range(count)]
        for part, count in zip(PARTS, (40, 4, 4), strict=True)
    }
    texts |= {f"noise/{noise}": texts["test"][:1] for noise in ("none", *noises.NOISES)}
    families = {"english": [["bath", "baths", "bathe"], ["cat", "cats", "catty"], ["batter", "batters", "battered"]]}
    texts["words/english"] = [f" {word}".encode() for group in families["english"] for word in group]
    streams = {("bpe4096", text): encoded(documents) for text, documents in texts.items()}
    facts = {
        "name": name,
        "sources": {"made up": {"documents": 48, "bytes": 1000}},
        "documents": {part: len(texts[part]) for part in PARTS},
        "bytes": {part: sum(map(len, texts[part])) for part in PARTS},
        "sha256": {part: hashlib.sha256(part.encode()).hexdigest() for part in PARTS},
        "ids": {"bytes": len(byte_ids(texts["train"])), "bpe4096": len(streams["bpe4096", "train"])},
        "families": families,
        "xz": 3.0,
        "5-gram": 2.0,
        "changed_by_the_future": {"bpe4096": 0.25},
    }
    return Bundle(facts, {"bpe4096": MERGED}, streams)


def small_run(bundle: Bundle, model: str = "fuzzytok-29", seed: int = 0, **changes) -> Run:
    small = {"width": 40, "window": 64, "batch": 2, "train_mib": 0.004, "validation_kib": 1, "checked": 3, "timed_steps": 3}
    return resolve(ModelConfig.load(model), bundle, load_settings("smoke")._replace(**small | changes), seed)
