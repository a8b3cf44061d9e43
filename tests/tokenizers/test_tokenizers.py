"""Tokenizers: exact round trips, streams, special tokens, storage and refusals."""

from __future__ import annotations

import io
import pickle
import random

import pytest
import sentencepiece
import tokenizers as hf

from nemolet.errors import TokenizerError
from nemolet.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    rebuild,
    save_tokenizer,
)

TEXTS = ["def f(x):\n    return x + 1\n", "to be, or not to be: that is the question. ", "naïve café"] * 40


def byte_level() -> bytes:
    """A byte-level BPE as Hugging Face trains it."""
    inner = hf.Tokenizer(hf.models.BPE())
    inner.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(TEXTS, trainer)
    return inner.to_str().encode()


@pytest.fixture(scope="module")
def every() -> dict:
    return {
        "byte": ByteTokenizer(),
        "char": CharTokenizer.train(TEXTS, byte_fallback=True),
        "bpe": SentencePieceTokenizer.train(TEXTS, vocab_size=330, special_tokens=["<|user|>"]),
        "unigram": SentencePieceTokenizer.train(TEXTS, vocab_size=290, model="unigram"),
        "huggingface": HuggingFaceTokenizer(byte_level()),
    }


KINDS = ["byte", "char", "bpe", "unigram", "huggingface"]


def unicode_texts() -> list[str]:
    """Hard cases, and random text from all of Unicode."""
    rng = random.Random(7)
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    hard = [
        "",
        " ",
        "  a  ",
        "\n\n\t\r\n",
        "\u2581",
        "a\u2581 b",
        "\u2581\u2581",
        "<s>",
        "</s><unk>",
        "<0x0A>",
        "\x00\x01",
        "e\u0301 é",
        "👩‍👩‍👧‍👦",
        "\ufeffbom",
        "ﬁ ligature",
        "１２３",
        "\u200b",
        "ไทย",
        "\U0010ffff",
        "<|endoftext|>",
        "x\u0085y\u2028z",
    ]
    return hard + ["".join(map(chr, rng.choices(points, k=40))) for _ in range(60)]


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_back_exactly(every, kind):
    for text in unicode_texts():
        ids = every[kind].encode(text)
        assert all(0 <= i < every[kind].vocab_size for i in ids)
        assert every[kind].decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_never_emits_half_a_character(every, kind):
    for text in unicode_texts():
        stream = every[kind].stream()
        pieces = [stream.push(i) for i in every[kind].encode(text)] + [stream.flush()]
        assert "".join(pieces) == text
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_stream_ends_with_a_replacement(every, kind):
    ids = every[kind].encode("\U0001f600")
    if len(ids) > 1:
        stream = every[kind].stream()
        text = "".join(map(stream.push, ids[:-1]))
        assert text == ""
        assert set(stream.flush()) == {"\ufffd"}


@pytest.mark.parametrize("kind", KINDS)
def test_storage_and_pickle_keep_every_id(every, kind, tmp_path):
    tokenizer, text = every[kind], "def café(x): return 1\n"
    save_tokenizer(tokenizer, tmp_path / "t")
    for twin in (load_tokenizer(tmp_path / "t"), pickle.loads(pickle.dumps(tokenizer))):
        assert twin.encode(text) == tokenizer.encode(text)
        assert twin.fingerprint == tokenizer.fingerprint
        assert (twin.bos_id, twin.eos_id, twin.special_tokens) == (
            tokenizer.bos_id,
            tokenizer.eos_id,
            tokenizer.special_tokens,
        )
    assert not [p for p in (tmp_path / "t").iterdir() if "partial" in p.name]


def test_files_of_others_load(tmp_path, every):
    (tmp_path / "tokenizer.json").write_bytes(byte_level())
    (tmp_path / "m.model").write_bytes(every["bpe"].model)
    assert load_tokenizer(tmp_path).kind == "huggingface"
    assert load_tokenizer(tmp_path / "m.model").encode(TEXTS[0]) == every["bpe"].encode(TEXTS[0])


def test_special_tokens_come_only_on_request(every):
    for kind, mark in (("byte", "<|endoftext|>"), ("bpe", "<|user|>"), ("huggingface", "<|endoftext|>")):
        tokenizer = every[kind]
        text = f"a{mark}b"
        assert tokenizer.special_tokens[mark] not in tokenizer.encode(text)
        ids = tokenizer.encode(text, special=True)
        assert tokenizer.special_tokens[mark] in ids
        assert tokenizer.decode(ids) == "ab"
        assert tokenizer.decode(ids, special=True) == text
    assert every["bpe"].bos_id is None
    assert every["bpe"].encode("a", eos=True) == [*every["bpe"].encode("a"), every["bpe"].eos_id]


def test_ids_equal_those_of_the_libraries(every):
    text = TEXTS[0]
    assert every["bpe"].encode(text) == every["bpe"].processor.encode(text)
    assert every["huggingface"].encode(text) == hf.Tokenizer.from_buffer(byte_level()).encode(text).ids


def test_what_opens_a_text_is_what_its_file_says(every):
    assert (every["bpe"].opener, every["char"].opener) == (every["bpe"].eos_id, None)
    inner = hf.Tokenizer.from_buffer(byte_level())
    assert HuggingFaceTokenizer(inner.to_str().encode(), bos="<|endoftext|>").opener == 0  # no template: its own mark
    inner.post_processor = hf.processors.ByteLevel()
    assert HuggingFaceTokenizer(inner.to_str().encode(), bos="<|endoftext|>").opener is None  # as GPT-2
    inner.post_processor = hf.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert HuggingFaceTokenizer(inner.to_str().encode()).opener == 0  # as Llama


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_long_texts_have_the_ids_of_whole_ones(every, kind):
    rng = random.Random(5)
    words = ["def", "f(x)", "\n", "\n\n", " ", "    ", "naïve", "to be", "é", "\t", "\r\n", "<s>"]
    for _ in range(20):
        text = " ".join(rng.choices(words, k=900))
        assert every[kind].encode(text) == every[kind].processor.encode(text)


def test_sentencepiece_learns_from_the_text(every):
    ids = every["bpe"].encode(TEXTS[1])
    assert len(ids) < len(TEXTS[1]) / 2
    assert every["bpe"].vocab_size == 330


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda t: t["byte"].encode("a\ud800"), "lone surrogate"),
        (lambda t: t["byte"].decode([300]), "outside the vocabulary"),
        (lambda t: t["bpe"].decode([-1]), "outside the vocabulary"),
        (lambda t: t["byte"].encode("a", bos=True), "no bos token"),
        (lambda t: CharTokenizer.train(["ab"]).encode("abc"), "not in the training text"),
        (lambda t: CharTokenizer.train([]), "no text"),
        (lambda t: CharTokenizer(["ab"]), "no alphabet"),
        (lambda t: SentencePieceTokenizer.train(["ab"], vocab_size=2000), "larger than the text supports"),
        (
            lambda t: SentencePieceTokenizer.train(["ab cd"], vocab_size=2000, model="unigram"),
            "larger than the text supports",
        ),
        (lambda t: SentencePieceTokenizer.train(["ab"], vocab_size=100), "too small"),
        (
            lambda t: SentencePieceTokenizer.train(["".join(map(chr, range(0x4E00, 0x5000)))] * 3, vocab_size=300),
            "more characters",
        ),
        (lambda t: SentencePieceTokenizer.train([], vocab_size=300), "could not be trained"),
        (lambda t: SentencePieceTokenizer(b"junk"), "no SentencePiece model"),
        (lambda t: HuggingFaceTokenizer(b"{}"), "no tokenizer.json"),
        (lambda t: HuggingFaceTokenizer(byte_level(), eos="<nope>"), "no such special token"),
        (lambda t: rebuild({"kind": "bytee"}, {}), "did you mean 'byte'"),
        (lambda t: rebuild({"kind": "sentencepiece"}, {}), "cannot be rebuilt"),
    ],
)
def test_refusals_name_the_mistake(every, call, text):
    with pytest.raises(TokenizerError, match=text):
        call(every)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("tokenizer_config.json", b"{", "tokenizer_config.json: this file is no JSON"),
        ("tokenizer_config.json", b"\xff\xfe\0", "tokenizer_config.json: this file is no JSON"),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json: this file is no JSON"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json: this file is no settings"),
        ("tokenizer_config.json", b'{"kind": "char"}', "folder: the char tokenizer cannot be rebuilt"),
        ("tokenizer_config.json", b'{"kind": "char", "odd": 1}', "folder: the char tokenizer cannot be rebuilt"),
        ("tokenizer.json", b"{", "tokenizer.json: this is no tokenizer.json"),
        ("tokenizer.json", b"", "tokenizer.json: this is no tokenizer.json"),
        ("tokenizer.model", b"junk", "tokenizer.model: these bytes are no SentencePiece model"),
    ],
)
def test_a_broken_file_is_named_with_what_to_do(name, content, text, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=text) as refused:
        load_tokenizer(folder)
    assert refused.value.fix


def test_models_of_others_decode_as_their_library_does(tmp_path):
    """Such as Llama's: a space before the text that is none, and characters that are not known."""
    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=target, vocab_size=35, byte_fallback=False, minloglevel=2
    )
    tokenizer = SentencePieceTokenizer(target.getvalue())
    processor, rng = tokenizer.processor, random.Random(3)
    ids = tokenizer.encode("to be or \u4e16")
    assert tokenizer.decode(ids) == processor.decode(ids) == "to be or  \u2047 "
    for _ in range(50):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 40))]
        stream = tokenizer.stream()
        assert tokenizer.decode(ids) == processor.decode(ids)
        assert "".join(map(stream.push, ids)) + stream.flush() == processor.decode(ids)
    assert tokenizer.decode([*tokenizer.encode("be"), tokenizer.eos_id], special=True) == "be</s>"


def test_a_text_is_no_tokenizer(tmp_path):
    (tmp_path / "rain.txt").write_text("it rains")
    with pytest.raises(TokenizerError, match="this file is no tokenizer") as caught:
        load_tokenizer(tmp_path / "rain.txt")
    assert "tokenizer=sentencepiece data.path=" in caught.value.fix
