"""Training states as folders of which every rank writes its part, and which any layout can read.

A folder holds shards in the format of ``torch.distributed.checkpoint``, ``state.pt`` with what is the same on all
ranks, and ``files.json`` with the size of each file. It appears under its name only when it is complete.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from nemolet.errors import TrainingError
from nemolet.parallel.open_folder import OpenFolder

STATE, FILES, INDEX = "state.pt", "files.json", ".metadata"
_INDEX = {  # the classes of an index of shards, by module
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath", "Path"},
    "pathlib._local": {"PosixPath", "WindowsPath", "Path"},
}


class ShardWriter:
    """Writes folders; each appears under its name only when every rank has written its part (final).

    All ranks call it together.

    Args:
        background: copy the state to the memory of the host and write the copy while training goes on.
        done: called on the first rank with the path of each complete folder.
    """

    def __init__(self, *, background: bool = False, done: Callable[[Path], None] | None = None) -> None:
        self.background, self.done = background, done
        self._group: dist.ProcessGroup | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def write(self, path: Path, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Write a folder, or start to.

        Args:
            path: of the folder.
            tensors: of this rank, whole or in parts.
            rest: what else there is; that of the first rank is kept.
        """
        self.wait()
        content = io.BytesIO()
        torch.save(dict(rest), content)
        partial = path.with_name(f".{path.name}.partial")
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, exist_ok=True)  # another rank may have been faster
        options: dict[str, Any] = {
            "storage_writer": FileSystemWriter(partial, overwrite=True),
            "process_group": self._exchange(),
            "no_dist": not dist.is_initialized(),
        }

        def finish() -> None:
            if is_first():
                _complete(partial, path, content.getvalue())
                if self.done is not None:
                    self.done(path)

        with _refused(path, "the checkpoint cannot be written"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not self.background:
                save(dict(tensors), **options)
                finish()
                return
            copies = async_save(_copied(tensors), **options)
        assert isinstance(copies, Future)
        self._pool = self._pool or ThreadPoolExecutor(1, "checkpoint")

        def follow() -> None:
            with _refused(path, "the checkpoint cannot be written"):
                copies.result()
                finish()

        self._writing = self._pool.submit(follow)

    def wait(self) -> None:
        """Until the last folder is on the disk; raises what went wrong there."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Finish writing."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _exchange(self) -> dist.ProcessGroup | None:
        """Ranks agree on the files through the memory of hosts, apart from what training sends."""
        if self._group is None and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        return self._group


def is_first() -> bool:
    """Whether this is the first rank, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that training no longer changes. What lies on another device is copied when it is staged."""
    return {
        name: tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach()
        for name, tensor in tensors.items()
    }


def _complete(partial: Path, path: Path, state: bytes) -> None:
    """Add what is not in the shards, and give the folder its name."""
    _write_bytes(partial / STATE, state)
    sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    _write_bytes(partial / FILES, json.dumps(sizes, indent=1).encode())
    old = path.with_name(f".{path.name}.old")
    if path.exists():  # saved twice at one step; what a callback learned in between is in the second
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _write_bytes(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class _refused:
    """Turns what storage raises into an error that names the folder."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, (OSError, RuntimeError, ValueError, KeyError, EOFError, CheckpointException)):
            return
        if isinstance(error, CheckpointException):
            rank, (inner, _) = next(iter(error.failures.items()))
            found = f"rank {rank}: {type(inner).__name__}: {inner}"
        else:
            found = f"{type(error).__name__}: {error}"
        raise TrainingError(
            self.what,
            where=str(self.path),
            found=found[:500],
            fix="the checkpoint before it is whole; the same command goes on from there",
        ) from error


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A whole tensor in a folder, however it is cut into shards."""

    shape: torch.Size
    dtype: torch.dtype


class _Unpickler(pickle.Unpickler):
    """Reads the index of the shards, and no other kind of object."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _INDEX.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"an index of shards does not hold {module}.{name}")


class _Inside(FileSystem):
    """Files of one open folder."""

    def __init__(self, folder: OpenFolder) -> None:
        self.folder = folder

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        with self.folder.open(Path(path).name) as file:
            yield file


class _Reader(FileSystemReader):
    def __init__(self, folder: OpenFolder) -> None:
        super().__init__(folder.path)
        self.fs = _Inside(folder)
        index = _Unpickler(io.BytesIO(folder.read(INDEX))).load()
        assert isinstance(index, Metadata)
        self._index: Metadata = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class ShardReader:
    """Reads a folder, whatever layout wrote it (final).

    The folder stays open: all that is read is of the one that was checked, also where another one has its name by then.

    Args:
        path: of the folder.

    Raises:
        TrainingError: for a folder in which a file is missing or cut off, naming it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = _checked(path)
        with _refused(path, "the checkpoint cannot be read"):
            try:
                self._reader = _Reader(self._folder)
                stored = self._reader.read_metadata().state_dict_metadata
            except (pickle.UnpicklingError, AttributeError, AssertionError, ImportError) as error:
                raise ValueError(f"the index of shards: {error}") from error
        self.entries: dict[str, Entry] = {
            name: Entry(entry.size, entry.properties.dtype)
            for name, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def rest(self) -> dict[str, Any]:
        """What is not in the shards; nothing in it is executed."""
        with _refused(self.path, "the checkpoint cannot be read"):
            content = io.BytesIO(self._folder.read(STATE))
            return torch.load(content, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors, whole or in parts, with what the folder holds under their names.

        Raises:
            TrainingError: for a tensor that is not there or has another shape.
        """
        compare(self.path, self.entries, tensors)
        with _refused(self.path, "the checkpoint cannot be read"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(dict(tensors), storage_reader=self._reader, no_dist=True)

    def one(self, name: str) -> Tensor:
        """A single whole tensor."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self.read({name: tensor})
        return tensor

    def names(self, prefix: str) -> Iterator[str]:
        """What the folder holds under a prefix, without it."""
        return (name.removeprefix(prefix) for name in self.entries if name.startswith(prefix))


def compare(
    path: Path, entries: Mapping[str, Entry], tensors: Mapping[str, Tensor], *, prefix: str | None = None
) -> None:
    """See that a checkpoint holds these tensors; with a prefix, that it holds no others under it.

    Raises:
        TrainingError: listing what differs.
    """
    entries = {k: e for k, e in entries.items() if prefix is None or k.startswith(prefix)}
    differences = [f"{name} is missing" for name in tensors if name not in entries]
    differences += [
        f"{name}: {tuple(entries[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in entries and entries[name].shape != tensor.shape
    ]
    if prefix is not None:
        differences += [f"{name} is unknown to the model" for name in entries if name not in tensors]
    if differences:
        more = [f"and {len(differences) - 8} more"] if len(differences) > 8 else []
        raise TrainingError(
            "the checkpoint is of another model",
            where=str(path),
            expected="the tensors of this model",
            found="\n".join([*differences[:8], *more]),
            fix="choose the model that wrote it, or train under another name",
        )


def _checked(path: Path) -> OpenFolder:
    """A folder in which every file has the size that it was written with."""

    def refuse(what: str, found: object) -> TrainingError:
        fix = f"point {path.parent / 'last'} to an older one, or train under another name"
        return TrainingError(what, where=str(path), found=found, expected="a complete folder", fix=fix)

    try:
        folder = OpenFolder(path)
        sizes: dict[str, int] = json.loads(folder.read(FILES))
    except (OSError, ValueError) as error:
        raise refuse("this is no complete checkpoint", f"{FILES}: {error}") from error
    for name, size in sizes.items():
        found = folder.size(name)
        if found is None:
            raise refuse("a shard of the checkpoint is missing", name)
        if found != size:
            raise refuse("a shard of the checkpoint is cut off", f"{name}: {found} of {size} bytes")
    return folder


def remove_remains(folder: Path) -> None:
    """Delete what a killed process left half-written, and undo a half-done exchange of two folders."""
    for old in folder.glob(".*.old"):
        whole = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if not whole.exists():
            old.rename(whole)
    for path in [*folder.glob(".*.partial"), *folder.glob(".*.link"), *folder.glob(".*.old")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
