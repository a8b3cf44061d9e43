"""The text that every Python carries, so that a first model needs no download."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemolet.data.sources import Piece


@dataclass(frozen=True)
class EmbeddedText:
    """Python's language reference and the source of its standard library (final).

    Args:
        parts: which of ``"reference"`` (English, half a million characters) and ``"library"`` (Python source).
        max_bytes: how much of each part.

    Example:
        >>> next(EmbeddedText().pieces()).last
        True
    """

    parts: tuple[str, ...] = ("reference", "library")
    max_bytes: int = 4_000_000

    def pieces(self) -> Iterator[Piece]:
        """All documents."""
        for part in self.parts:
            taken = 0
            for text in _reference() if part == "reference" else _library():
                taken += len(text.encode())
                if taken > self.max_bytes:
                    break
                yield Piece(text, last=True)

    def total_bytes(self) -> int:
        """Size of the text, for progress bars."""
        return sum(len(piece.text.encode()) for piece in self.pieces())


def _reference() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].strip() + "\n"


def _library() -> Iterator[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(folder.glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace").strip()
        if len(text) > 200:
            yield text + "\n"
