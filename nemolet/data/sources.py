"""Documents out of files: text, JSON lines and folders, plain or compressed, in bounded memory."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import logging
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, Protocol

from nemolet.errors import DataError, nearest

BLOCK = 1 << 20  # bytes that are looked at together
_OPENERS: dict[str, Callable[[Path], BinaryIO]] = {
    ".gz": lambda path: gzip.open(path, "rb"),  # type: ignore[dict-item,return-value]
    ".bz2": lambda path: bz2.open(path, "rb"),  # type: ignore[dict-item,return-value]
    ".xz": lambda path: lzma.open(path, "rb"),  # type: ignore[dict-item,return-value]
}
_TEXT = (".txt", ".text", ".md", ".rst", ".py", ".jsonl")
_HALF = re.compile("[\ud800-\udfff]")  # of a character that UTF-16 writes as two
_log = logging.getLogger("nemolet")
InvalidUTF8 = Literal["error", "replace", "ignore"]
BROKEN = (EOFError, zlib.error, lzma.LZMAError, OSError)  # what reading a damaged file raises


def open_file(path: Path) -> BinaryIO:
    """A file for reading, compressed or not."""
    return _OPENERS[path.suffix](path) if path.suffix in _OPENERS else path.open("rb")


class Piece(NamedTuple):
    """Part of a document; ``last`` where the document ends with it."""

    text: str
    last: bool


class Pieces(Protocol):
    """Whatever gives documents piece by piece."""

    def pieces(self) -> Iterator[Piece]: ...


@dataclass(frozen=True)
class TextFiles:
    """Documents of files and folders (final).

    A text file is one document; a line of a ``.jsonl`` file is one document. Long documents come in pieces,
    cut at a space or line end where there is one, so that memory does not depend on their length.

    Of a folder, what is hidden (a name that begins with a dot, or anything below such a folder) is not looked at, and
    empty files are left out with a warning; a file that is named itself is read whatever its name, and may not be
    empty.

    Args:
        paths: files and folders; folders are searched for text and JSON lines, compressed or not.
        text_key: where the text lies in a JSON record.
        invalid_utf8: what to do with bytes that are no UTF-8, and with lone surrogates in JSON: stop with the place,
            write U+FFFD, or leave them out.
        max_line_bytes: longest line of a JSON lines file, which has to fit into memory.

    Raises:
        DataError: naming file and line, while reading.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> _ = path.write_text("two words")
        >>> list(TextFiles([path]).pieces())
        [Piece(text='two words', last=True)]
    """

    paths: Sequence[str | Path]
    text_key: str = "text"
    invalid_utf8: InvalidUTF8 = "error"
    max_line_bytes: int = 1 << 26

    def files(self) -> list[Path]:
        """All files, in a fixed order."""
        found: list[Path] = []
        for path in map(Path, self.paths):
            if path.is_dir():
                inside = sorted(f for f in path.rglob("*") if _kind(f) in _TEXT and f.is_file() and _seen(f, path))
                if not inside:
                    raise DataError(
                        "the folder holds no text",
                        where=str(path),
                        expected="files " + " ".join(_TEXT) + ", also as .gz .bz2 .xz",
                        fix="name the files themselves",
                    )
                found += inside
            elif path.is_file():
                found.append(path)
            else:
                raise DataError(
                    "there is no such file",
                    where=str(path),
                    expected="a text, a .jsonl or a folder",
                    found="nothing",
                    fix=_neighbour(path),
                )
        if not found:
            raise DataError("no data was named", where="data.path", fix="set data.path=my.txt")
        return found

    def total_bytes(self) -> int:
        """Size of all files on disk, for progress bars."""
        return sum(f.stat().st_size for f in self.files())

    def pieces(self) -> Iterator[Piece]:
        """All documents, piece by piece."""
        named, left_out = set(map(Path, self.paths)), []
        for file in self.files():
            empty = True
            try:
                with open_file(file) as stream:
                    for piece in self._lines(stream, file) if _kind(file) == ".jsonl" else self._text(stream, file):
                        empty = empty and not piece.text
                        yield piece
            except BROKEN as error:
                raise DataError(
                    "the file cannot be read",
                    where=str(file),
                    expected=f"a whole {file.suffix} file",
                    found=str(error),
                    fix="copy it again",
                ) from error
            if empty and file in named:
                raise DataError(
                    "the file is empty",
                    where=str(file),
                    expected="text",
                    found="nothing",
                    fix="remove it from data.path",
                )
            left_out += [file] if empty else []
        if left_out:
            _log.warning("%d empty files are left out, the first is %s", len(left_out), left_out[0])

    def _text(self, stream: BinaryIO, file: Path) -> Iterator[Piece]:
        decoder = codecs.getincrementaldecoder("utf-8")("strict" if self.invalid_utf8 == "error" else self.invalid_utf8)
        held, line, offset = "", 1, 0
        while True:
            block = stream.read(BLOCK)
            if b"\0" in block and self.invalid_utf8 == "error":
                raise DataError(
                    "the file looks binary",
                    where=f"{file}:{line + block[: block.index(0)].count(10)}",
                    expected="text",
                    found=f"a zero byte at {offset + block.index(0)}",
                    fix="name a text file, or set data.invalid_utf8=replace",
                )
            try:
                held += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = error.object[: error.start]
                raise DataError(
                    "the file is no UTF-8",
                    where=f"{file}:{line + at.count(10)}",
                    expected="UTF-8 text",
                    found=f"byte 0x{error.object[error.start]:02x} near {offset + error.start}",
                    fix="convert the file, or set data.invalid_utf8=replace",
                ) from None
            if not block:
                if held:
                    yield Piece(held, last=True)
                return
            line, offset = line + block.count(10), offset + len(block)
            while len(held) > BLOCK:
                cut = _cut(held)
                yield Piece(held[:cut], last=False)
                held = held[cut:]

    def _lines(self, stream: BinaryIO, file: Path) -> Iterator[Piece]:
        number = 0
        while raw := stream.readline(self.max_line_bytes + 1):
            number += 1
            where = f"{file}:{number}"
            if len(raw) > self.max_line_bytes:
                raise DataError(
                    "the line is too long",
                    where=where,
                    expected=f"at most {self.max_line_bytes:,} bytes",
                    found="more",
                    fix="split the record, or raise data.max_line_bytes",
                )
            if not raw.strip():
                continue
            text = self._whole(self._record(raw, where), where)
            if not text:
                raise DataError(
                    "the record has no text",
                    where=where,
                    expected=f"text in {self.text_key!r}",
                    found="an empty string",
                    fix="remove the record",
                )
            while len(text) > BLOCK:
                cut = _cut(text)
                yield Piece(text[:cut], last=False)
                text = text[cut:]
            yield Piece(text, last=True)

    def _record(self, raw: bytes, where: str) -> str:
        try:
            record = json.loads(raw.decode("utf-8", "strict" if self.invalid_utf8 == "error" else self.invalid_utf8))
        except UnicodeDecodeError as error:
            raise DataError(
                "the line is no UTF-8",
                where=where,
                found=f"byte 0x{raw[error.start]:02x} at {error.start}",
                expected="UTF-8 text",
                fix="convert the file, or set data.invalid_utf8=replace",
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(
                "the line is no JSON",
                where=where,
                expected="one JSON object",
                found=str(error),
                fix="repair or remove the line",
            ) from None
        if not isinstance(record, dict) or not isinstance(record.get(self.text_key), str):
            names = list(record) if isinstance(record, dict) else []
            close = nearest(self.text_key, names) or next((n for n in names if isinstance(record[n], str)), None)
            raise DataError(
                "the record has no text",
                where=where,
                expected=f"a string in {self.text_key!r}",
                found=", ".join(names) or type(record).__name__,
                fix=f"set data.text_key={close}" if close else "remove the record",
            )
        return str(record[self.text_key])

    def _whole(self, text: str, where: str) -> str:
        """A text without halves of characters, which only an escape such as ``\\ud800`` can bring."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if self.invalid_utf8 == "error":
                raise DataError(
                    "a lone surrogate is not text",
                    where=where,
                    expected="whole characters",
                    found=f"{text[error.start]!a} at character {error.start}",
                    fix="repair the record, or set data.invalid_utf8=replace",
                ) from None
            return _HALF.sub("\ufffd" if self.invalid_utf8 == "replace" else "", text)
        return text


_READINGS = 64


@dataclass(frozen=True)
class BlendedText:
    """Texts of several sources in turns, so that each soon has, and keeps, the share of its weight in bytes (final).

    It ends when every source was read to its end; until then, one that ends begins again, but is read no more than
    64 times: a few lines of great weight would make a few pages as long as a library.

    Args:
        sources: the documents of each.
        weights: their shares, in any unit.

    Example:
        >>> import tempfile
        >>> paths = [Path(tempfile.mkdtemp()) / "a.txt" for _ in range(2)]
        >>> for path, text in zip(paths, ["one", "two"]):
        ...     _ = path.write_text(text)
        >>> [piece.text for piece in BlendedText([TextFiles([path]) for path in paths], [1, 2]).pieces()]
        ['one', 'two', 'two']
    """

    sources: Sequence[Pieces]
    weights: Sequence[float]

    def pieces(self) -> Iterator[Piece]:
        """All documents, piece by piece."""
        readers = {number: source.pieces() for number, source in enumerate(self.sources)}
        taken = [0] * len(self.sources)
        readings = [1] * len(self.sources)
        unread = set(readers)
        while unread:
            part = min(readers, key=lambda number: taken[number] / self.weights[number])
            piece = next(readers[part], None)
            if piece is not None:
                taken[part] += len(piece.text.encode())
                yield piece
            elif taken[part] and readings[part] < _READINGS:
                readers[part] = self.sources[part].pieces()
                readings[part] += 1
            else:
                del readers[part]  # there is nothing in it, or nothing new
            if piece is None:
                unread.discard(part)


def _seen(file: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _kind(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in _OPENERS else file.suffix


def _cut(text: str) -> int:
    """Where to cut a long text: after the last line end, else the last space, within a block."""
    for mark in ("\n", " "):
        at = text.rfind(mark, BLOCK // 2, BLOCK)
        if at >= 0:
            return at + (mark == "\n")  # a space belongs to the word that follows
    return BLOCK


def _neighbour(path: Path) -> str | None:
    names = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, names)
    return f"did you mean {path.parent / close}?" if close else "check data.path"
