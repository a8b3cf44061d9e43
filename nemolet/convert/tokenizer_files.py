"""The tokenizer of a folder, both ways; of a recognizer ``vocab.json``, with the blank among the letters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemolet.convert.folder import SENTENCEPIECE, Folder, as_json, parse, small_file
from nemolet.errors import ConversionError
from nemolet.tokenizers import (
    CharTokenizer,
    HuggingFaceTokenizer,
    LetterTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

VOCABULARY, ADDED, SETTINGS = "vocab.json", "added_tokens.json", "tokenizer_config.json"
_SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def read_tokenizer(folder: Folder, *, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a folder, or None where it has none.

    Raises:
        ConversionError: for one that has more tokens than the model.
        TokenizerError: for a broken one.
    """
    path = folder.path
    tokenizer: Tokenizer | None = None
    if (path / "tokenizer.json").is_file():
        plain = HuggingFaceTokenizer(small_file(path / "tokenizer.json"))
        tokenizer = HuggingFaceTokenizer(plain.content, **_markers(folder, plain))
    else:
        file = next((path / name for name in SENTENCEPIECE if (path / name).is_file()), None)
        if file is not None:
            tokenizer = SentencePieceTokenizer(small_file(file))
        elif any(name.endswith("ForCTC") for name in folder.config.get("architectures") or ()):
            tokenizer = read_letters(folder.carried, path, blank=folder.config.get("pad_token_id") or 0)
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
    settings = folder.carried.get(SETTINGS)
    known = parse(settings, folder.path / SETTINGS) if settings else {}
    special = tokenizer.special_tokens
    put = tokenizer.inner.encode("", add_special_tokens=True).ids

    def named(*keys: str) -> list[str]:
        values = [known.get(key) for key in keys]
        texts = [value.get("content") if isinstance(value, dict) else value for value in values]
        return [text for text in texts if isinstance(text, str) and text in special]

    bos = next((text for text in named("bos_token", "cls_token") if put and special[text] == put[0]), None)
    return {"bos": bos, "eos": next(iter(named("eos_token", "sep_token")), None)}


def read_letters(files: Mapping[str, bytes], where: Path, *, blank: int) -> LetterTokenizer | None:
    """The tokenizer of a recognizer's folder, or None where it has none.

    Args:
        files: the small files of the folder.
        where: the folder.
        blank: id of the blank, which is the token of padding.

    Raises:
        ConversionError: for a vocabulary that cannot be that of the model.
    """
    if VOCABULARY not in files:
        return None
    vocabulary, added, settings = (
        parse(files.get(name, b"{}"), where / name) for name in (VOCABULARY, ADDED, SETTINGS)
    )
    added |= {_text(token): int(index) for index, token in settings.get("added_tokens_decoder", {}).items()}
    ids: dict[str, Any] = {**added, **vocabulary}
    names = {key: _text(settings.get(key, usual)) for key, usual in _SPECIAL.items()}
    in_order = all(isinstance(index, int) for index in ids.values()) and sorted(ids.values()) == [*range(len(ids))]
    if not in_order or ids.get(names["pad_token"]) != blank:
        raise ConversionError(
            "this is no vocabulary of the recognizer",
            where=str(where / VOCABULARY),
            expected=f"ids from 0 on, each once, and {blank} for {names['pad_token']}, as config.json says",
            found=json.dumps(ids)[:300],
            fix="take config.json and the files of the tokenizer from one place",
        )
    letters = [letter for letter, index in sorted(ids.items(), key=lambda pair: pair[1]) if index != blank]
    return LetterTokenizer(
        letters,
        space=settings.get("word_delimiter_token", "|"),
        special={name for name in names.values() if name in letters},
        small=settings.get("do_lower_case", False),
    )


def letter_files(tokenizer: LetterTokenizer | CharTokenizer, blank: int) -> dict[str, bytes]:
    """Theirs of ours: the letters with the blank between them."""
    if isinstance(tokenizer, CharTokenizer):
        letters, space, small = ["|" if c == " " else c for c in tokenizer.characters], "|", False
    else:
        letters, space, small = list(tokenizer.letters), tokenizer.space, tokenizer.small
    if len(set(letters)) < len(letters) or "<pad>" in letters or len(letters) < tokenizer.vocab_size:
        raise ConversionError(
            "these letters have no counterpart in Hugging Face",
            where="tokenizer",
            expected="single characters without | and without bytes for others",
            found=repr(letters)[:200],
            fix="leave the tokenizer out (tokenizer=null), and keep the .nemolet file for it",
        )
    letters.insert(blank, "<pad>")
    settings = {"tokenizer_class": "Wav2Vec2CTCTokenizer", "word_delimiter_token": space, "do_lower_case": small}
    contents: dict[str, dict[str, Any]] = {
        VOCABULARY: {letter: index for index, letter in enumerate(letters)},
        SETTINGS: {**settings, **_SPECIAL},
    }
    return {name: as_json(content) for name, content in contents.items()}


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


_PADS = ("<pad>", "[PAD]", "<|padding|>")


def marker_ids(tokenizer: Tokenizer | None, theirs: Mapping[str, Any]) -> dict[str, int | None]:
    """Ids of special tokens where their config does not say them yet: theirs may lie outside this vocabulary."""
    special = {} if tokenizer is None else tokenizer.special_tokens
    ids = {
        "bos_token_id": None if tokenizer is None else tokenizer.bos_id,
        "eos_token_id": None if tokenizer is None else tokenizer.eos_id,
        "pad_token_id": next((special[text] for text in _PADS if text in special), None),
    }
    return {key: value for key, value in ids.items() if key not in theirs}


def tokenizer_files(tokenizer: Tokenizer | None, extra: Mapping[str, bytes], *, blank: int) -> dict[str, bytes]:
    """The files of a tokenizer, beside those that came with it.

    Raises:
        ConversionError: for one that theirs cannot be.
    """
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, LetterTokenizer | CharTokenizer):
        return {} if VOCABULARY in extra else letter_files(tokenizer, blank)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        files = tokenizer.files()
        if SETTINGS not in extra:
            ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
            names = {index: text for text, index in tokenizer.special_tokens.items()}
            settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
            settings |= {key: names[index] for key, index in ids.items() if index is not None}
            files[SETTINGS] = as_json(settings)
        return files
    if isinstance(tokenizer, SentencePieceTokenizer):
        return {"tokenizer.model": tokenizer.model}
    raise ConversionError(
        "this kind of tokenizer has no counterpart in Hugging Face",
        where="tokenizer",
        expected="huggingface, sentencepiece, or the letters of a recognizer",
        found=tokenizer.kind,
        fix="leave it out (tokenizer=null), and keep the .nemolet file for it",
    )
