"""The tokenizer of a folder, both ways; of a recognizer ``vocab.json``, with the blank among the letters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemolet.convert.declared_tokens import ADDED, SETTINGS, DeclaredTokens, as_bytes, text_of
from nemolet.convert.folder import CONFIG, TOKENIZER_FILES, Folder, as_json, blank_of, parse, small_file
from nemolet.convert.vocabularies import VOCABULARY, read_vocabulary
from nemolet.errors import ConversionError, TokenizerError
from nemolet.tokenizers import (
    CharTokenizer,
    HuggingFaceTokenizer,
    LetterTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    files_for_others,
    original,
)
from nemolet.tokenizers.storage import naming

TABLE = "tokenizer.json"
# transformers 5 takes only the vocabulary of any tokenizer.json beside a model of these types, and cuts texts as Qwen
_OWN_CLASS_ONLY = ("qwen2",)
_SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def read_tokenizer(folder: Folder, *, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a folder, or None where it has none.

    Raises:
        ConversionError: for one that has more tokens than the model.
        TokenizerError: for a broken one.
    """
    if not vocab_size:  # a model that reads no tokens
        return None
    tokenizer = original(folder.path) or _of_others(folder, vocab_size)
    if tokenizer is not None:
        _check_size(tokenizer, vocab_size, where=str(folder.path))
    return tokenizer


def _of_others(folder: Folder, vocab_size: int) -> Tokenizer | None:
    file, declared = folder.path / TABLE, DeclaredTokens.by(folder, vocab_size)
    if file.is_file():
        content = small_file(file)
        with naming(file):
            known = HuggingFaceTokenizer(content).inner.get_added_tokens_decoder().values()
        if not declared.texts <= {token.content for token in known}:
            content = as_bytes(declared.added_to(parse(content, file)))
        return _with_markers(content, declared)
    blank = blank_of(folder.config, folder.path / CONFIG)
    if blank is not None:
        return read_letters(folder.carried, folder.path, blank=blank)
    found = read_vocabulary(folder, declared)
    return _with_markers(found, declared) if isinstance(found, bytes) else found


def _check_size(tokenizer: Tokenizer, vocab_size: int, *, where: str) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise ConversionError(
            "the tokenizer does not fit the model",
            where=where,
            expected=f"at most {vocab_size} tokens, as the model has",
            found=f"{tokenizer.vocab_size} tokens",
            fix="take the tokenizer that belongs to these weights",
        )


def _with_markers(content: bytes, declared: DeclaredTokens) -> HuggingFaceTokenizer:
    """A tokenizer that knows the tokens that begin and end a document, as far as the folder names them.

    One that begins counts only where the tokenizer itself puts it: that of GPT-2 has a name for it, but does not.
    """
    with naming(declared.where / TABLE):
        plain = HuggingFaceTokenizer(content)
    special, put = plain.special_tokens, plain.opener
    bos, eos = (
        [text for key in keys if (text := declared.named(key)) is not None and text in special]
        for keys in (("bos_token", "cls_token"), ("eos_token", "sep_token"))
    )
    begin = next((text for text in bos if special[text] == put), None)
    return HuggingFaceTokenizer(content, bos=begin, eos=next(iter(eos), None))


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
    added |= {str(text_of(token)): int(index) for index, token in settings.get("added_tokens_decoder", {}).items()}
    ids: dict[str, Any] = {**added, **vocabulary}
    names = {key: str(text_of(settings.get(key, usual))) for key, usual in _SPECIAL.items()}
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
    """Theirs of ours: the letters with the blank between them.

    Raises:
        ConversionError: for letters that would be read back as others.
    """
    if isinstance(tokenizer, CharTokenizer):
        letters, space, small = ["|" if c == " " else c for c in tokenizer.characters], "|", False
    else:
        letters, space, small = list(tokenizer.letters), tokenizer.space, tokenizer.small
    if not 0 <= blank <= len(letters):
        raise ConversionError(
            "the blank has no place among these letters",
            where="config.json: pad_token_id",
            expected=f"0 to {len(letters)}",
            found=blank,
            fix="take a tokenizer with as many letters as the model has labels beside the blank",
        )
    # Which of the special letters is which is known by their usual names only; any other name takes a free place.
    others = iter(
        sorted(tokenizer.special_tokens.keys() - _SPECIAL.values(), key=lambda name: "unk" not in name.lower())
    )
    kept = {"<pad>", *tokenizer.special_tokens}
    settings = {"tokenizer_class": "Wav2Vec2CTCTokenizer", "word_delimiter_token": space, "do_lower_case": small}
    settings |= {key: usual if usual in kept else next(others, usual) for key, usual in _SPECIAL.items()}
    vocabulary = {letter: index for index, letter in enumerate([*letters[:blank], "<pad>", *letters[blank:]])}
    files = {VOCABULARY: as_json(vocabulary), SETTINGS: as_json(settings)}
    if not _say(files, tokenizer, blank):
        raise ConversionError(
            "these letters have no counterpart in Hugging Face",
            where="tokenizer",
            expected="single characters without | and without bytes for others",
            found=repr(letters)[:200],
            fix="leave the tokenizer out (with_tokenizer=false), and keep the .nemolet file for it",
        )
    return files


def _say(files: Mapping[str, bytes], tokenizer: LetterTokenizer | CharTokenizer, blank: int) -> bool:
    """Whether files of theirs are read as this tokenizer."""
    try:
        found = read_letters(files, Path("tokenizer"), blank=blank)
    except (ConversionError, TokenizerError):
        return False
    if found is None or isinstance(tokenizer, LetterTokenizer):
        return found is not None and found.fingerprint == tokenizer.fingerprint
    return found.table == tokenizer.table and not found.special


_PADS = ("<pad>", "[PAD]", "<|padding|>")


def marker_ids(tokenizer: Tokenizer | None, theirs: Mapping[str, Any]) -> dict[str, int | None]:
    """Ids of special tokens where their config does not say them yet: theirs may lie outside this vocabulary."""
    special = {} if tokenizer is None else tokenizer.special_tokens
    ids = {
        "bos_token_id": None if tokenizer is None else tokenizer.bos_id,
        "eos_token_id": None if tokenizer is None else tokenizer.eos_id,
        "pad_token_id": next((special[text] for text in _PADS if text in special), None),
    }
    found = {key: value for key, value in ids.items() if key not in theirs}
    if tokenizer is not None and theirs.get("decoder_start_token_id", 0) is None:
        found["decoder_start_token_id"] = next(iter([*tokenizer.marks[0], tokenizer.eos_id]))  # as it begins texts
    return found


def tokenizer_files(
    tokenizer: Tokenizer | None,
    extra: Mapping[str, bytes],
    *,
    blank: int | None,
    vocab_size: int,
    model_type: str,
    continues: bool,
) -> dict[str, bytes]:
    """The small files that came with a model, and those of its tokenizer in the place of what speaks of another.

    Args:
        tokenizer: of the model; None for none.
        extra: the files that came with it.
        blank: id of the blank, of a recognizer; None for a model whose tokenizer is not of letters.
        vocab_size: tokens of the model.
        model_type: of the model in transformers.
        continues: whether the model goes on with a text; others read a whole one, with a mark behind it.

    Raises:
        ConversionError: for one that theirs cannot be.
        TokenizerError: for one of which a ``tokenizer.json`` cannot say what it does.
    """
    if tokenizer is None:
        return dict(extra)
    if blank is not None and isinstance(tokenizer, LetterTokenizer | CharTokenizer):
        files = dict(extra)
        if not _say(extra, tokenizer, blank):
            files = {**_beside(extra), **letter_files(tokenizer, blank)}
    elif blank is not None:
        raise _no_counterpart(tokenizer, "the letters of a recognizer, as its labels are numbered around the blank")
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        files = {**_settings(tokenizer), **extra, **tokenizer.files()}
    elif isinstance(tokenizer, SentencePieceTokenizer) and not tokenizer.lossless and SETTINGS in extra:
        files = {**extra, "tokenizer.model": tokenizer.model}  # it came with these settings
    elif model_type in _OWN_CLASS_ONLY:
        raise _no_counterpart(tokenizer, f"a tokenizer.json, as transformers reads any of {model_type} as its own")
    else:
        opener = [] if tokenizer.opener is None else [tokenizer.opener]
        before, after = (opener, []) if continues else tokenizer.marks
        files = {**_beside(extra), **files_for_others(tokenizer, before=before, after=after)}
    _check_size(tokenizer, vocab_size, where="tokenizer")
    return files


def _beside(extra: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files that speak of no tokenizer."""
    return {name: content for name, content in extra.items() if name not in TOKENIZER_FILES}


def _settings(tokenizer: HuggingFaceTokenizer) -> dict[str, bytes]:
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    names = {index: text for text, index in tokenizer.special_tokens.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {SETTINGS: as_json(settings | {key: names[index] for key, index in ids.items() if index is not None})}


def _no_counterpart(tokenizer: Tokenizer, expected: str) -> ConversionError:
    return ConversionError(
        "this kind of tokenizer has no counterpart in Hugging Face",
        where="tokenizer",
        expected=expected,
        found=tokenizer.kind,
        fix="leave it out (with_tokenizer=false), and keep the .nemolet file for it",
    )
