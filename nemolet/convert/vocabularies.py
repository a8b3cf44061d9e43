"""Tokenizers of folders that have no ``tokenizer.json``: older files, read as transformers reads them, or refused."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

from nemolet.convert.declared_tokens import DeclaredTokens, as_bytes
from nemolet.convert.folder import Folder, parse, small_file
from nemolet.errors import ConversionError, TokenizerError
from nemolet.tokenizers import SentencePieceTokenizer, Tokenizer, tokenizer_json
from nemolet.tokenizers.sentencepiece_model import SentencePieceModel
from nemolet.tokenizers.storage import naming
from nemolet.tokenizers.tokenizer_json import Part, bpe, split, template

VOCABULARY, MERGES, WORDS = "vocab.json", "merges.txt", "vocab.txt"
_OTHERS = ("source.spm", "target.spm", "sentencepiece.bpe.model")  # whose ids are not those of the file
_MAKE = (
    'let transformers write one: AutoTokenizer.from_pretrained("{0}").save_pretrained("{0}"), if it can;'
    " or leave the tokenizer out: nemolet convert {0} model.nemolet with_tokenizer=false"
)
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What a class of tokenizers in transformers calls its tokens, where a folder says nothing.
_GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_QWEN2 = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
_ROBERTA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>"}
_ROBERTA |= {"pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>"}
_BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
_AROUND = ("cls_token", "sep_token")  # the marks of a text, of an encoder
_T5 = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_BY_MODEL = {
    "gpt2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer",
    "bart": "RobertaTokenizer",
    "bert": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "electra": "BertTokenizer",
    "t5": "T5Tokenizer",
}


def read_vocabulary(folder: Folder, declared: DeclaredTokens) -> bytes | Tokenizer | None:
    """The content of the ``tokenizer.json`` that transformers would make of a folder, or a tokenizer; None for neither.

    Raises:
        ConversionError: for files of a kind that is not known here, saying how to get a ``tokenizer.json``.
        TokenizerError: for a broken file.
    """
    kind = _class_of(folder, declared)
    model = next(
        (folder.path / name for name in ("tokenizer.model", "spiece.model") if (folder.path / name).is_file()), None
    )
    if model is not None and kind == "T5Tokenizer":
        with naming(model):
            return as_bytes(declared.added_to(_t5(small_file(model), declared), _T5))
    if model is not None:
        with naming(model):
            return _pieces(SentencePieceTokenizer(small_file(model)), declared)
    read, usual, files = _READERS.get(kind or "", (None, {}, ()))
    if read is not None and all(name in folder.carried for name in files):
        return as_bytes(declared.added_to(read(folder, declared), usual))
    there = [name for name in (VOCABULARY, MERGES, WORDS, *_OTHERS) if (folder.path / name).is_file()]
    if not there:
        return None
    raise ConversionError(
        "the vocabulary of this folder is not read",
        where=str(folder.path),
        expected=f"a tokenizer.json, or the files of a {', '.join(sorted({*_BY_MODEL.values()}))}",
        found=f"{', '.join(there)} of a {kind or 'tokenizer without a known class'}",
        fix=_MAKE.format(folder.path),
    )


def _class_of(folder: Folder, declared: DeclaredTokens) -> str | None:
    model = str(folder.config.get("model_type"))
    said = declared.settings.get("tokenizer_class") or folder.config.get("tokenizer_class")
    if model == "qwen2" or not isinstance(said, str):  # transformers makes Qwen's own, whatever is said
        return _BY_MODEL.get(model)
    return said.removesuffix("Fast")


def _byte_pairs(folder: Folder, declared: DeclaredTokens) -> Part:
    """Pairs of characters that stand for bytes; a text is cut into words first."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocab = parse(folder.carried[VOCABULARY], folder.path / VOCABULARY)
    merges = [line.split() for line in _lines(folder, MERGES) if line.strip() and not line.startswith("#version")]
    if not all(len(pair) == 2 for pair in merges) or not all(type(index) is int for index in vocab.values()):
        raise ConversionError(
            "these files are no vocabulary of byte pairs",
            where=str(folder.path / MERGES),
            expected="two parts in each line, and whole numbers in vocab.json",
            found=str(next((pair for pair in merges if len(pair) != 2), "other values"))[:200],
            fix="download or copy the folder again",
        )
    model = bpe(vocab, [(left, right) for left, right in merges])
    before, after = (
        [declared.named(f"{which}_token", _GPT2[f"{which}_token"])] if declared.flag(f"add_{which}_token") else []
        for which in ("bos", "eos")
    )
    level["add_prefix_space"] = declared.flag("add_prefix_space")
    return _content(model, pre_tokenizer=level, decoder=level, post_processor=_marked(declared, vocab, before, after))


def _qwen(folder: Folder, declared: DeclaredTokens) -> Part:
    content = _byte_pairs(folder, declared)
    level = {**content["pre_tokenizer"], "use_regex": False}
    cut = {"type": "Sequence", "pretokenizers": [split(_QWEN), level]}
    return {**content, "normalizer": {"type": "NFC"}, "pre_tokenizer": cut}


def _roberta(folder: Folder, declared: DeclaredTokens) -> Part:
    content = _byte_pairs(folder, declared)
    marks = [[declared.named(key, _ROBERTA[key])] for key in _AROUND]
    return {**content, "post_processor": _marked(declared, content["model"]["vocab"], *marks)}


def _bert(folder: Folder, declared: DeclaredTokens) -> Part:
    vocab = {line.rstrip(): index for index, line in enumerate(_lines(folder, WORDS))}
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": declared.flag("tokenize_chinese_chars", True),
        "strip_accents": declared.flag("strip_accents", None),
        "lowercase": declared.flag("do_lower_case", True),
    }
    model = {"type": "WordPiece", "vocab": vocab, "unk_token": declared.named("unk_token", _BERT["unk_token"])}
    return _content(
        {**model, "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
        normalizer=normalizer,
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
        post_processor=_marked(declared, vocab, *([declared.named(key, _BERT[key])] for key in _AROUND)),
    )


def _marked(
    declared: DeclaredTokens, ids: Mapping[str, int], before: list[str | None], after: list[str | None]
) -> Part:
    """The marks of a whole text."""
    marks = [mark for mark in (*before, *after) if mark is None or mark not in ids]
    if marks:
        raise ConversionError(
            "the marks of a text are not in its vocabulary",
            where=str(declared.where),
            expected="the tokens that begin and end a text among the tokens",
            found=", ".join("none is named" if mark is None else f"no {mark}" for mark in marks),
            fix="take the vocabulary and the settings of the tokenizer from one place",
        )
    return template([str(mark) for mark in before], [str(mark) for mark in after], ids)


def _t5(model: bytes, declared: DeclaredTokens) -> Part:
    """A unigram model with further tokens behind it, for what a text leaves out."""
    parsed = SentencePieceModel.parse(model)
    vocab: list[tuple[str, float]] = [(piece.text, piece.score) for piece in parsed.pieces]
    vocab += [(f"<extra_id_{n}>", 0.0) for n in reversed(range(declared.count("extra_ids", 100)))]
    ids = {text: index for index, (text, _) in enumerate(vocab)}
    spaces = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    charsmap = base64.b64encode(parsed.charsmap).decode()
    extra = [text for text in ids if text.startswith("<extra_id_")]
    content = _content(
        {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False},
        normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap} if charsmap else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, spaces]},
        decoder=spaces,
        post_processor=_marked(declared, ids, [], [declared.named("eos_token", _T5["eos_token"])]),
    )
    return DeclaredTokens(declared.where, {"extra_special_tokens": extra}, {}, declared.room).added_to(content)


def _pieces(tokenizer: SentencePieceTokenizer, declared: DeclaredTokens) -> bytes | Tokenizer:
    """The model alone where nothing else is said; otherwise a ``tokenizer.json`` of it with what is."""
    own = {key: tokenizer.processor.id_to_piece(i) for key, i in _marks(tokenizer).items() if i is not None}
    told = {key: declared.named(key) for key in own if key in declared.settings}
    added = [
        token["content"] for token in declared.numbered.values() if token["content"] not in tokenizer.special_tokens
    ]
    puts_bos, puts_eos = declared.flag("add_bos_token", True), declared.flag("add_eos_token")
    if all(own[key] == text for key, text in told.items()) and not added and puts_bos and not puts_eos:
        return tokenizer
    ids = _marks(tokenizer)
    before, after = (
        [index] if put and index is not None else []
        for put, index in ((puts_bos, ids["bos_token"]), (puts_eos, ids["eos_token"]))
    )
    try:
        content = tokenizer_json(tokenizer, before=before, after=after)
    except TokenizerError as error:
        raise ConversionError(
            "tokens were added to a model of SentencePiece that a tokenizer.json cannot express",
            where=str(declared.where),
            expected=error.expected,
            found=error.found,
            fix=_MAKE.format(declared.where),
        ) from error
    return as_bytes(declared.added_to(parse(content, declared.where)))


def _marks(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}


def _content(model: Part, **parts: Any) -> Part:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        **parts,
        "model": model,
    }


def _lines(folder: Folder, name: str) -> list[str]:
    try:
        text = folder.carried[name].decode()
    except UnicodeDecodeError as error:
        raise ConversionError(
            "this file is no text",
            where=str(folder.path / name),
            expected="UTF-8",
            found=str(error),
            fix="download or copy the folder again",
        ) from error
    return text.removesuffix("\n").split("\n")


_Reader = tuple[Callable[[Folder, DeclaredTokens], Part] | None, Mapping[str, str], tuple[str, ...]]
_READERS: dict[str, _Reader] = {
    "GPT2Tokenizer": (_byte_pairs, _GPT2, (VOCABULARY, MERGES)),
    "Qwen2Tokenizer": (_qwen, _QWEN2, (VOCABULARY, MERGES)),
    "RobertaTokenizer": (_roberta, _ROBERTA, (VOCABULARY, MERGES)),
    "BartTokenizer": (_roberta, _ROBERTA, (VOCABULARY, MERGES)),
    "BertTokenizer": (_bert, _BERT, (WORDS,)),
    "DistilBertTokenizer": (_bert, _BERT, (WORDS,)),
    "ElectraTokenizer": (_bert, _BERT, (WORDS,)),
}
