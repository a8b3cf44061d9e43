"""Tokenizers of ours as a ``tokenizer.json``: the same ids for the same texts, or a refusal."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nemolet.errors import TokenizerError
from nemolet.tokenizers import sentencepiece_model as spm
from nemolet.tokenizers.base import Tokenizer
from nemolet.tokenizers.huggingface import HuggingFaceTokenizer
from nemolet.tokenizers.sentencepiece import SentencePieceTokenizer
from nemolet.tokenizers.simple import ByteTokenizer, CharTokenizer
from nemolet.tokenizers.words import WordTokenizer

Part = dict[str, Any]  # what the format says of a model, a normalizer, a decoder, ...

_FUSE: Part = {"type": "Fuse"}
_FALLBACK: list[Part] = [{"type": "ByteFallback"}, _FUSE]
_SPACES = "".join(c for c in map(chr, range(0x110000)) if c.isspace())  # of Python, which are not those of Rust
_TEXTS = (
    "",
    " ",
    "   ",
    "a",
    "  two  blanks \t and\ttabs  ",
    "\n",
    "\n\n\r\n line ends \r x\u0085y\u2028z\n",
    "To be, or not to be: 12 345,67 [x] {y} #!?",
    "def f(x):\n    return x ** 2  # 100\n\n\n        if x:\n",
    "naïve café ﬁ e\u0301 １２３ ² ÅÄÖ ß İ ǅ",
    "ไทย 日本語 한국어 العربية हिन्दी",
    "👩‍👩‍👧‍👦 🙂🙂 \U0010ffff",
    "\u2581 a\u2581b \u2581\u2581",
    "\ufeffmark \u200b\u00a0\u3000\x1c\x1f\x7f\x01 end",
    "<s></s><unk><pad> <0x0A><0x41> <|endoftext|> [CLS]",
    "=" * 60 + " " * 50 + "#" * 33 + "\n" + "-" * 71,
)
_RANDOM, _LENGTH = 100, 24  # texts made of random ids, and how many of them


def tokenizer_json(tokenizer: Tokenizer, *, before: Sequence[int] = (), after: Sequence[int] = ()) -> bytes:
    """The content of a ``tokenizer.json`` that gives the ids of a tokenizer (extra ``hf``).

    What was written is read and compared, on texts of many kinds and on texts made of the vocabulary.

    Args:
        tokenizer: of ours.
        before: ids that the file puts before a text, where a caller asks it for special tokens.
        after: ids that it puts behind.

    Raises:
        TokenizerError: for a tokenizer of which the format cannot say what it does.

    Example:
        >>> from nemolet.tokenizers import ByteTokenizer
        >>> twin = HuggingFaceTokenizer(tokenizer_json(ByteTokenizer()))
        >>> twin.encode("né"), twin.decode([110, 195, 169])
        ([110, 195, 169], 'né')
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.content
    describe = _KINDS.get(type(tokenizer))
    if describe is None:
        raise _refusal(tokenizer, f"one id for each part of a text, as {', '.join(cls.kind for cls in _KINDS)} have")
    names = {index: text for text, index in tokenizer.special_tokens.items()}
    content: Part = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(index, text, special=True) for index, text in sorted(names.items())],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": template([names[i] for i in before], [names[i] for i in after], tokenizer.special_tokens),
        "decoder": _FUSE,
        **describe(tokenizer),
    }
    content["added_tokens"] += content.pop("further_tokens", [])
    written = json.dumps(content, ensure_ascii=False).encode()
    _compare(tokenizer, HuggingFaceTokenizer(written), [*before], [*after])
    return written


def _refusal(tokenizer: Tokenizer, expected: str, found: str | None = None) -> TokenizerError:
    return TokenizerError(
        "a tokenizer.json cannot say what this tokenizer does",
        where=f"{tokenizer.kind} tokenizer",
        expected=expected[:300],
        found=found and found[:300],
        fix="leave it out (with_tokenizer=false), and keep the .nemolet file for it",
    )


def added_token(index: int, text: str, *, special: bool) -> Part:
    """A token beside the vocabulary, found in a text as it is written."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": text, **flags, "special": special}


def template(before: Sequence[str], after: Sequence[str], ids: Mapping[str, int]) -> Part:
    """What stands before and after a text, where a caller asks for special tokens."""
    marks = [[{"SpecialToken": {"id": text, "type_id": 0}} for text in texts] for texts in (before, after)]
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [*marks[0], first, *marks[1]],
        "pair": [*marks[0], first, second, *marks[1]],
        "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in {*before, *after}},
    }


def split(pattern: str, behavior: str = "Isolated") -> Part:
    """A cut before and after what a regular expression finds."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def _any_of(characters: str) -> str:
    return "[" + "".join(f"\\x{{{ord(c):x}}}" for c in sorted(characters)) + "]"


def bpe(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]] = (), **options: Any) -> Part:
    """A byte-pair model, without what others of its kind have unless it is among the options."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
        **options,
    }


def _bytes(tokenizer: ByteTokenizer) -> Part:
    """In this format a byte is a character: a printable one is itself, and the others follow behind Latin-1."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letters = [chr(value if value in printable else next(others)) for value in range(256)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocab = {**{letter: value for value, letter in enumerate(letters)}, **tokenizer.special_tokens}
    return {"pre_tokenizer": level, "decoder": level, "model": bpe(vocab)}


def _characters(tokenizer: CharTokenizer) -> Part:
    if tokenizer.byte_fallback:
        vocab = {**tokenizer.ids, **{f"<0x{v:02X}>": len(tokenizer.ids) + v for v in range(256)}}
        decoder = {"type": "Sequence", "decoders": _FALLBACK}
        return {"decoder": decoder, "model": bpe(vocab, byte_fallback=True)}
    return {"pre_tokenizer": split(r"[\s\S]"), "model": _words_only(tokenizer.ids)}


def _words(tokenizer: WordTokenizer) -> Part:
    spaces = split(_any_of(_SPACES) + "+", "Removed")
    return {
        "pre_tokenizer": spaces,
        "model": _words_only(tokenizer.ids),
        "decoder": None,
    }  # then a space is put between


def _words_only(vocab: Mapping[str, int]) -> Part:
    """Anything else is an error there as it is here, since the empty word that would stand for it has no id."""
    return {"type": "WordLevel", "vocab": vocab, "unk_token": ""}


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> Part:
    model = spm.SentencePieceModel.parse(tokenizer.model)
    if model.charsmap:
        raise _refusal(tokenizer, "characters as they are", "a model that was trained to exchange some for others")
    if model.suffix or not model.marks_spaces or any(piece.kind == spm.UNUSED for piece in model.pieces):
        raise _refusal(tokenizer, "spaces before words, and no piece that is not used")
    plain = tokenizer.lossless and not (model.trims or model.dummy_prefix)
    # Of a text that is not changed, spaces are spaces, so that the character that else stands for them is no space.
    pieces = [_spaced(piece) if plain and piece.kind == spm.NORMAL else piece for piece in model.pieces]
    if model.algorithm == 1:
        described, cuts = _unigram(tokenizer, model, pieces)
    elif model.algorithm == 2:
        described, cuts = _byte_pairs(model, pieces), ""
    else:
        raise _refusal(tokenizer, "a unigram or a byte-pair model", f"model_type {model.algorithm}")
    own = [(index, piece.text) for index, piece in enumerate(pieces) if piece.kind == spm.USER_DEFINED]
    cuts += "".join(text for _, text in own if len(text) == 1)
    return {
        "further_tokens": [added_token(index, text, special=False) for index, text in own if len(text) > 1],
        "normalizer": None if plain else _normalizer(model),
        "pre_tokenizer": split(_any_of(cuts)) if cuts else None,
        "model": described,
        "decoder": {"type": "Sequence", "decoders": _decoders(model, plain)},
    }


def _spaced(piece: spm.Piece) -> spm.Piece:
    return spm.Piece(piece.text.replace("\u2581", " "), piece.score, piece.kind)


def _normalizer(model: spm.SentencePieceModel) -> Part:
    """What SentencePiece does to a text first, in its order."""
    steps: list[Part] = []
    if model.trims:
        steps += [_replace("\\A +|[ \u2581]+\\z", ""), _replace(" {2,}", " ")]
    if model.dummy_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    return {"type": "Sequence", "normalizers": [*steps, _replace(" ", "\u2581")]}


def _replace(pattern: str, content: str) -> Part:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _decoders(model: spm.SentencePieceModel, plain: bool) -> list[Part]:
    spaces = [] if plain else [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}]
    most = 1 << 20 if model.trims else int(model.dummy_prefix)
    strip = [{"type": "Strip", "content": " ", "start": most, "stop": 0}] if most else []
    return [*spaces, *(_FALLBACK if model.byte_fallback else [_FUSE]), *strip]


def _byte_pairs(model: spm.SentencePieceModel, pieces: Sequence[spm.Piece]) -> Part:
    """Any two pieces that make one may be merged; the best piece comes first."""
    normal = {piece.text: piece.score for piece in pieces if piece.kind == spm.NORMAL}
    merges = [
        (-score, (text[:cut], text[cut:]))
        for text, score in normal.items()
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in normal and text[cut:] in normal
    ]
    unknown = next(piece.text for piece in pieces if piece.kind == spm.UNKNOWN)
    return bpe(
        {piece.text: index for index, piece in enumerate(pieces)},
        [pair for _, pair in sorted(merges, key=lambda merge: merge[0])],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _unigram(
    tokenizer: SentencePieceTokenizer, model: spm.SentencePieceModel, pieces: Sequence[spm.Piece]
) -> tuple[Part, str]:
    """The model, and characters that have to stand alone.

    There every name in the vocabulary may be found in a text, here only pieces that are text. The names of bytes and of
    special tokens are made less likely than to spell them; a character that has no piece is in no other one either,
    and a cut on both sides of it keeps it out of names.
    """
    scores = [piece.score for piece in pieces if piece.kind == spm.NORMAL]
    if any(score % spm.STEP for score in scores):
        raise _refusal(
            tokenizer,
            "scores whose sums are exact, as unigram models have that are trained now",
            "scores in single precision, with which equally likely splits are told apart by rounding",
        )
    names = [piece.text for piece in pieces if piece.kind in (spm.UNKNOWN, spm.CONTROL, spm.BYTE)]
    never = min(-1.0, *scores) * (1 + max(map(len, names)))
    vocab = [(p.text, p.score if p.kind in (spm.NORMAL, spm.USER_DEFINED) else never) for p in pieces]
    unknown = next(index for index, piece in enumerate(pieces) if piece.kind == spm.UNKNOWN)
    described = {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": model.byte_fallback}
    alone = {c for name in names for c in name} - {piece.text for piece in pieces}
    return described, "".join(alone)


_KINDS: dict[type[Tokenizer], Callable[[Any], Part]] = {
    ByteTokenizer: _bytes,
    CharTokenizer: _characters,
    WordTokenizer: _words,
    SentencePieceTokenizer: _sentencepiece,
}


def _compare(ours: Tokenizer, theirs: HuggingFaceTokenizer, before: list[int], after: list[int]) -> None:
    """Ids and texts of both have to be equal, with special tokens and without.

    Raises:
        TokenizerError: naming a text whose ids differ.
    """
    if (ours.vocab_size, dict(ours.special_tokens)) != (theirs.vocab_size, theirs.special_tokens):
        raise _refusal(ours, f"{ours.vocab_size} ids", f"{theirs.vocab_size}")
    for text in _samples(ours):
        for special in (False, True):
            ids, found = _tried(ours, text, special=special), _tried(theirs, text, special=special)
            if found != ids:
                raise _refusal(ours, f"the ids {ids} of {text!r}", f"{found}")
            if ids is None:
                continue
            if not special and (marked := theirs.inner.encode(text).ids) != [*before, *ids, *after]:
                raise _refusal(ours, f"the ids {[*before, *ids, *after]}", f"{marked}")
            known, read = ours.decode(ids, special=special), theirs.decode(ids, special=special)
            if known != read and _tells(ours, ids, special):
                raise _refusal(ours, f"the text {known!r} of {ids}", repr(read))


def _tells(tokenizer: Tokenizer, ids: Sequence[int], special: bool) -> bool:
    """Whether the text of ids is a fact. Models of others leave two things to who shows it: what stands for characters
    without an id, and whether a text that follows a special token begins with a space."""
    if not isinstance(tokenizer, SentencePieceTokenizer) or tokenizer.lossless:
        return True
    return not special and tokenizer.processor.unk_id() not in ids


def _tried(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int] | None:
    try:
        return tokenizer.encode(text, special=special)
    except TokenizerError:
        return None


def _samples(tokenizer: Tokenizer) -> Iterator[str]:
    yield from _TEXTS
    yield " ".join(f"a{text}b {text}" for text in tokenizer.special_tokens)
    numbers = random.Random(0)
    for size in (_LENGTH, 2):
        for _ in range(_RANDOM):
            ids = [numbers.randrange(tokenizer.vocab_size) for _ in range(size)]
            yield tokenizer.decode(ids)
            yield tokenizer.decode(ids * 3, special=True)
