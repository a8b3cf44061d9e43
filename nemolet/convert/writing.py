"""From a model of ours to a Hugging Face folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemolet.config import build
from nemolet.convert.architecture import Architecture, find, fitting, named
from nemolet.convert.fields import Config, first_difference, settled
from nemolet.convert.folder import CONFIG, INDEX, WEIGHTS, parse
from nemolet.convert.mapping import Entry, Source, expand, own_tensors, theirs_from
from nemolet.convert.reading import vocabulary
from nemolet.errors import ConversionError
from nemolet.module import NeuralModule
from nemolet.tensor_files import Spec, shards, tensor_bytes
from nemolet.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

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
        tokenizer: a ``tokenizer.json`` or SentencePiece one; None for none.
        architecture: class or model type in transformers; None for the one it came from, or the first that fits.
        extra: small files it came with; a config that still says what the model is stays as it was.
        shard_bytes: largest file of weights.

    Raises:
        ConversionError: for a model that cannot be expressed, or a folder that is not empty.
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
    original = parse(extra[CONFIG], CONFIG) if CONFIG in extra else None
    chosen, theirs = _their_config(config, architecture, original)
    with torch.device("meta"):
        shape: NeuralModule = build(config, where="model")
    entries = expand(chosen.rules, shape, vocab=vocabulary(config))
    specs = _specs(entries, shape, dtypes)
    files = {**extra, **_tokenizer_files(tokenizer, extra)}
    if theirs is not original:
        theirs = {**theirs, **_marker_ids(tokenizer, theirs), "torch_dtype": _dtype_name(specs)}
        files[CONFIG] = json.dumps(theirs, indent=2, sort_keys=True).encode() + b"\n"
    _check_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, specs, theirs_from(entries, source), shard_bytes)
    for name, content in files.items():
        _replace(folder / name, [content])
    return folder


def _their_config(ours: Config, architecture: str | None, original: Config | None) -> tuple[Architecture, Config]:
    """The architecture, and its config: the one the model came with as long as that is still true."""
    if original is not None and architecture is None:
        came_from = find(original)
        again = came_from.read_config(original)
        if first_difference(settled(ours), settled(again)) is None:
            return came_from, original
        if came_from.difference(ours) is None:
            return came_from, {**original, **came_from.write_config(ours)}
    chosen = fitting(ours) if architecture is None else named(architecture)
    return chosen, chosen.write_config(ours)


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


_PADS = ("<pad>", "[PAD]", "<|padding|>")


def _marker_ids(tokenizer: Tokenizer | None, theirs: Mapping[str, Any]) -> dict[str, int | None]:
    """Ids of special tokens where their config does not say them yet: theirs may lie outside this vocabulary."""
    special = {} if tokenizer is None else tokenizer.special_tokens
    ids = {
        "bos_token_id": None if tokenizer is None else tokenizer.bos_id,
        "eos_token_id": None if tokenizer is None else tokenizer.eos_id,
        "pad_token_id": next((special[text] for text in _PADS if text in special), None),
    }
    return {key: value for key, value in ids.items() if key not in theirs}


def _tokenizer_files(tokenizer: Tokenizer | None, extra: Mapping[str, bytes]) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        files = tokenizer.files()
        if "tokenizer_config.json" not in extra:
            ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
            names = {index: text for text, index in tokenizer.special_tokens.items()}
            settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
            settings |= {key: names[index] for key, index in ids.items() if index is not None}
            files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode() + b"\n"
        return files
    if isinstance(tokenizer, SentencePieceTokenizer):
        return {"tokenizer.model": tokenizer.model}
    raise ConversionError(
        "this kind of tokenizer has no counterpart in Hugging Face",
        where="tokenizer",
        expected="huggingface or sentencepiece",
        found=tokenizer.kind,
        fix="leave it out (tokenizer=null), and keep the .nemolet file for it",
    )


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConversionError(
            "the folder is not empty",
            where=str(folder),
            fix="name a new folder: what is left of an older model would be read as part of this one",
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
    _replace(folder / INDEX, [json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"])


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
        raise ConversionError(
            "the file cannot be written", where=str(path), found=error.strerror, fix="free space, or choose a folder"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
