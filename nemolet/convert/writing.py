"""From a model of ours to a Hugging Face folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemolet.config import build
from nemolet.convert.architecture import Architecture, find, fitting, named
from nemolet.convert.copies import with_copies
from nemolet.convert.fields import Config
from nemolet.convert.folder import (
    CONFIG,
    EXTRACTOR,
    GENERATION,
    INDEX,
    PREPROCESSOR,
    PROCESSOR,
    WEIGHTS,
    as_json,
    blank_of,
    described,
)
from nemolet.convert.generation import KEY as RULES
from nemolet.convert.mapping import Entry, Source, expand, own_tensors, theirs_from
from nemolet.convert.reading import vocabulary
from nemolet.convert.tokenizer_files import marker_ids, tokenizer_files
from nemolet.errors import ConversionError
from nemolet.language.language_model import LanguageModel
from nemolet.module import NeuralModule
from nemolet.tensor_files import Spec, shards, tensor_bytes
from nemolet.tokenizers import Tokenizer

SHARD = 5 << 30  # bytes, as save_pretrained has it


@dataclass(frozen=True)
class Held:
    """The tensors of a model in memory, as a source."""

    tensors: Mapping[str, Tensor]

    def get(self, name: str) -> Tensor:
        """One tensor."""
        return self.tensors[name]


def write(
    folder: str | Path,
    *,
    model: NeuralModule,
    tokenizer: Tokenizer | None = None,
    architecture: str | None = None,
    extra: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD,
) -> Path:
    """Write a model as a Hugging Face folder that ``from_pretrained`` reads.

    Args:
        folder: a new or empty one.
        model: of a class and config that some architecture can express.
        tokenizer: of the model; None for none. One of ours becomes a ``tokenizer.json`` (extra ``hf``).
        architecture: class or model type in transformers; None for the one it came from, or the first that fits.
        extra: small files it came with; a config that still says what the model is stays as it was.
        shard_bytes: largest file of weights.

    Raises:
        ConversionError: for a model that cannot be expressed, or a folder that is not empty.
        TokenizerError: for a tokenizer of which a ``tokenizer.json`` cannot say what it does.
    """
    own = own_tensors(model)
    source = Held(own)
    dtypes = {name: tensor.dtype for name, tensor in own.items()}
    return write_folder(
        Path(folder),
        config=model.config(),
        source=source,
        dtypes=dtypes,
        tokenizer=tokenizer,
        architecture=architecture,
        extra=extra or {},
        shard_bytes=shard_bytes,
    )


def write_folder(
    folder: Path,
    *,
    config: Config,
    source: Source,
    dtypes: Mapping[str, torch.dtype],
    tokenizer: Tokenizer | None,
    architecture: str | None,
    extra: Mapping[str, bytes],
    shard_bytes: int,
) -> Path:
    """The same from a config and tensors that are read one at a time."""
    original = described(extra) if CONFIG in extra else None
    chosen, theirs = _their_config(config, architecture, original)
    with torch.device("meta"):
        shape: NeuralModule = build(config, where="model")
    blank = blank_of(theirs)
    vocab = vocabulary(config)
    entries = with_copies(expand(chosen.rules, shape, vocab=vocab, blank=blank or 0), chosen)
    specs = _specs(entries, shape, dtypes)
    files = tokenizer_files(
        tokenizer,
        extra,
        blank=blank,
        vocab_size=vocab,
        model_type=chosen.model_type,
        continues=isinstance(shape, LanguageModel),
    )
    if theirs is not original:
        theirs = {**theirs, **marker_ids(tokenizer, theirs), "torch_dtype": _dtype_name(specs)}
        extractor, generation = theirs.pop(EXTRACTOR, None), theirs.pop(RULES, None)
        if generation is not None:
            marks = {key: token for key, token in marker_ids(tokenizer, generation).items() if token is not None}
            files[GENERATION] = as_json({**marks, **generation})
        files[CONFIG] = as_json(theirs)
        if extractor is not None and PROCESSOR not in extra:
            files[PREPROCESSOR] = as_json(extractor)
    with _whole_or_empty(folder):
        _write_weights(folder, specs, theirs_from(entries, source), shard_bytes)
        for name in sorted(files, key=lambda name: name == CONFIG):  # without which a folder is none
            (folder / name).parent.mkdir(exist_ok=True)  # chat templates with a name lie in a folder of their own
            _replace(folder / name, [files[name]])
    return folder


def _their_config(ours: Config, architecture: str | None, original: Config | None) -> tuple[Architecture, Config]:
    """The architecture, and its config: the one the model came with as long as that is still true."""
    if original is not None and architecture is None:
        came_from = find(original)
        again = came_from.read_config(original)
        if not came_from.compared(ours, again):
            return came_from, _of_class(original, came_from)
        if not came_from.lost(ours, original):
            return came_from, came_from.write_config(ours, original)
    chosen = fitting(ours) if architecture is None else named(architecture)
    return chosen, chosen.write_config(ours)


def _of_class(original: Config, architecture: Architecture) -> Config:
    """The config it came with, which names the class whose weights are written: another may have had another head."""
    named = original.get("architectures")
    return original if not named or architecture.name in named else {**original, "architectures": [architecture.name]}


def _specs(entries: Iterable[Entry], model: NeuralModule, dtypes: Mapping[str, torch.dtype]) -> dict[str, Spec]:
    own = own_tensors(model)
    specs: dict[str, Spec] = {}
    for entry in entries:
        empty = [torch.empty(own[name].shape, dtype=dtypes[name], device="meta") for name in entry.ours]
        specs |= {name: Spec(t.dtype, tuple(t.shape)) for name, t in entry.give(empty).items()}
    return specs


def _dtype_name(specs: Mapping[str, Spec]) -> str:
    sizes: dict[torch.dtype, int] = {}
    for spec in specs.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.bytes
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")


@contextmanager
def _whole_or_empty(folder: Path) -> Iterator[None]:
    """An empty folder for a while; where writing fails, nothing is left in it."""
    existed = folder.exists()
    if existed and (not folder.is_dir() or any(folder.iterdir())):
        raise ConversionError(
            "the folder is not empty",
            where=str(folder),
            expected="a new or empty folder",
            found="a file" if not folder.is_dir() else ", ".join(sorted(file.name for file in folder.iterdir())[:8]),
            fix="name a new folder: what is left of an older model would be read as part of this one",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(folder, error) from error
    try:
        yield
    except BaseException:
        for path in sorted(folder.rglob("*"), reverse=True):  # what lies in a folder before it
            path.rmdir() if path.is_dir() else path.unlink()
        if not existed:
            folder.rmdir()
        raise


def _not_written(path: Path, error: OSError) -> ConversionError:
    return ConversionError(
        "this cannot be written",
        where=str(path),
        expected="a place with enough space that may be written to",
        found=error.strerror or str(error),
        fix="free space, or name another folder",
    )


def _write_weights(
    folder: Path, specs: Mapping[str, Spec], tensors: Iterator[tuple[str, Tensor]], shard_bytes: int
) -> None:
    parts = shards(specs, shard_bytes)
    if len(parts) == 1:
        _replace(folder / WEIGHTS, tensor_bytes(parts[0], tensors))
        return
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for name, part in zip(names, parts):
        _replace(folder / name, tensor_bytes(part, _first(tensors, len(part))))
    index = {
        "metadata": {"total_size": sum(spec.bytes for spec in specs.values())},
        "weight_map": {tensor: name for name, part in zip(names, parts) for tensor in part},
    }
    _replace(folder / INDEX, [as_json(index)])


def _first(tensors: Iterator[tuple[str, Tensor]], count: int) -> Iterator[tuple[str, Tensor]]:
    """The next few; the rest stays in the iterator."""
    for _ in range(count):
        yield next(tensors)


def _replace(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """The file appears under its name only when it is complete."""
    partial = path.with_name(f".{path.name}.partial{os.getpid()}")
    try:
        with partial.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        partial.unlink(missing_ok=True)
