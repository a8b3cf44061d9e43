"""Tokenizers of ours in the format of the tokenizers library: the same ids and texts, or a refusal."""

from __future__ import annotations

import io
import random

import pytest
import sentencepiece
import tokenizers as hf

from nemolet.errors import TokenizerError
from nemolet.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    LetterTokenizer,
    PhoneTokenizer,
    SentencePieceTokenizer,
    WordTokenizer,
    files_for_others,
    load_tokenizer,
    tokenizer_json,
)
from nemolet.tokenizers.sentencepiece_model import SentencePieceModel

from .test_tokenizers import TEXTS, unicode_texts

RUNS = "=" * 90 + "\n" + " " * 70 + "#" * 55 + "\n\n" + "----- " * 20  # of which there are many equally likely splits


def foreign(**options) -> SentencePieceTokenizer:
    """A model as others train it."""
    target = io.BytesIO()
    settings = {"vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    settings |= {"minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=target, **settings)
    return SentencePieceTokenizer(target.getvalue())


@pytest.fixture(scope="module")
def every() -> dict:
    texts = [*TEXTS, RUNS]
    return {
        "byte": ByteTokenizer(),
        "char": CharTokenizer.train(texts, byte_fallback=True),
        "characters": CharTokenizer.train(texts),
        "word": WordTokenizer.train(texts),
        "bpe": SentencePieceTokenizer.train(texts, vocab_size=320, special_tokens=["<|user|>"]),
        "unigram": SentencePieceTokenizer.train(
            texts, vocab_size=300, model="unigram", special_tokens=["<|user|>", "<a b>"]
        ),
        "llama": foreign(remove_extra_whitespaces=False),
        "trimmed": foreign(byte_fallback=False, vocab_size=60),
        "symbols": foreign(
            user_defined_symbols=["<|im|>", "\n", "##"], add_dummy_prefix=False, remove_extra_whitespaces=False
        ),
    }


KINDS = ["byte", "char", "characters", "word", "bpe", "unigram", "llama", "trimmed", "symbols"]


def texts_for(tokenizer) -> list[str]:
    numbers = random.Random(11)
    made = [tokenizer.decode([numbers.randrange(tokenizer.vocab_size) for _ in range(40)]) for _ in range(100)]
    return [*TEXTS[:3], *unicode_texts(), RUNS, *made, *(f"a{s} {s}b" for s in tokenizer.special_tokens)]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_equal(every, kind):
    tokenizer = every[kind]
    opener = [] if tokenizer.opener is None else [tokenizer.opener]
    inner = hf.Tokenizer.from_buffer(tokenizer_json(tokenizer, before=opener))
    assert inner.get_vocab_size() == tokenizer.vocab_size
    compared = 0
    for text in texts_for(tokenizer):
        for special in (False, True):
            inner.encode_special_tokens = not special
            try:
                ids = tokenizer.encode(text, special=special)
            except TokenizerError:
                with pytest.raises(Exception, match="WordLevel error"):
                    inner.encode(text)
                continue
            assert inner.encode(text).ids == [*opener, *ids], text
            if tokenizer.kind != "sentencepiece" or 0 not in ids:
                compared += 1
                if special and kind in ("llama", "trimmed"):  # who shows it decides about a space behind a token
                    continue
                assert inner.decode(ids, skip_special_tokens=not special) == tokenizer.decode(ids, special=special)
    assert compared > 60


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "unigram"])
def test_ids_in_any_order_are_equal_texts(every, kind):
    """Broken characters alone are shown in another way: as one mark there, or one for each byte."""
    tokenizer, numbers = every[kind], random.Random(3)
    inner = hf.Tokenizer.from_buffer(tokenizer_json(tokenizer))
    for _ in range(200):
        ids = [numbers.randrange(tokenizer.vocab_size) for _ in range(6)]
        known, found = tokenizer.decode(ids), inner.decode(ids)
        assert known == found or ("\ufffd" in known and "\ufffd" in found and kind != "byte")


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_as_it_was_until_a_file_is_changed(every, kind, tmp_path):
    tokenizer = every[kind]
    for name, content in files_for_others(tokenizer).items():
        (tmp_path / name).write_bytes(content)
    again = load_tokenizer(tmp_path)
    assert (type(again), again.fingerprint) == (type(tokenizer), tokenizer.fingerprint)
    inner = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.add_tokens(["added later"])
    inner.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).kind == "huggingface"
    assert load_tokenizer(tmp_path).vocab_size == tokenizer.vocab_size + 1


def test_scores_of_a_unigram_model_add_up_exactly(every):
    """So that equally likely splits are told apart by their order everywhere, not by rounding."""
    scores = [piece.score for piece in SentencePieceModel.parse(every["unigram"].model).pieces]
    assert min(scores) < -3 and all(score * 64 == int(score * 64) for score in scores)


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_pieces_are_read_as_the_library_reads_them(every, model):
    parsed, processor = SentencePieceModel.parse(every[model].model), every[model].processor
    for index, piece in enumerate(parsed.pieces):
        assert (piece.text, piece.score) == (processor.id_to_piece(index), processor.get_score(index))
    assert len(parsed.pieces) == processor.get_piece_size()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PhoneTokenizer({"one": ["W", "AH1", "N"]}), "one id for each part of a text"),
        (lambda: LetterTokenizer(["|", "A", "B"], small=True), "one id for each part of a text"),
        (lambda: foreign(model_type="unigram", vocab_size=289), "equally likely splits are told apart by rounding"),
        (lambda: foreign(normalization_rule_name="nmt_nfkc"), "characters as they are"),
        (lambda: foreign(treat_whitespace_as_suffix=True), "spaces before words"),
        (lambda: foreign(model_type="char", byte_fallback=False, vocab_size=30), "a unigram or a byte-pair model"),
        (lambda: foreign(user_defined_symbols=["<|im|>"]), "the (ids|text)"),  # a space before the text between symbols
    ],
)
def test_what_the_format_cannot_say_is_refused(make, words):
    with pytest.raises(TokenizerError, match=words) as refused:
        tokenizer_json(make())
    assert "cannot say" in str(refused.value) and "with_tokenizer=false" in refused.value.fix


@pytest.mark.parametrize("content", [b"\x0a", b"\x0a\x05ab", b"\x0b\x01", b"\xff" * 30, b"\x0a\x03\x0a\x01\xff"])
def test_bytes_that_are_no_model_are_refused(content):
    with pytest.raises(TokenizerError, match="no SentencePiece model"):
        SentencePieceModel.parse(content)
