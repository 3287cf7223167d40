"""The corpora of `bench.paper` in small: packages, extraction, splits, noises, encodings, bundles, the 5-gram."""

import math

import numpy as np
import pytest
from modes import not_interpreted
from paper_inputs import MERGED, encoded, small_bundle

from bench.paper import extract, noises, packages, prepare
from bench.paper.__main__ import main
from bench.paper.bundle import PARTS, Bundle
from bench.paper.extract import Document
from bench.paper.sanity import ngram_bits_per_byte
from bench.paper.vocabulary import BYTE_VOCABULARY, Encoder, byte_ids

pytestmark = not_interpreted


def test_source_bytes_and_ids_agree_over_vocabularies():
    bundle = small_bundle()
    for part in PARTS:
        byte_stream = bundle.ids("bytes", part)
        assert (byte_stream != BYTE_VOCABULARY.end).sum() == bundle.facts["bytes"][part]
        assert (byte_stream == BYTE_VOCABULARY.end).sum() == bundle.facts["documents"][part]
    assert np.array_equal(MERGED.decode(encoded([b"the bath", b"", b"x"])), byte_ids([b"the bath", b"", b"x"]))


def test_split_is_by_group_and_disjoint():
    documents = [Document(f"page{number % 300}", b"%d" % number * 50) for number in range(900)]  # three translations of each page
    parts = prepare.split(documents)
    groups = {part: {document.group for document in found} for part, found in parts.items()}
    assert sum(map(len, parts.values())) == 900
    assert not groups["train"] & groups["test"] and not groups["train"] & groups["validation"] and not groups["test"] & groups["validation"]
    total = sum(len(document.text) for document in documents)
    for part in ("test", "validation"):
        assert 0.05 * total <= sum(len(document.text) for document in parts[part]) < 0.06 * total
    assert (
        prepare.split(reversed(documents))["test"] != [] and {d.group for d in prepare.split(reversed(documents))["test"]} == groups["test"]
    )


def test_duplicates_are_removed():
    lines = [b"a long line that is told apart by number %d of them all\n" % number for number in range(20)]
    whole, spaced = Document("a", b"".join(lines)), Document("b", b"".join(lines).replace(b" ", b"  "))
    mostly, less = (
        Document("c", b"".join(lines[:11]) + b"".join(b"new " * 12 + line for line in lines[:9])),
        Document("d", b"".join(lines[:9]) + b"other " * 200),
    )
    short, same_short = Document("e", b"short\n"), Document("f", b"short\n")
    kept = list(extract.distinct([whole, spaced, mostly, less, short, same_short, Document("g", b"")]))
    assert [document.group for document in kept] == ["a", "c", "d", "e"]


def test_html_is_read_as_it_shows():
    page = "<html><head><title>no</title></head><body><p>One <b>bold</b>\n word &amp; more<br>line</p><script>x()</script>"
    page += "<ul><li>an\nitem</ul><pre>a b\nc</pre></body></html>"
    assert extract.html_text(page) == "One bold word & more\nline\nan item\na b\nc\n"


def test_the_dictionary_is_cut_at_its_entries(tmp_path):
    import gzip

    folder = tmp_path / "usr/share/dictd"
    folder.mkdir(parents=True)
    entries = [b"entry %04d " % number + b"x" * 4989 for number in range(8)]  # 5,000 bytes each
    (folder / "gcide.dict.dz").write_bytes(gzip.compress(b"".join(entries)))
    digits = {value: symbol for symbol, value in extract._DIGITS.items()}

    def base64(value: int) -> str:
        return (base64(value // 64) if value >= 64 else "") + digits[value % 64]

    index = [f"word{number}\t{base64(5000 * number)}\t{base64(5000)}" for number in range(8)]
    (folder / "gcide.index").write_text("\n".join(["00-database-info\tA\tF", *index, index[0]]), encoding="utf-8")
    pages = list(extract.dictionary(tmp_path))
    assert [page.text for page in pages] == [b"".join(entries[:2]), b"".join(entries[6:8])]  # pages 0 and 3 of four


def test_a_missing_package_is_named_with_its_command(tmp_path):
    package = packages.Package("some-doc", "1.2-3", "0" * 64)
    with pytest.raises(packages.MissingPackageError, match=r"some-doc_1.2-3_all.deb not in .*apt-get download some-doc=1.2-3"):
        packages.check([package], tmp_path)
    (tmp_path / package.file).write_bytes(b"another")
    with pytest.raises(packages.MissingPackageError, match=r"has sha256 .* expected 0000"):
        packages.check([package], tmp_path)
    with pytest.raises(SystemExit, match="apt-get download"):
        main(["prepare", "--work", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"english.zip is missing: python3 -m bench.paper prepare"):
        main(["table2", "--work", str(tmp_path), "--results", str(tmp_path)])


def test_a_bundle_comes_back_as_it_was(tmp_path):
    bundle = small_bundle()
    for name in ("a.zip", "b.zip"):
        bundle.save(tmp_path / name)
    loaded = Bundle.load(tmp_path / "a.zip")
    assert loaded.facts == bundle.facts and loaded.vocabularies == bundle.vocabularies
    assert all(np.array_equal(loaded.streams[key], bundle.streams[key]) for key in bundle.streams) and set(loaded.streams) == set(
        bundle.streams
    )
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_an_encoding_takes_any_bytes():
    pytest.importorskip("tokenizers")
    encoder = Encoder.train("bpe385", [b"the bath that the other cat sat in " * 20, "naïve café 12 + 345".encode() * 5])
    assert (
        len(encoder.vocabulary.pieces) <= 385
        and encoder.vocabulary.pieces[-1] == b""
        and set(map(len, encoder.vocabulary.pieces[:256])) == {1}
    )
    documents = [bytes(range(256)), b"", b"the cat\r\n\n  sat <end>", "日本語".encode()[:-1]]
    ids = encoder.encode(documents)
    assert np.array_equal(encoder.vocabulary.decode(ids), byte_ids(documents))
    assert len(encoder.encode([b"the bath that"])) < 10
    assert 0 <= prepare.changed_by_the_future(encoder, [b"the bath that the other cat sat in"]) < 1


def test_noises_are_what_they_say_and_seeded():
    text = ("The quick Brown fox, naïve café. " * 60).encode()
    made = {name: noises.noisy(text, name, seed=3) for name in noises.NOISES}
    assert made == {name: noises.noisy(text, name, seed=3) for name in noises.NOISES}
    assert all(noisy not in (text, noises.noisy(text, name, seed=4)) for name, noisy in made.items() if name != "upper_case")
    assert 0.86 < len(made["drop"]) / len(text) < 0.94 and 1.06 < len(made["repeats"]) / len(text) < 1.14
    assert made["upper_case"] == bytes(byte - 32 if 97 <= byte <= 122 else byte for byte in text)
    assert made["random_case"].upper() == text.upper()
    assert sorted(made["swaps"]) == sorted(text) and 0.06 < sum(a != b for a, b in zip(made["swaps"], text, strict=True)) / len(text) < 0.11
    assert all(noises.noisy(b"", name, 0) == b"" for name in noises.NOISES)


def test_the_5_gram_is_witten_and_bell_s():
    training, held_out = byte_ids([b"abracadabra", b"abba"]), byte_ids([b"abrab", b"zab"])

    def probability(before: tuple, token: int) -> float:
        lower = probability(before[1:], token) if before else 1 / 257
        padded = [256] * len(before) + training.tolist()
        grams = [tuple(padded[place : place + len(before) + 1]) for place in range(len(training))]
        seen = [gram[-1] for gram in grams if gram[:-1] == before]
        return (seen.count(token) + len(set(seen)) * lower) / (len(seen) + len(set(seen))) if seen else lower

    padded = [256] * 4 + held_out.tolist()
    bits = -sum(math.log2(probability(tuple(padded[place : place + 4]), padded[place + 4])) for place in range(len(held_out)))
    assert ngram_bits_per_byte(training, held_out) == pytest.approx(bits / 8)
    assert sum(probability((97, 98), token) for token in range(257)) == pytest.approx(1)
