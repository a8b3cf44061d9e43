"""A corpus from a config: cache, splits, blends, and refusals."""

from __future__ import annotations

import json

import pytest
import torch

from nemolet.data import Corpus, TextFiles, TokenizerSpec, tokenize
from nemolet.errors import DataError, TokenizerError
from nemolet.tokenizers import ByteTokenizer


def test_a_text_is_split_at_its_end(poem, tmp_path):
    corpus = Corpus(path=str(poem), valid_fraction=0.1, sequence_length=32, batch_size=4, cache=str(tmp_path))
    prepared = corpus.prepare(TokenizerSpec("char"))
    text = poem.read_text()
    split = prepared.valid[0]
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


def test_token_files_are_read_as_they_are(poem, tmp_path):
    tokenize(TextFiles([poem]), tmp_path / "t", ByteTokenizer())
    corpus = Corpus(path=str(tmp_path / "t.bin"), sequence_length=16, batch_size=2, order="sequential")
    batch = next(iter(corpus.prepare(TokenizerSpec("byte")).train_loader()))
    assert bytes(batch["tokens"][0].tolist()) == poem.read_bytes()[:16]
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    with pytest.raises(DataError, match="cannot train a tokenizer"):
        corpus.prepare(TokenizerSpec("char"))


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ÿ" * 100)
    tokenize(TextFiles([path]), tmp_path / "t", ByteTokenizer())
    from nemolet.tokenizers import CharTokenizer

    with pytest.raises(DataError, match="outside the vocabulary"):
        Corpus(path=str(tmp_path / "t.bin"), sequence_length=8).prepare(CharTokenizer(["a", "b"]))


def test_a_vocabulary_larger_than_the_text_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("short text")
    with pytest.raises(TokenizerError, match="larger than the text supports"):
        Corpus(path=str(path), cache=str(tmp_path / "c")).prepare(TokenizerSpec(vocab_size=5000))
