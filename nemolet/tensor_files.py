"""Tensors in files, one at a time: safetensors files, whole or within another file, and shards of them.

The format is a length, a header of JSON and the bytes; it is read here without mapping or loading the file, so that
a truncated one is refused by its header, and a member of an archive can be read where it lies.
"""

from __future__ import annotations

import json
import math
import os
import stat
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemolet.errors import ConversionError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100 << 20  # as in the safetensors library
_MOST_DIMS = 64  # as in torch


@dataclass(frozen=True)
class Spec:
    """Type and shape of a tensor that is not read yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


class OpenFile:
    """A file that stays open, so that what was checked is what is read, whatever its name stands for since (final).

    It may be read from several threads. It is closed when nothing refers to it any more.

    Args:
        path: of the file.

    Raises:
        OSError: for what cannot be read, or is no regular file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "f"
        >>> path.write_bytes(b"abcdef")
        6
        >>> file = OpenFile(path)
        >>> path.unlink()
        >>> file.read(2, 3)
        b'cde'
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe is not waited for
        weakref.finalize(self, os.close, self._number)
        self._state = os.fstat(self._number)
        if not stat.S_ISREG(self._state.st_mode):
            raise OSError(f"this is no regular file: {path}")
        self.size = self._state.st_size

    def read(self, start: int, size: int) -> bytes:
        """Bytes from a place on; fewer where the file ends."""
        content = bytearray(max(0, min(size, self.size - start)))
        return bytes(memoryview(content)[: self.read_into(start, content)])

    def read_into(self, start: int, buffer: bytearray) -> int:
        """Fill a buffer; returns how much there was.

        Raises:
            OSError: for a file that was written to since it was opened.
        """
        view, done = memoryview(buffer), 0
        while done < len(view) and (count := os.preadv(self._number, [view[done:]], start + done)):
            done += count
        now, then = os.fstat(self._number), self._state
        if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise OSError("it was written to while it was read")
        return done


class TensorFile:
    """A safetensors file whose tensors are read when they are asked for (final).

    Args:
        source: the file, or its path.
        start: where in it the safetensors begin.
        size: how many bytes they have; None for up to the end.
        longest_header: in bytes; a header takes a multiple of that in memory.

    Raises:
        ConversionError: for a file that is none, is truncated, or holds an unknown type.
    """

    def __init__(
        self, source: Path | OpenFile, *, start: int = 0, size: int | None = None, longest_header: int = _LONGEST_HEADER
    ) -> None:
        self.path = source.path if isinstance(source, OpenFile) else source
        try:
            self._file = source if isinstance(source, OpenFile) else OpenFile(source)
            whole = self._file.size - start if size is None else size
            length = int.from_bytes(self._file.read(start, 8), "little")
            if whole < 8 or not 2 <= length <= min(longest_header, whole - 8):
                expected = "a length, a header and the numbers that it announces"
                raise self._error("this is no safetensors file, or it is cut short", f"{whole} bytes", expected)
            header = parse_json(self._file.read(start + 8, length))
            header.pop("__metadata__", None)
            places = {name: self._place(name, entry) for name, entry in header.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what, expected = "the header of this safetensors file cannot be read", "a JSON object of types and places"
            raise self._error(what, repr(error)[:200], expected) from error
        self.specs = {name: spec for name, (spec, _) in places.items()}
        self._starts = {name: start + 8 + length + begin for name, (_, begin) in places.items()}
        end = 0
        for spec, begin in sorted(places.values(), key=lambda place: (place[1], place[0].bytes)):
            if begin != end:
                raise self._error("tensors overlap, or something hides between them", f"at byte {begin}", end)
            end += spec.bytes
        if end != whole - 8 - length:
            raise self._error("the file is cut short, or something follows", f"{whole} bytes", 8 + length + end)

    def _place(self, name: str, entry: Mapping[str, Any]) -> tuple[Spec, int]:
        if entry["dtype"] not in DTYPES:
            raise self._error(f"{name} has an unknown type", entry["dtype"], ", ".join(DTYPES))
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(shape, list) or len(shape) > _MOST_DIMS or not all(_is_size(number) for number in numbers):
            raise self._error(f"{name} has a place or a shape that no tensor has", str(entry)[:200])
        spec = Spec(DTYPES[entry["dtype"]], tuple(shape))
        if end - begin != spec.bytes:
            raise self._error(f"{name} has other bytes than its shape says", f"{end - begin} bytes", spec.bytes)
        return spec, begin

    def _error(self, what: str, found: object, expected: object = None) -> ConversionError:
        fix = "download or copy the file again"
        return ConversionError(what, where=str(self.path), expected=expected, found=found, fix=fix)

    def get(self, name: str) -> Tensor:
        """Read one tensor."""
        spec = self.specs[name]
        if not spec.bytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        content = bytearray(spec.bytes)
        try:
            whole = self._file.read_into(self._starts[name], content) == spec.bytes
        except OSError as error:
            raise self._error("this tensor cannot be read", f"{name}: {error}") from error
        if not whole:
            raise self._error("the file is cut short", f"{name} ends early")
        return torch.frombuffer(content, dtype=spec.dtype).reshape(spec.shape)


def _is_size(number: object) -> bool:
    return type(number) is int and 0 <= number < 1 << 63


class Shards:
    """The tensors of several sources as one (final).

    Raises:
        ConversionError: for a name in two of them.
    """

    def __init__(self, files: Iterable[TensorFile | PickledFile]) -> None:
        self._home: dict[str, TensorFile | PickledFile] = {}
        for file in files:
            twice = sorted(self._home.keys() & file.specs.keys())
            if twice:
                raise ConversionError(
                    "two files hold the same tensor",
                    where=str(file.path),
                    expected=f"each tensor in one file; these are in {self._home[twice[0]].path.name} too",
                    found=", ".join(twice[:8]),
                    fix="remove the file that does not belong here, or download the folder again",
                )
            self._home |= dict.fromkeys(file.specs, file)
        self.specs = {name: file.specs[name] for name, file in self._home.items()}

    def get(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._home[name].get(name)


class PickledFile:
    """A file of ``torch.save``, read only when a caller asked for pickles, and then tensors only (final)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self.specs = {name: Spec(t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}
        except Exception as error:  # a broken pickle raises anything; kept as the cause
            raise ConversionError(
                "these pickled weights cannot be read", where=str(path), found=str(error)[:200]
            ) from error

    def get(self, name: str) -> Tensor:
        """One tensor."""
        tensor: Tensor = self._tensors[name]
        return tensor


def parse_json(content: bytes) -> Any:
    """JSON that means one thing: no name twice, and no numbers that JSON does not have.

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_json(b'{"a": [1, null]}')
        {'a': [1, None]}
        >>> parse_json(b'{"a": 1, "a": 2}')
        Traceback (most recent call last):
            ...
        ValueError: 'a' comes twice
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        known: dict[str, Any] = {}
        for name, value in pairs:
            if name in known:
                raise ValueError(f"{name[:100]!r} comes twice")
            known[name] = value
        return known

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no number of JSON")

    return json.loads(content, object_pairs_hook=once, parse_constant=refuse)


def header_bytes(specs: Mapping[str, Spec]) -> bytes:
    """Length and header of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, spec in specs.items():
        if spec.dtype not in _NAMES:
            raise ConversionError(
                "safetensors files have no such type",
                where=name,
                expected=", ".join(str(dtype) for dtype in _NAMES),
                found=str(spec.dtype),
                fix="keep it as numbers of one of these",
            )
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at := at + spec.bytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[memoryview | bytes]:
    """The bytes of a safetensors file, a tensor at a time.

    Args:
        specs: what will come, in its order.
        tensors: what comes.

    Raises:
        ConversionError: where that differs.
    """
    yield header_bytes(specs)
    expected = iter(specs.items())
    for name, tensor in tensors:
        known, spec = next(expected, ("nothing", None))
        if known != name or spec != Spec(tensor.dtype, tuple(tensor.shape)):
            raise ConversionError(
                "a tensor differs from what was announced",
                where=name,
                expected=f"{known} {spec}",
                found=f"{tensor.dtype} {tuple(tensor.shape)}",
            )
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data
    if (missing := next(expected, None)) is not None:
        raise ConversionError("a tensor that was announced did not come", where=missing[0], expected=str(missing[1]))


def shards(specs: Mapping[str, Spec], most: int) -> list[dict[str, Spec]]:
    """Cut into files of at most ``most`` bytes; a larger tensor has one of its own."""
    parts: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if parts[-1] and size + spec.bytes > most:
            parts.append({})
            size = 0
        parts[-1][name] = spec
        size += spec.bytes
    return parts
