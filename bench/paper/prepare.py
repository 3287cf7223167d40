"""`python3 -m bench.paper prepare`: from packages to one file a corpus. Needs `tokenizers` and no GPU."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from bench.paper import extract, packages, words
from bench.paper.bundle import PARTS, Bundle
from bench.paper.extract import Document
from bench.paper.noises import NOISES, noisy
from bench.paper.sanity import ngram_bits_per_byte, xz_bits_per_byte
from bench.paper.vocabulary import BYTES, SIZES, Encoder, byte_ids

_NOISE_BYTES, _SEED = 256 << 10, 0
_CUTS = 1000  # places at which a token stream is cut, to see what depends on later bytes


class Corpus(NamedTuple):
    """Packages, and how each becomes documents."""

    sources: dict[packages.Package, Callable[[Path], Iterator[Document]]]


CORPORA = {
    "english": Corpus(
        {
            packages.LINUX: extract.linux,
            packages.PYTHON: extract.python,
            packages.DICTIONARY: extract.dictionary,
            packages.ANARCHISM: extract.anarchism,
        }
    ),
    "multilingual": Corpus({packages.HANDBOOK: extract.handbook}),
}


def prepare(work: Path, names: Iterable[str]) -> None:
    """Make the files of these corpora that are not there yet.

    Raises:
        MissingPackageError: with the command that fetches what is missing.
    """
    folder = work / "packages"
    missing = [name for name in names if not path_of(work, name).exists()]
    wanted = {package for name in missing for package in (*CORPORA[name].sources, packages.SNOWBALL)}
    packages.check(sorted(wanted), folder)
    for name in missing:
        with tempfile.TemporaryDirectory() as temporary:
            target = Path(temporary)
            sources = {}
            for package, read in CORPORA[name].sources.items():
                sources[f"{package.name} {package.version}"] = list(extract.distinct(read(packages.unpacked(package, folder, target))))
            families = words.snowball(packages.unpacked(packages.SNOWBALL, folder, target))
        bundled(name, sources, families).save(path_of(work, name))
        print(f"{path_of(work, name)}: {path_of(work, name).stat().st_size:,} bytes", flush=True)


def prepare_smoke(work: Path) -> None:
    """The smoke run's corpus, which needs no package."""
    path = path_of(work, "smoke")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"):
        if not path.exists():
            documents = [piece for document in extract.topics() for piece in _paragraphs(document)]
            bundled("smoke", {"pydoc_data.topics": list(extract.distinct(documents))}, words.SMOKE).save(path)


def path_of(work: Path, name: str) -> Path:
    """Where the file of a corpus lies."""
    return work / "corpora" / f"{name}.zip"


def bundled(name: str, sources: dict[str, list[Document]], families: dict[str, list[list[str]]]) -> Bundle:
    """Split, train the encodings on the training part, encode everything, measure what needs no model."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    parts = split(document for documents in sources.values() for document in documents)
    texts = {part: [document.text for document in documents] for part, documents in parts.items()}
    sample = _sample(texts["test"])
    texts["noise/none"] = sample
    for noise in NOISES:
        texts[f"noise/{noise}"] = [noisy(document, noise, _SEED + place) for place, document in enumerate(sample)]
    for language, groups in families.items():
        texts[f"words/{language}"] = [f" {word}".encode() for group in groups for word in group]
    encoders = {vocabulary: Encoder.train(vocabulary, texts["train"]) for vocabulary in SIZES if vocabulary != BYTES}
    streams = {(each, text): encoder.encode(documents) for each, encoder in encoders.items() for text, documents in texts.items()}
    training, held_out = byte_ids(texts["train"]), byte_ids(texts["test"])
    ids = {BYTES: len(training), **{vocabulary: len(streams[vocabulary, "train"]) for vocabulary in encoders}}
    facts: dict[str, Any] = {
        "name": name,
        "sources": {each: {"documents": len(found), "bytes": _size(found)} for each, found in sources.items()},
        "documents": {part: len(texts[part]) for part in PARTS},
        "bytes": {part: sum(map(len, texts[part])) for part in PARTS},
        "sha256": {part: hashlib.sha256(b"\0".join(texts[part])).hexdigest() for part in PARTS},
        "ids": ids,
        "families": families,
        "xz": xz_bits_per_byte(b"".join(texts["test"])),
        "5-gram": ngram_bits_per_byte(training, held_out),
        "changed_by_the_future": {vocabulary: changed_by_the_future(encoder, sample) for vocabulary, encoder in encoders.items()},
    }
    return Bundle(facts, {vocabulary: encoder.vocabulary for vocabulary, encoder in encoders.items()}, streams)


def split(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """90, 5 and 5 % of the bytes, group by group in the order of their names' hashes, so that no group is in two parts."""
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.group, []).append(document)
    share = 0.05 * sum(map(_size, groups.values()))
    parts: dict[str, list[Document]] = {part: [] for part in PARTS}
    for group in sorted(groups, key=lambda group: hashlib.sha256(group.encode()).digest()):
        part = next((part for part in ("test", "validation") if _size(parts[part]) < share), "train")
        parts[part] += groups[group]
    return parts


def changed_by_the_future(encoder: Encoder, documents: Sequence[bytes]) -> float:
    """The share of cuts of a text, at the end of a token, at which other bytes behind the cut change a token before it."""
    text = b"".join(documents)
    random = np.random.default_rng(_SEED)
    ids = encoder.encode([text])[:-1]
    ends = np.cumsum(encoder.vocabulary.lengths[ids])
    changed = 0
    for place in random.integers(1, len(ids) - 1, size=_CUTS):
        begin = max(0, place - 32)
        head = text[(ends[begin - 1] if begin else 0) : ends[place]]
        other = encoder.encode([head + random.integers(256, size=16, dtype=np.uint8).tobytes()])
        kept = encoder.encode([text[(ends[begin - 1] if begin else 0) : ends[place] + 16]])
        count = place - begin + 1
        changed += not np.array_equal(other[:count], kept[:count])
    return changed / _CUTS


def _sample(documents: Sequence[bytes]) -> list[bytes]:
    """Documents of the test part, in a seeded order, the last one cut, of _NOISE_BYTES in all."""
    sample, size = [], 0
    for place in np.random.default_rng(_SEED).permutation(len(documents)):
        if size < _NOISE_BYTES:
            sample.append(documents[place][: _NOISE_BYTES - size])
            size += len(sample[-1])
    return sample


def _paragraphs(document: Document) -> Iterator[Document]:
    """The smoke corpus has 79 documents, too few to split: its pieces of about 2,000 bytes count as documents."""
    piece: list[bytes] = []
    for paragraph in document.text.split(b"\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) > 2000:
            yield Document(f"{document.group}/{piece[0][:40].hex()}", b"\n\n".join(piece))
            piece = []
    if piece:
        yield Document(f"{document.group}/last", b"\n\n".join(piece))


def _size(documents: Sequence[Document]) -> int:
    return sum(len(document.text) for document in documents)
