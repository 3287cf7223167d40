"""Documents out of unpacked packages: plain text, each with the group that must stay in one part of the split."""

import gzip
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

_PAGE_BYTES = 8192  # of a run of dictionary entries that counts as one document
_KEPT_PAGES = 3  # every third: the dictionary would be half of the English corpus else
_HIDDEN = {"head", "script", "style", "svg", "nav"}
_VOID = {"br", "hr", "img", "meta", "link", "input", "wbr", "col", "area", "base", "source"}
_INLINE = {"a", "abbr", "b", "cite", "code", "em", "font", "i", "kbd", "small", "span", "strong", "sub", "sup", "tt", "u", "var"}
_DIGITS = {symbol: value for value, symbol in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


class Document(NamedTuple):
    """`group` decides the part of the split: the translations of a page share one."""

    group: str
    text: bytes


def linux(root: Path) -> Iterator[Document]:
    """The kernel's documentation in English, as its authors wrote it."""
    sources = root / "usr/share/doc/linux-doc-6.1/html/_sources"
    return (document for document in _sphinx(sources) if not document.group.startswith("translations/"))


def python(root: Path) -> Iterator[Document]:
    """Python's documentation, as its authors wrote it."""
    return _sphinx(root / "usr/share/doc/python3.11/html/_sources")


def dictionary(root: Path) -> Iterator[Document]:
    """Runs of entries of the GCIDE."""
    folder = root / "usr/share/dictd"
    text = gzip.decompress((folder / "gcide.dict.dz").read_bytes())
    lines = (folder / "gcide.index").read_text(encoding="utf-8").splitlines()
    spans = {(_number(offset), _number(length)) for word, offset, length in map(_fields, lines) if not word.startswith("00-")}
    page, size, number = [], 0, 0
    for offset, length in sorted(spans):
        page.append(text[offset : offset + length])
        size += length
        if size >= _PAGE_BYTES:
            if number % _KEPT_PAGES == 0:
                yield Document(f"gcide/{number}", b"".join(page))
            page, size, number = [], 0, number + 1


def anarchism(root: Path) -> Iterator[Document]:
    """An Anarchist FAQ, a section a document."""
    for path in sorted((root / "usr/share/doc/anarchism/html").glob("*.html")):
        yield Document(f"anarchism/{path.name}", html_text(path.read_text(encoding="utf-8", errors="replace")).encode())


def handbook(root: Path) -> Iterator[Document]:
    """The Debian handbook in all its languages; English first, so that untranslated pages are the ones that count as duplicates."""
    folder = root / "usr/share/doc/debian-handbook/html"
    languages = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: (path.name != "en-US", path.name))
    for language in languages:
        for path in sorted(language.glob("*.html")):
            yield Document(f"handbook/{path.name}", html_text(path.read_text(encoding="utf-8", errors="replace")).encode())


def topics() -> Iterator[Document]:
    """The help texts of Python's standard library, for the smoke run."""
    from pydoc_data.topics import topics as texts

    return (Document(f"topics/{name}", text.encode()) for name, text in sorted(texts.items()))


def distinct(documents: Iterable[Document]) -> Iterator[Document]:
    """Those that are not empty, and less than half of whose long lines, by bytes, were in earlier ones."""
    seen: set[int] = set()
    for document in documents:
        lines = [b" ".join(line.split()) for line in document.text.splitlines()]
        long_lines = [line for line in lines if len(line) >= 40] or lines
        sizes = {hash(line): len(line) for line in long_lines}
        if sum(sizes.values()) > 2 * sum(size for line, size in sizes.items() if line in seen):
            yield document
        seen.update(sizes)


def families(root: Path, language: str) -> dict[str, list[str]]:
    """Stem to its words, from Snowball's sample vocabulary and its stems of it."""
    folder = root / "usr/share/snowball/data" / language
    words, stems = ((folder / name).read_text(encoding="utf-8").split() for name in ("voc.txt", "output.txt"))
    found: dict[str, list[str]] = {}
    for word, stem in zip(words, stems, strict=True):
        found.setdefault(stem, []).append(word)
    return found


def html_text(page: str) -> str:
    """What a page shows, a block a line."""
    parser = _Text()
    parser.feed(page)
    lines = (" ".join(line.split()) for line in "".join(parser.parts).splitlines())
    return "".join(f"{line}\n" for line in lines if line)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden: list[str] = []  # the open elements from the outermost hidden one on
        self.verbatim = 0  # how many <pre> are open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in _INLINE:
            self.parts.append("\n")
        self.verbatim += tag == "pre"
        if tag not in _VOID and (self.hidden or tag in _HIDDEN):
            self.hidden.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _INLINE:
            self.parts.append("\n")
        self.verbatim -= tag == "pre" and self.verbatim > 0
        if tag in self.hidden:
            while self.hidden.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data if self.verbatim else " ".join(data.split("\n")))


def _sphinx(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("*.rst.txt")):
        yield Document(path.relative_to(folder).as_posix(), path.read_bytes())


def _fields(line: str) -> list[str]:
    return line.split("\t")[:3]


def _number(digits: str) -> int:
    """dictd's base 64."""
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS[digit]
    return value
