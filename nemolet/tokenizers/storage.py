"""Tokenizers in folders and files."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemolet.errors import TokenizerError, nearest
from nemolet.tokenizers.base import Tokenizer
from nemolet.tokenizers.huggingface import HuggingFaceTokenizer
from nemolet.tokenizers.letters import LetterTokenizer
from nemolet.tokenizers.sentencepiece import SentencePieceTokenizer
from nemolet.tokenizers.simple import ByteTokenizer, CharTokenizer
from nemolet.tokenizers.tokenizer_json import tokenizer_json
from nemolet.tokenizers.words import PhoneTokenizer, WordTokenizer

KINDS: dict[str, type[Tokenizer]] = {
    cls.kind: cls
    for cls in (
        ByteTokenizer,
        CharTokenizer,
        WordTokenizer,
        PhoneTokenizer,
        LetterTokenizer,
        SentencePieceTokenizer,
        HuggingFaceTokenizer,
    )
}
SETTINGS, TABLE, NAMES = "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"
_ORIGIN = "nemolet"  # the key in SETTINGS under which a folder for others says which tokenizer of ours it was made of
_USUAL = {"unk_token": ("<unk>", "[UNK]"), "pad_token": ("<pad>", "[PAD]")}


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Kind and settings: with the files, all that :func:`rebuild` needs."""
    return {"kind": tokenizer.kind, **tokenizer.settings()}


def rebuild(description: Mapping[str, Any], files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer of a description and its files.

    Raises:
        TokenizerError: for an unknown kind, unknown settings or missing files.
    """
    settings = dict(description)
    kind = settings.pop("kind", None)
    if kind not in KINDS:
        close = nearest(str(kind), KINDS)
        raise TokenizerError(
            "unknown kind of tokenizer",
            where="tokenizer.kind",
            expected=", ".join(KINDS),
            found=kind,
            fix=f"did you mean {close!r}?" if close else None,
        )
    try:
        return KINDS[kind].from_files(files, **settings)
    except (KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"the {kind} tokenizer cannot be rebuilt",
            where="tokenizer",
            found=f"files {', '.join(files) or 'none'}; {error}",
        ) from error


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a tokenizer to a folder, from which :func:`load_tokenizer` reads it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {**tokenizer.files(), SETTINGS: json.dumps(describe(tokenizer)).encode()}.items():
        partial = folder / f".{name}.partial"
        partial.write_bytes(content)
        partial.replace(folder / name)


def files_for_others(
    tokenizer: Tokenizer, *, before: Sequence[int] = (), after: Sequence[int] = ()
) -> dict[str, bytes]:
    """The files of a tokenizer of ours with which transformers reads it too (extra ``hf``).

    :func:`load_tokenizer` makes the tokenizer itself of them again, as long as none was changed.

    Args:
        tokenizer: of ours.
        before: ids that transformers puts before a text, unless it is told not to.
        after: ids that it puts behind.

    Raises:
        TokenizerError: for a tokenizer that only we understand.
    """
    files = {**tokenizer.files(), TABLE: tokenizer_json(tokenizer, before=before, after=after)}
    marks = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    texts = {index: text for text, index in tokenizer.special_tokens.items()}
    named = {key: texts[index] for key, index in marks.items() if index is not None}
    for key, usual in _USUAL.items():
        named.update((key, text) for text in usual if text in tokenizer.special_tokens)
    origin = {"tokenizer": describe(tokenizer), "sha256": {name: _digest(files[name]) for name in sorted(files)}}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # which takes the file as it is
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **named,
        _ORIGIN: origin,
    }
    return {**files, SETTINGS: _as_json(settings), NAMES: _as_json(named)}


def _as_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def original(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of ours that a folder for others was made of; None where it was not, or was changed since.

    Raises:
        TokenizerError: for a broken file.
    """
    folder = Path(folder)
    settings = folder / SETTINGS
    origin = _described(settings).get(_ORIGIN) if settings.is_file() else None
    digests = origin.get("sha256") if isinstance(origin, dict) else None
    if not isinstance(origin, dict) or not isinstance(digests, dict) or TABLE not in digests:
        return None
    if any(Path(name).name != name or not (folder / name).is_file() for name in digests):
        return None
    files = {name: (folder / name).read_bytes() for name in digests}
    if any(_digest(content) != digests[name] for name, content in files.items()):
        return None
    with naming(folder):
        return rebuild(origin.get("tokenizer") or {}, {name: files[name] for name in files if name != TABLE})


def _described(path: Path) -> dict[str, Any]:
    """The content of a settings file, ours or that of Hugging Face."""
    try:
        description = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TokenizerError(
            "this file is no JSON", where=str(path), expected="a JSON object", found=str(error)[:200], fix=_AGAIN
        ) from error
    if not isinstance(description, dict):
        raise TokenizerError(
            "this file is no settings of a tokenizer",
            where=str(path),
            expected="a JSON object",
            found=type(description).__name__,
            fix=_AGAIN,
        )
    return description


_AGAIN = "copy the file again, or save the tokenizer anew with nemolet.tokenizers.save_tokenizer"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of a tokenizer's content name the file or folder that holds it."""
    try:
        yield
    except TokenizerError as error:
        raise TokenizerError(
            error.what, where=str(path), expected=error.expected, found=error.found, fix=error.fix or _AGAIN
        ) from error


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer: a folder of ours or of Hugging Face, a ``tokenizer.json``, or a SentencePiece ``.model``.

    Raises:
        TokenizerError: naming the path and what was looked for.

    Example:
        >>> load_tokenizer("nowhere")
        Traceback (most recent call last):
        ...
        nemolet.errors.TokenizerError: nowhere: there is no tokenizer here
          expected  a folder with tokenizer_config.json or tokenizer.json, a tokenizer.json, or a .model file
          found     nothing
    """
    path = Path(path)
    if path.is_dir():
        settings = path / SETTINGS
        description = _described(settings) if settings.is_file() else {}
        if description.get("kind") in KINDS:
            files = {f.name: f.read_bytes() for f in path.iterdir() if f.is_file() and f != settings}
            with naming(path):
                return rebuild(description, files)
        if (found := original(path)) is not None:
            return found
        for name in ("tokenizer.json", "tokenizer.model", "sentencepiece.model"):
            if (path / name).is_file():
                return load_tokenizer(path / name)
    elif path.is_file():
        content = path.read_bytes()
        if path.suffix not in (".model", ".json") and not content.lstrip().startswith(b"{"):
            raise TokenizerError(
                "this file is no tokenizer",
                where=str(path),
                expected="a tokenizer.json, or a SentencePiece model that ends in .model",
                found=repr(content[:40])[1:] or "nothing",
                fix=f"to train one on this text: tokenizer=sentencepiece data.path={path}",
            )
        with naming(path):
            return SentencePieceTokenizer(content) if path.suffix == ".model" else HuggingFaceTokenizer(content)
    raise TokenizerError(
        "there is no tokenizer here",
        where=str(path),
        found="a folder without one" if path.is_dir() else "nothing",
        expected=f"a folder with {SETTINGS} or tokenizer.json, a tokenizer.json, or a .model file",
    )
