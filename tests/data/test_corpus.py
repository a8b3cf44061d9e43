"""A corpus from a config: cache, splits, blends, and refusals."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch

from nemolet.data import Corpus, IndexedWriter, TextFiles, TokenizerSpec, tokenize
from nemolet.data.sources import BlendedText
from nemolet.errors import ConfigError, DataError, TokenizerError
from nemolet.language.decoding import encode_prompt
from nemolet.tokenizers import ByteTokenizer, CharTokenizer


def test_a_text_is_split_at_its_end(poem, tmp_path):
    corpus = Corpus(path=str(poem), valid_fraction=0.1, sequence_length=32, batch_size=4, cache=str(tmp_path))
    prepared = corpus.prepare(TokenizerSpec("char"))
    text = poem.read_text()
    split = prepared.valid[0]
    assert not split.led.any()
    valid = prepared.tokenizer.decode(split.tokens[int(split.starts[0]) :].tolist())
    assert text.endswith(valid)
    assert len(valid) == int(len(text) * 0.1)
    assert sum(int(split.lengths.sum()) for split in prepared.train) == len(text) - len(valid)
    assert prepared.valid_bytes_per_token == 1.0


def test_many_documents_are_split_as_wholes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document {i} " * 5}) for i in range(100)))
    prepared = Corpus(path=str(path), valid_fraction=0.1, sequence_length=16, cache=str(tmp_path)).prepare(
        ByteTokenizer()
    )
    assert len(prepared.valid[0].lengths) == 10
    assert len(prepared.train[0].lengths) == 90
    assert not set(prepared.valid[0].starts.tolist()) & set(prepared.train[0].starts.tolist())


def test_the_cache_is_used_until_the_file_changes(poem, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(poem.read_text())
    corpus = Corpus(path=str(path), sequence_length=32, cache=str(tmp_path / "cache"))
    made = []

    def progress(what, total):
        made.append(what)
        return lambda done: None

    for _ in range(2):
        corpus.prepare(TokenizerSpec(vocab_size=300), progress=progress)
    assert len(made) == 1
    path.write_text(poem.read_text() + "more")
    corpus.prepare(TokenizerSpec(vocab_size=300), progress=progress)
    assert len(made) == 2
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")]


def test_a_failed_preparation_leaves_no_cache(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\nbad\n')
    with pytest.raises(DataError):
        Corpus(path=str(path), cache=str(tmp_path / "cache")).prepare(ByteTokenizer())
    assert not list((tmp_path / "cache").iterdir())


def test_a_blend_reads_all_its_files(poem, tmp_path):
    other = tmp_path / "b.txt"
    other.write_text("0123456789" * 2000)
    corpus = Corpus(path={str(poem): 3, str(other): 1}, sequence_length=16, batch_size=100, cache=str(tmp_path / "c"))
    prepared = corpus.prepare(TokenizerSpec("byte"))
    tokens = next(iter(prepared.train_loader()))["tokens"]
    digits = ((tokens >= 48) & (tokens < 58)).all(dim=1).sum().item()
    assert digits == 25
    assert len(list(prepared.valid_loader())) > 0


def blend_of(tmp_path, weights):
    """A blend of two texts, the second of which is ten times as long."""
    for name, text, times in (("a", "abab cdcd\n", 30), ("b", "xyxy zwzw\n", 300)):
        (tmp_path / f"{name}.txt").write_text(text * times)
    paths = {str(tmp_path / f"{name}.txt"): weight for name, weight in weights.items()}
    return Corpus(path=paths, sequence_length=8, cache=str(tmp_path / "cache"))


def test_the_tokenizer_of_a_blend_knows_all_its_texts(tmp_path):
    tokenizer = blend_of(tmp_path, {"a": 1, "b": 1}).prepare(TokenizerSpec("char")).tokenizer
    assert set(tokenizer.characters) == set("abcdxyzw \n")


def test_the_tokenizer_of_a_blend_sees_each_text_as_often_as_training_does(tmp_path):
    room = TokenizerSpec(vocab_size=272)  # 4 ids beyond the bytes, the marks, the line end and the characters
    for heavy, light, weights in (("abcd", "xyzw", {"a": 30, "b": 1}), ("xyzw", "abcd", {"a": 1, "b": 30})):
        tokenizer = blend_of(tmp_path, weights).prepare(room).tokenizer
        longer = [piece.decode() for piece in tokenizer.table if len(piece) > 1 and piece not in (b"<unk>", b"</s>")]
        assert sum(any(c in heavy for c in piece) for piece in longer) > 0
        assert not any(c in light for piece in longer for c in piece), longer


def test_texts_of_a_blend_come_in_the_proportion_of_their_weights(tmp_path):
    blend_of(tmp_path, {"a": 1, "b": 1})
    a, b = (TextFiles([tmp_path / f"{name}.txt"]) for name in "ab")
    taken = [piece.text[0] for piece in BlendedText([a, b], [1, 2]).pieces()]
    assert taken.count("x") == 1
    assert taken.count("a") in (5, 6)  # 300 characters each, beside 3000


def test_an_empty_text_of_a_blend_does_not_hold_it_up(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "empty.txt").write_text("")
    (tmp_path / "a.txt").write_text("a")
    sources = [TextFiles([tmp_path / "none"]), TextFiles([tmp_path / "a.txt"])]
    assert [piece.text for piece in BlendedText(sources, [1, 1]).pieces()] == ["a"]


@pytest.mark.parametrize("weight", [0, -1])
def test_a_weight_that_reads_nothing_is_refused(tmp_path, weight):
    with pytest.raises(ConfigError, match="leave out what is not to be read"):
        blend_of(tmp_path, {"a": 1, "b": weight})


def test_a_share_that_is_too_small_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(DataError, match="too small"):
        blend_of(tmp_path, {"a": 1, "b": 5000}).prepare(TokenizerSpec("char"))
    assert not (tmp_path / "cache").exists()


def test_a_token_file_anywhere_in_a_blend_needs_its_tokenizer(tmp_path):
    corpus = blend_of(tmp_path, {"a": 1})
    tokenize(TextFiles([tmp_path / "a.txt"]), tmp_path / "t", ByteTokenizer())
    corpus = Corpus(path={**corpus.path, str(tmp_path / "t.bin"): 1}, sequence_length=8, cache=str(tmp_path))
    with pytest.raises(DataError, match="cannot train a tokenizer"):
        corpus.prepare(TokenizerSpec("char"))


def test_token_files_are_read_as_they_are(poem, tmp_path):
    tokenize(TextFiles([poem]), tmp_path / "t", ByteTokenizer())
    corpus = Corpus(path=str(tmp_path / "t.bin"), sequence_length=16, batch_size=2, order="sequential")
    batch = next(iter(corpus.prepare(TokenizerSpec("byte")).train_loader()))
    opener, *text = batch["tokens"][0].tolist()
    assert opener == ByteTokenizer().eos_id
    assert bytes(text) == poem.read_bytes()[:15]
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    with pytest.raises(DataError, match="cannot train a tokenizer"):
        corpus.prepare(TokenizerSpec("char"))


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ÿ" * 100)
    tokenize(TextFiles([path]), tmp_path / "t", ByteTokenizer())
    with pytest.raises(DataError, match="outside the vocabulary"):
        Corpus(path=str(tmp_path / "t.bin"), sequence_length=8).prepare(CharTokenizer(["a", "b"]))


def test_a_vocabulary_larger_than_the_text_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("short text")
    with pytest.raises(TokenizerError, match="larger than the text supports"):
        Corpus(path=str(path), cache=str(tmp_path / "c")).prepare(TokenizerSpec(vocab_size=5000))


def test_a_text_with_nothing_to_predict_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("hi\n")
    with pytest.raises(DataError, match=r"(?s)nothing to predict|shorter than one sequence"):
        prepared = Corpus(path=str(path), sequence_length=8, cache=str(tmp_path / "c")).prepare(ByteTokenizer())
        prepared.derived(1.0)


CASES = {
    "byte": (ByteTokenizer(), True),
    "byte, no marks": (ByteTokenizer(), False),
    "char": (CharTokenizer(list("abcdefghijklmnopqrstuvwxyz \n")), True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("count", [1, 100])
def test_every_document_begins_as_a_prompt_does(case, split, count, tmp_path):
    tokenizer, marks = CASES[case]
    texts = [f"{'abc'[i % 3]} is the first word of this one\n" * (1 + 200 // count) for i in range(count)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokenize(TextFiles([path]), tmp_path / "t", tokenizer, marks=marks)
    corpus = Corpus(path=str(tmp_path / "t.bin"), sequence_length=64, batch_size=4, order="sequential")
    prepared = corpus.prepare(tokenizer, split=split)
    prompt = encode_prompt(tokenizer, texts[0][:9])
    if count == 1 or not split:  # the first document is for training
        assert next(iter(prepared.train_loader()))["tokens"][0, : len(prompt)].tolist() == prompt
    for batch in prepared.valid_loader():
        if "segments" not in batch:
            continue
        firsts = batch["tokens"][(batch["positions"] == 0) & (batch["segments"] > 1)]
        assert len(firsts)
        if tokenizer.opener is not None:
            assert set(firsts[:-1].tolist()) <= {tokenizer.opener}


def test_the_rest_of_a_document_has_no_opener(poem, tmp_path):
    prepared = Corpus(path=str(poem), sequence_length=16, cache=str(tmp_path)).prepare(ByteTokenizer())
    opener = ByteTokenizer().eos_id
    assert prepared.valid_sampler().sample(0).tokens[0] != opener
    assert (prepared.train[0].led.tolist(), prepared.valid[0].led.tolist()) == ([True], [False])


@pytest.mark.parametrize("paths", [1, 2])
def test_memory_does_not_grow_with_the_files(paths, tmp_path):
    """Files that are larger than what may be used at any moment."""
    files = {}
    for number in range(paths):
        with IndexedWriter(tmp_path / str(number), vocab_size=257) as writer:
            for _ in range(20):
                writer.write(np.full(1_000_000, 97), ends=[])
        files[str(tmp_path / f"{number}.bin")] = 1.0
    tracemalloc.start()
    prepared = Corpus(path=files, sequence_length=1024, batch_size=4).prepare(ByteTokenizer())
    next(iter(prepared.train_loader()))
    next(iter(prepared.valid_loader()))
    assert prepared.valid_bytes_per_token == 1.0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000 < 40_000_000 * paths


def test_a_validation_text_may_be_short_and_counts_to_its_last_token(poem, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the rain")
    corpus = Corpus(path=str(poem), valid_path=str(short), sequence_length=32, cache=str(tmp_path / "c"))
    (batch,) = corpus.prepare(ByteTokenizer()).valid_loader()
    labels = batch["labels"][batch["labels"] != -100].tolist()
    assert labels == [*b"the rain", 256]


def test_a_length_that_nobody_knows_is_asked_for(poem, tmp_path):
    corpus = Corpus(path=str(poem), sequence_length=None, cache=str(tmp_path))
    with pytest.raises(DataError, match=r"data.sequence_length=256"):
        corpus.prepare(ByteTokenizer()).train_loader()


def test_a_few_words_of_great_weight_make_no_library(tmp_path):
    (tmp_path / "long.txt").write_text("alpha beta gamma\n" * 1000)
    (tmp_path / "short.txt").write_text("word\n")
    sources = [TextFiles([tmp_path / "long.txt"]), TextFiles([tmp_path / "short.txt"])]
    taken = [piece.text for piece in BlendedText(sources, [1, 10_000]).pieces()]
    assert taken.count("word\n") + taken.count("word") == 64
    assert sum(text.startswith("alpha") for text in taken) > 0
