"""A Hugging Face folder: which files it has, and reading them without trust."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemolet.errors import ConversionError, needs
from nemolet.tensor_files import PickledFile, Shards, TensorFile

CONFIG, GENERATION, WEIGHTS, INDEX = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
EXTRACTOR = "feature_extractor"  # its settings, beside those of the model in what :func:`described` gives
# Small files that say how a model is used; they are carried along unchanged.
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "source.spm",  # Marian's, whose ids are those of vocab.json
    "target.spm",
    "sentencepiece.bpe.model",  # XLM-R's, whose ids are shifted
)
CARRIED = (CONFIG, GENERATION, "chat_template.jinja", "chat_template.json", PREPROCESSOR, PROCESSOR, *TOKENIZER_FILES)
TEMPLATES = "additional_chat_templates"  # a folder of those that have a name
SENTENCEPIECE = ("tokenizer.model", "spiece.model")  # whose ids are those of the file
_OURS = ("sentencepiece.model", "characters.json", "words.json")  # beside the tokenizer.json of one of our tokenizers
_LARGEST_TEXT = 64 << 20
_OBJECT, _AGAIN = "a JSON object, {...}", "download or copy the folder again"
_SHARD = re.compile(r"[\w.-]*\w[\w.-]*")  # a name in the folder, and never another place
_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class Folder:
    """What lies in a folder.

    Args:
        path: of it.
        config: the content of ``config.json``.
        weights: its tensors, not read yet.
        carried: the small files, by name.
    """

    path: Path
    config: dict[str, Any]
    weights: Shards
    carried: Mapping[str, bytes]


def located(name: str | Path) -> Path:
    """A folder on this machine; ``hf://owner/name@revision`` is fetched from the Hub.

    Raises:
        ConversionError: where it is not to be had.
    """
    match = _HUB.fullmatch(str(name))
    if match is None:
        return Path(name)
    with needs("huggingface_hub", extra="hf"):
        from huggingface_hub import snapshot_download
    wanted = ["*.safetensors", "*.safetensors.index.json", "tokenizer.json", f"{TEMPLATES}/*.jinja"]
    wanted += [*SENTENCEPIECE, *_OURS, *CARRIED]
    try:
        return Path(snapshot_download(match[1], revision=match[2], allow_patterns=wanted))
    except Exception as error:  # of the network or the Hub; kept as the cause
        raise ConversionError(
            "the Hub did not give this model",
            where=str(name),
            found=" ".join(str(error).split())[:300],
            fix="check the name and the connection, or pass a folder on this machine",
        ) from error


def open_folder(path: str | Path, *, pickles: bool = False) -> Folder:
    """Look into a folder; tensors are read later.

    Args:
        path: of it, or ``hf://owner/name``.
        pickles: whether weights of ``torch.save`` may be read (tensors only) where there are no others.

    Raises:
        ConversionError: for a folder without config or weights, or a broken file.
    """
    folder = located(path)
    if not (folder / CONFIG).is_file():
        there = ", ".join(sorted(f.name for f in folder.iterdir())[:12]) if folder.is_dir() else "no folder"
        raise ConversionError(
            "this is no folder of a Hugging Face model",
            where=str(folder),
            expected=f"{CONFIG} and {WEIGHTS}",
            found=there or "an empty folder",
            fix="pass the folder that save_pretrained wrote",
        )
    names = [*CARRIED, *(f"{TEMPLATES}/{path.name}" for path in sorted((folder / TEMPLATES).glob("*.jinja")))]
    carried = {name: small_file(folder / name) for name in names if (folder / name).is_file()}
    return Folder(folder, parse(carried[CONFIG], folder / CONFIG), _weights(folder, pickles), carried)


def small_file(path: Path) -> bytes:
    """The content of a file that is not large.

    Raises:
        ConversionError: where it is.
    """
    if path.stat().st_size > _LARGEST_TEXT:
        raise ConversionError(
            "this file is too large for what it is",
            where=str(path),
            expected=f"at most {_LARGEST_TEXT:,} bytes",
            found=f"{path.stat().st_size:,} bytes",
            fix=_AGAIN,
        )
    return path.read_bytes()


def parse(content: bytes, where: str | Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConversionError: for anything else.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        found = str(error)[:200]
        raise ConversionError("this is no JSON", where=str(where), expected=_OBJECT, found=found, fix=_AGAIN) from error
    if not isinstance(value, dict):
        found = f"a {type(value).__name__}"
        raise ConversionError("this is no JSON object", where=str(where), expected=_OBJECT, found=found, fix=_AGAIN)
    return value


def described(files: Mapping[str, bytes], where: Path = Path()) -> dict[str, Any]:
    """The content of ``config.json``, with those of the files of generation and of features where there are any."""
    config = parse(files[CONFIG], where / CONFIG)
    if GENERATION in files:
        config[GENERATION.removesuffix(".json")] = parse(files[GENERATION], where / GENERATION)
    if PREPROCESSOR in files:
        config[EXTRACTOR] = parse(files[PREPROCESSOR], where / PREPROCESSOR)
    elif EXTRACTOR in (processor := parse(files.get(PROCESSOR, b"{}"), where / PROCESSOR)):
        config[EXTRACTOR] = processor[EXTRACTOR]
    return config


def class_names(config: Mapping[str, Any], where: str | Path = CONFIG) -> list[str]:
    """The classes of transformers that a config is for.

    Raises:
        ConversionError: where ``architectures`` is no list of names.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConversionError(
            "the config does not say of which class it is",
            where=f"{where}: architectures",
            expected='a list of names, such as ["LlamaForCausalLM"]',
            found=json.dumps(names)[:200],
            fix=_AGAIN,
        )
    return names


def blank_of(config: Mapping[str, Any], where: str | Path = CONFIG) -> int | None:
    """The label of a recognizer by CTC that is no letter, which in transformers is that of padding; None for others.

    Raises:
        ConversionError: where it is no label.
    """
    if not any(name.endswith("ForCTC") for name in class_names(config, where)):
        return None
    blank = config.get("pad_token_id")
    if blank is not None and (type(blank) is not int or blank < 0):
        raise ConversionError(
            "the blank is none of the labels",
            where=f"{where}: pad_token_id",
            expected="the number of a label",
            found=json.dumps(blank)[:200],
            fix=_AGAIN,
        )
    return blank or 0


def as_json(content: Mapping[str, Any]) -> bytes:
    """What a JSON file holds."""
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"


def _weights(folder: Path, pickles: bool) -> Shards:
    if (folder / WEIGHTS).is_file():
        return Shards([TensorFile(folder / WEIGHTS)])
    if (folder / INDEX).is_file():
        return _sharded(folder)
    old = sorted(folder.glob("pytorch_model*.bin"))
    if old and pickles:
        return Shards(PickledFile(path) for path in old)
    if old:
        raise ConversionError(
            "these weights are pickled, and a pickle can run code",
            where=str(old[0]),
            expected=f"{WEIGHTS} or {INDEX}",
            found=", ".join(path.name for path in old[:8]),
            fix="ask for a safetensors version, or read them on your own word with pickles=true",
        )
    raise ConversionError(
        "there are no weights",
        where=str(folder),
        expected=f"{WEIGHTS} or {INDEX}",
        found=", ".join(sorted(f.name for f in folder.iterdir())[:12]),
        fix="download the folder again, with its safetensors files",
    )


def _sharded(folder: Path) -> Shards:
    index = parse(small_file(folder / INDEX), folder / INDEX).get("weight_map")
    places = index.values() if isinstance(index, dict) else [index]
    odd = next((place for place in places if not (isinstance(place, str) and _SHARD.fullmatch(place))), None)
    if not isinstance(index, dict) or odd is not None:
        raise ConversionError(
            "the index has no map of weights",
            where=str(folder / INDEX),
            expected="a weight_map from each tensor to a file in this folder",
            found=json.dumps(odd)[:200],
            fix=_AGAIN,
        )
    names = sorted(set(index.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConversionError(
            "shards are missing",
            where=str(folder),
            expected=f"{len(names)} files, as {INDEX} says",
            found=f"no {', '.join(missing[:8])}" + (f" and {len(missing) - 8} more" if len(missing) > 8 else ""),
            fix=_AGAIN,
        )
    shards = Shards(TensorFile(folder / name) for name in names)
    odds = sorted(index.keys() ^ shards.specs.keys())
    if odds:
        raise ConversionError(
            "the index and the shards disagree",
            where=str(folder / INDEX),
            expected="the same tensors in both",
            found="only in one: " + ", ".join(odds[:8]),
            fix=_AGAIN,
        )
    return shards
