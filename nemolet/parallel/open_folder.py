"""A folder of files that are read one after another, and are all those that were there when it was opened."""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class OpenFolder:
    """A folder that stays open, whatever its name stands for since (final).

    Its files are opened when they are read. One that is another by then, or was written to, is refused.

    Args:
        path: of the folder.

    Raises:
        OSError: for what is no folder.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "f"
        >>> path.mkdir(), (path / "a").write_text("1")
        (None, 1)
        >>> folder = OpenFolder(path)
        >>> folder.size("a"), folder.size("b")
        (1, None)
        >>> path = path.rename(path.with_name("g"))
        >>> folder.read("a")
        b'1'
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._number)
        self._seen: dict[str, tuple[int, int, int]] = {}

    def size(self, name: str) -> int | None:
        """How many bytes a file of this folder has; None where there is no such file."""
        try:
            found = os.stat(name, dir_fd=self._number) if "/" not in name else None
        except OSError:
            return None
        if found is None or not stat.S_ISREG(found.st_mode):
            return None
        return self._same(name, found)

    def read(self, name: str) -> bytes:
        """All of a file."""
        with self.open(name) as file:
            return file.read()

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A file, to be read.

        Raises:
            OSError: for a file that is not there, is another one than when it was first seen, or was written to since.
        """
        if self.size(name) is None:
            raise FileNotFoundError(f"{name} is missing")
        with open(name, "rb", opener=lambda path, flags: os.open(path, flags, dir_fd=self._number)) as file:
            self._same(name, os.fstat(file.fileno()))
            yield file
            self._same(name, os.fstat(file.fileno()))

    def _same(self, name: str, found: os.stat_result) -> int:
        state = (found.st_ino, found.st_size, found.st_mtime_ns)
        if self._seen.setdefault(name, state) != state:
            raise OSError(f"{name} was changed while the folder was read")
        return found.st_size
