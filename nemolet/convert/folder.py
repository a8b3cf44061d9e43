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
from nemolet.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

CONFIG, GENERATION, WEIGHTS, INDEX = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
# Small files that say how a model is used; they are carried along unchanged.
CARRIED = (
    CONFIG,
    GENERATION,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "source.spm",  # Marian's, whose ids are those of vocab.json
    "target.spm",
    "sentencepiece.bpe.model",  # XLM-R's, whose ids are shifted
)
SENTENCEPIECE = ("tokenizer.model", "spiece.model")  # whose ids are those of the file
_LARGEST_TEXT = 64 << 20
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
    wanted = ["*.safetensors", "*.safetensors.index.json", "tokenizer.json", *SENTENCEPIECE, *CARRIED]
    try:
        return Path(snapshot_download(match[1], revision=match[2], allow_patterns=wanted))
    except Exception as error:
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
    carried = {name: _text(folder / name) for name in CARRIED if (folder / name).is_file()}
    return Folder(folder, parse(carried[CONFIG], folder / CONFIG), _weights(folder, pickles), carried)


def _text(path: Path) -> bytes:
    if path.stat().st_size > _LARGEST_TEXT:
        raise ConversionError("this file is too large for what it is", where=str(path), found=path.stat().st_size)
    return path.read_bytes()


def parse(content: bytes, where: str | Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConversionError: for anything else.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConversionError("this is no JSON", where=str(where), found=str(error)[:200]) from error
    if not isinstance(value, dict):
        raise ConversionError("this is no JSON object", where=str(where), found=type(value).__name__)
    return value


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
    index = parse(_text(folder / INDEX), folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(n, str) and "/" not in n for n in index.values()):
        raise ConversionError("the index has no map of weights", where=str(folder / INDEX), expected="weight_map")
    names = sorted(set(index.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConversionError(
            "shards are missing", where=str(folder), found=", ".join(missing), fix="download the folder again"
        )
    shards = Shards(TensorFile(folder / name) for name in names)
    odd = sorted(index.keys() ^ shards.specs.keys())
    if odd:
        raise ConversionError("the index and the shards disagree", where=str(folder / INDEX), found=", ".join(odd[:8]))
    return shards


def read_tokenizer(folder: Folder, *, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a folder, or None where it has none.

    Raises:
        ConversionError: for one that has more tokens than the model.
        TokenizerError: for a broken one.
    """
    path = folder.path
    tokenizer: Tokenizer | None = None
    if (path / "tokenizer.json").is_file():
        plain = HuggingFaceTokenizer(_text(path / "tokenizer.json"))
        tokenizer = HuggingFaceTokenizer(plain.content, **_markers(folder, plain))
    else:
        file = next((path / name for name in SENTENCEPIECE if (path / name).is_file()), None)
        if file is not None:
            tokenizer = SentencePieceTokenizer(_text(file))
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ConversionError(
            "the tokenizer does not fit the model",
            where=str(path),
            expected=f"at most {vocab_size} tokens, as the model has",
            found=f"{tokenizer.vocab_size} tokens",
            fix="take the tokenizer that belongs to these weights",
        )
    return tokenizer


def _markers(folder: Folder, tokenizer: HuggingFaceTokenizer) -> dict[str, str | None]:
    """The texts of the tokens that begin and end a document, as far as the folder names them.

    One that begins counts only where the tokenizer itself puts it: that of GPT-2 has a name for it, but does not.
    """
    settings = folder.carried.get("tokenizer_config.json")
    known = parse(settings, folder.path / "tokenizer_config.json") if settings else {}
    special = tokenizer.special_tokens
    put = tokenizer.inner.encode("", add_special_tokens=True).ids

    def named(*keys: str) -> list[str]:
        values = [known.get(key) for key in keys]
        texts = [value.get("content") if isinstance(value, dict) else value for value in values]
        return [text for text in texts if isinstance(text, str) and text in special]

    bos = next((text for text in named("bos_token", "cls_token") if put and special[text] == put[0]), None)
    return {"bos": bos, "eos": next(iter(named("eos_token", "sep_token")), None)}
