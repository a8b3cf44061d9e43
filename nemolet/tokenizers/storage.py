"""Tokenizers in folders and files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemolet.errors import TokenizerError, nearest
from nemolet.tokenizers.base import Tokenizer
from nemolet.tokenizers.huggingface import HuggingFaceTokenizer
from nemolet.tokenizers.letters import LetterTokenizer
from nemolet.tokenizers.sentencepiece import SentencePieceTokenizer
from nemolet.tokenizers.simple import ByteTokenizer, CharTokenizer
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
SETTINGS = "tokenizer_config.json"


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
def _named(path: Path) -> Iterator[None]:
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
            with _named(path):
                return rebuild(description, files)
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
        with _named(path):
            return SentencePieceTokenizer(content) if path.suffix == ".model" else HuggingFaceTokenizer(content)
    raise TokenizerError(
        "there is no tokenizer here",
        where=str(path),
        found="a folder without one" if path.is_dir() else "nothing",
        expected=f"a folder with {SETTINGS} or tokenizer.json, a tokenizer.json, or a .model file",
    )
