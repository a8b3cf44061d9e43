"""Tensors in files, one at a time: safetensors files, whole or within another file, and shards of them.

The format is a length, a header of JSON and the bytes; it is read here without mapping or loading the file, so that
a truncated one is refused by its header, and a member of an archive can be read where it lies.
"""

from __future__ import annotations

import json
import math
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


@dataclass(frozen=True)
class Spec:
    """Type and shape of a tensor that is not read yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file whose tensors are read when they are asked for (final).

    Args:
        path: the file.
        start: where in it the safetensors begin.
        size: how many bytes they have; None for up to the end.

    Raises:
        ConversionError: for a file that is none, is truncated, or holds an unknown type.
    """

    def __init__(self, path: Path, *, start: int = 0, size: int | None = None) -> None:
        self.path = path
        whole = path.stat().st_size - start if size is None else size
        with path.open("rb") as file:
            file.seek(start)
            length = int.from_bytes(file.read(8), "little")
            if whole < 8 or not 2 <= length <= min(_LONGEST_HEADER, whole - 8):
                raise self._error("this is no safetensors file, or it is cut short", f"{whole} bytes")
            try:
                header = json.loads(file.read(length))
                self.metadata = header.pop("__metadata__", None) or {}
                places = {name: self._place(name, entry) for name, entry in header.items()}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise self._error("the header of this safetensors file cannot be read", repr(error)[:200]) from error
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
        spec = Spec(DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])))
        begin, end = entry["data_offsets"]
        if end - begin != spec.bytes or begin < 0 or any(size < 0 for size in spec.shape):
            raise self._error(f"{name} has other bytes than its shape says", f"{end - begin} bytes", spec.bytes)
        return spec, int(begin)

    def _error(self, what: str, found: object, expected: object = None) -> ConversionError:
        fix = "download or copy the file again"
        return ConversionError(what, where=str(self.path), expected=expected, found=found, fix=fix)

    def get(self, name: str) -> Tensor:
        """Read one tensor."""
        spec = self.specs[name]
        if not spec.bytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        with self.path.open("rb") as file:
            file.seek(self._starts[name])
            content = bytearray(spec.bytes)
            if file.readinto(content) != spec.bytes:
                raise self._error("the file is cut short", f"{name} ends early")
        return torch.frombuffer(content, dtype=spec.dtype).reshape(spec.shape)


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
                    "two files hold the same tensor", where=str(file.path), found=", ".join(twice[:8])
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
        except Exception as error:
            raise ConversionError(
                "these pickled weights cannot be read", where=str(path), found=str(error)[:200]
            ) from error

    def get(self, name: str) -> Tensor:
        """One tensor."""
        tensor: Tensor = self._tensors[name]
        return tensor


def header_bytes(specs: Mapping[str, Spec]) -> bytes:
    """Length and header of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, spec in specs.items():
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
