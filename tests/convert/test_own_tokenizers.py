"""Tokenizers of folders: transformers and we give the same ids for the same texts, written and read."""

from __future__ import annotations

import pytest
import torch
import transformers

import nemolet as nl
from nemolet.convert import convert, write
from nemolet.errors import ConversionError, TokenizerError
from nemolet.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    PhoneTokenizer,
    SentencePieceTokenizer,
    WordTokenizer,
    files_for_others,
)

from .conftest import MODELS

LINES = ["def f(x):\n    return x + 1\n", "to be, or not to be: that is the question. ", "naïve café"] * 40
TEXTS = (
    "",
    " ",
    "  leading and trailing  ",
    "to be  or\tnot\r\n\n  to be ",
    "naïve e\u0301 ﬁ １２ 3456 ½ ไทย 日本語 👩‍👩‍👧‍👦 \U0010ffff",
    "\u2581 a\u2581\u2581b",
    "<s> </s><unk> <|user|>x<|endoftext|> <0x0A>",
    "\x00\x1c\u00a0\u3000\ufeff\u200b.",
    "=" * 80 + "\n" + " " * 61 + "x",
)
SIZES = {"layers": 1, "width": 16, "heads": 2, "context": 64}
OURS = {
    "byte": lambda: ByteTokenizer(),
    "char": lambda: CharTokenizer.train(LINES, byte_fallback=True),
    "characters": lambda: CharTokenizer.train([*LINES, *TEXTS]),
    "word": lambda: WordTokenizer.train([*LINES, *TEXTS]),
    "bpe": lambda: SentencePieceTokenizer.train(LINES, vocab_size=320, special_tokens=["<|user|>"]),
    "unigram": lambda: SentencePieceTokenizer.train(
        LINES, vocab_size=290, model="unigram", special_tokens=["<|user|>"]
    ),
}


def equal(theirs, ours, text: str) -> None:
    """With special tokens that are written in the text, and with them spelled."""
    for special in (False, True):
        ids = ours.encode(text, special=special)
        found = theirs(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]
        assert found == ids, text
        assert theirs.decode(ids) == ours.decode(ids, special=True)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


@pytest.mark.parametrize("kind", OURS)
def test_a_tokenizer_of_ours_is_read_by_transformers_and_comes_back(kind, tmp_path):
    tokenizer = OURS[kind]()
    torch.manual_seed(0)
    model = nl.language.CausalLM(vocab_size=tokenizer.vocab_size, **SIZES)
    folder = write(tmp_path / "folder", model=model, tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for text in TEXTS:
        equal(theirs, tokenizer, text)
        if not any(mark in text for mark in tokenizer.special_tokens):
            assert theirs(text)["input_ids"] == tokenizer.encode_prompt(text)
    for again in (nl.load(folder), nl.load(convert(folder, tmp_path / "m.nemolet"))):
        assert type(again.tokenizer) is type(tokenizer)
        assert again.tokenizer.fingerprint == tokenizer.fingerprint
    second = convert(tmp_path / "m.nemolet", tmp_path / "again")
    for file in folder.iterdir():
        assert (second / file.name).read_bytes() == file.read_bytes()


def test_a_prompt_is_continued_as_here(tmp_path):
    tokenizer = OURS["bpe"]()
    torch.manual_seed(0)
    model = nl.language.CausalLM(vocab_size=tokenizer.vocab_size, **SIZES).eval()
    folder = write(tmp_path / "folder", model=model, tokenizer=tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    text = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs.generate(**text("to be", return_tensors="pt"), max_new_tokens=12, do_sample=False, eos_token_id=None)
    known = model.generate(tokenizer, "to be", max_new_tokens=12, temperature=0.0)
    assert text.decode(ids[0], skip_special_tokens=True).startswith("to be" + known[0].text)


CONFIGS = {config_class: arguments for _, config_class, arguments in MODELS.values()}


@pytest.fixture(scope="module")
def unigram() -> SentencePieceTokenizer:
    return OURS["unigram"]()


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"Wav2Vec2Config", "HubertConfig"}))
def test_transformers_takes_the_file_whatever_the_model(name, unigram, tmp_path):
    """It chooses the class of a tokenizer by the type of the model too."""
    tokenizer = unigram
    getattr(transformers, name)(**CONFIGS[name]).save_pretrained(tmp_path)
    for file, content in files_for_others(tokenizer, after=[tokenizer.eos_id]).items():
        (tmp_path / file).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    if name == "Qwen2Config":  # which is why it is refused
        assert theirs("  a", add_special_tokens=False)["input_ids"] != tokenizer.encode("  a")
        return
    for text in TEXTS:
        equal(theirs, tokenizer, text)
    assert theirs("be")["input_ids"] == tokenizer.encode("be", eos=True)


def test_the_settings_of_an_older_tokenizer_are_left_behind(pairs, tmp_path):
    tokenizer = OURS["bpe"]()
    model = nl.language.CausalLM(vocab_size=tokenizer.vocab_size, **SIZES)
    extra = {
        "tokenizer_config.json": b'{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}',
        "vocab.json": b"{}",
        "generation_config.json": b"{}",
    }
    folder = write(tmp_path / "folder", model=model, tokenizer=tokenizer, extra=extra)
    assert not (folder / "vocab.json").exists() and (folder / "generation_config.json").exists()
    equal(transformers.AutoTokenizer.from_pretrained(folder), tokenizer, TEXTS[3])


def test_what_cannot_be_written_is_refused_before_anything_is(pairs, tmp_path):
    out, phones = tmp_path / "out", PhoneTokenizer({"one": ["W", "AH1", "N"]})
    model = nl.language.CausalLM(vocab_size=300, **SIZES)
    with pytest.raises(TokenizerError, match="cannot say"):
        write(out, model=model, tokenizer=phones)
    with pytest.raises(ConversionError, match="does not fit"):
        write(out, model=nl.language.CausalLM(vocab_size=256, **SIZES), tokenizer=ByteTokenizer())
    qwen = pairs("qwen2").ours.model
    with pytest.raises(ConversionError, match="no counterpart") as refused:
        write(out, model=qwen, tokenizer=CharTokenizer(list("ab")), architecture="qwen2")
    assert "as its own" in refused.value.expected
    assert not out.exists()


def test_a_recognizer_has_letters(pairs, tmp_path):
    model = pairs("wav2vec2-ctc").ours.model
    with pytest.raises(ConversionError, match="no counterpart") as refused:
        write(tmp_path / "out", model=model, tokenizer=WordTokenizer(["one", "two"]))
    assert "numbered around the blank" in refused.value.expected
