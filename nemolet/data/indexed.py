"""Token files in the layout of Megatron-LM: a ``.bin`` of ids and an ``.idx`` that says where documents begin.

The index holds the length and the place of each sequence, and the number of the first sequence of each document.
"""

from __future__ import annotations

import array
import contextlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from nemolet.errors import DataError

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_HEADER = struct.Struct("<9sQBQQ")
LONGEST = (1 << 31) - 1  # ids in a sequence


def prefix_of(path: str | Path) -> Path:
    """The path without ``.bin`` or ``.idx``."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def _file(prefix: Path, suffix: str) -> Path:
    """One of the two files; a prefix may hold dots of its own."""
    return prefix.with_name(prefix.name + suffix)


class IndexedTokens:
    """Documents of token ids, memory-mapped (final).

    Args:
        path: the common prefix of the two files, or one of them.

    Attributes:
        tokens: all ids, one document after the other.
        lengths: ids per document.

    Raises:
        DataError: for a file that is missing, truncated, or of another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.prefix = prefix_of(path)
        index, data = _file(self.prefix, ".idx"), _file(self.prefix, ".bin")
        for file in (index, data):
            if not file.is_file():
                raise DataError(
                    "the token file is missing",
                    where=str(file),
                    expected="a .bin and an .idx side by side",
                    fix="make them with `nemolet tokenize`",
                )
        size = index.stat().st_size
        with index.open("rb") as opened:
            content = opened.read(_HEADER.size)
        if len(content) < _HEADER.size:
            raise DataError(
                "the index is truncated",
                where=str(index),
                expected=f"at least {_HEADER.size} bytes",
                found=len(content),
                fix="tokenise again",
            )
        magic, version, code, sequences, marks = _HEADER.unpack_from(content)
        if magic != MAGIC or version != VERSION or code not in _DTYPES:
            raise DataError(
                "this is no token index",
                where=str(index),
                expected=f"the header of version {VERSION}",
                found=f"{content[:9]!r}, version {version}, type {code}",
                fix="tokenise again",
            )
        expected = _HEADER.size + 12 * sequences + 8 * marks  # a mode for each sequence may follow
        if size < expected:
            raise DataError(
                "the index is truncated",
                where=str(index),
                expected=f"{expected} bytes for {sequences} sequences",
                found=f"{size} bytes",
                fix="tokenise again",
            )
        self.dtype = np.dtype(_DTYPES[code])
        self.lengths: NDArray[np.int64] = _documents(index, sequences, marks, self.dtype.itemsize)
        total = int(self.lengths.sum())
        if data.stat().st_size != total * self.dtype.itemsize:
            raise DataError(
                "the tokens do not match their index",
                where=str(data),
                found=f"{data.stat().st_size} bytes",
                expected=f"{total * self.dtype.itemsize} bytes for {total} tokens",
                fix="tokenise again",
            )
        if not total:
            raise DataError("there are no tokens", where=str(data), fix="tokenise a text that is not empty")
        self.tokens: NDArray[np.generic] = np.memmap(data, self.dtype, "r").view(
            np.ndarray
        )  # slices of which are cheap

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each document begins."""
        return np.concatenate(([0], np.cumsum(self.lengths)[:-1]))

    def document(self, index: int) -> NDArray[np.generic]:
        """The ids of one document."""
        start = int(self.lengths[:index].sum())
        return self.tokens[start : start + int(self.lengths[index])]


def _documents(index: Path, sequences: int, marks: int, itemsize: int) -> NDArray[np.int64]:
    """The lengths of documents, each of which is one sequence or several.

    Raises:
        DataError: for sequences that do not lie one after the other, or documents that are not made of all of them.
    """
    with index.open("rb") as file:
        file.seek(_HEADER.size)
        lengths = np.fromfile(file, "<i4", sequences).astype(np.int64)
        places = np.fromfile(file, "<i8", sequences)
        firsts = np.fromfile(file, "<i8", marks)
    ends = np.concatenate(([0], np.cumsum(lengths)))
    if not np.array_equal(places, ends[:-1] * itemsize) or (lengths < 0).any():
        raise DataError(
            "the sequences do not lie one after the other",
            where=str(index),
            expected="each where the one before it ends",
            found="gaps or overlaps",
            fix="tokenise again",
        )
    if not marks or firsts[0] != 0 or firsts[-1] != sequences or (np.diff(firsts) < 0).any():
        raise DataError(
            "the documents are not made of the sequences",
            where=str(index),
            expected=f"numbers of sequences that rise from 0 to {sequences}",
            found=np.array2string(firsts, threshold=6),
            fix="tokenise again",
        )
    return np.diff(ends[firsts])


class IndexedWriter:
    """Writes a pair of token files; both appear only when they are complete (final).

    A document is one sequence, or several where it is longer than the index can say of one.

    Args:
        path: the common prefix.
        vocab_size: decides between 16 and 32 bits per id.

    Example:
        >>> import tempfile
        >>> prefix = Path(tempfile.mkdtemp()) / "tokens"
        >>> with IndexedWriter(prefix, vocab_size=300) as writer:
        ...     writer.write(np.array([1, 2, 3]), ends=[3])
        >>> IndexedTokens(prefix).document(0).tolist()
        [1, 2, 3]
    """

    def __init__(self, path: str | Path, *, vocab_size: int) -> None:
        self.prefix = prefix_of(path)
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
        self.lengths = array.array("i")  # of sequences; four bytes each, whatever the length of the text
        self.firsts = array.array("q", [0])  # the number of the first sequence of each document, and of the next one
        self.open_length = 0
        self._partial = {
            s: self.prefix.with_name(f".{self.prefix.name}{s}.partial{os.getpid()}") for s in (".bin", ".idx")
        }
        self._file: BinaryIO = self._partial[".bin"].open("wb")

    def __enter__(self) -> IndexedWriter:
        return self

    def write(self, tokens: NDArray[np.generic], ends: Iterable[int]) -> None:
        """Append ids.

        Args:
            tokens: the ids.
            ends: how many of them lie before the end of each document that ends among them.
        """
        try:
            self._file.write(tokens.astype(self.dtype, copy=False).tobytes())
        except OSError as error:
            raise _unwritable(self.prefix, error) from error
        before = 0
        for end in ends:
            self.open_length, before = self.open_length + end - before, end
            self._end_document()
        self.open_length += len(tokens) - before

    def _end_document(self) -> None:
        whole, rest = divmod(self.open_length, LONGEST)
        self.lengths.extend([LONGEST] * whole + ([rest] if rest or not whole else []))
        self.firsts.append(len(self.lengths))
        self.open_length = 0

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as error:
            raise _unwritable(self.prefix, error) from error
        finally:
            self._close()
            for partial in self._partial.values():
                partial.unlink(missing_ok=True)

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # the buffer could not be written; whoever raised first has said so
            self._file.close()

    def _finish(self) -> None:
        if self.open_length:
            self._end_document()
        self._file.flush()
        os.fsync(self._file.fileno())
        lengths = np.frombuffer(self.lengths, np.intc).astype("<i4") if len(self.lengths) else np.zeros(0, "<i4")
        pointers = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)[:-1])) * self.dtype.itemsize
        code = next(code for code, dtype in _DTYPES.items() if np.dtype(dtype) == self.dtype)
        with self._partial[".idx"].open("wb") as file:
            file.write(_HEADER.pack(MAGIC, VERSION, code, len(lengths), len(self.firsts)))
            file.write(lengths.tobytes())
            file.write(pointers[: len(lengths)].astype("<i8").tobytes())
            file.write(np.frombuffer(self.firsts, np.int64).astype("<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        for suffix in (".bin", ".idx"):  # the index last: while it is missing, there is no pair
            self._partial[suffix].replace(_file(self.prefix, suffix))


def _unwritable(prefix: Path, error: OSError) -> DataError:
    return DataError(
        "the tokens cannot be written",
        where=str(prefix),
        found=error.strerror or str(error),
        fix="free space or choose another folder; nothing half-written was left",
    )
