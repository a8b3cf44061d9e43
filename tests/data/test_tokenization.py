"""Tokenising: the same result on any number of workers, against encoding each document."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nemolet.data import IndexedTokens, TextFiles, tokenize
from nemolet.errors import DataError
from nemolet.tokenizers import ByteTokenizer, SentencePieceTokenizer


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [f"document {i}: " + "some words \u2581 and é " * (i % 50) for i in range(3000)]
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return path, texts


def test_documents_are_those_encoded_one_by_one(records, tmp_path):
    path, texts = records
    tokenizer = SentencePieceTokenizer.train(texts[:100], vocab_size=300)
    done = tokenize(TextFiles([path]), tmp_path / "out", tokenizer)
    tokens = IndexedTokens(tmp_path / "out")
    assert done.documents == len(tokens) == len(texts)
    assert done.tokens == len(tokens.tokens)
    assert done.text_bytes == sum(len(t.encode()) for t in texts)
    for index in (0, 1, 77, 2999):
        assert tokens.document(index).tolist() == [*tokenizer.encode(texts[index]), tokenizer.eos_id]


def test_workers_change_nothing(records, tmp_path):
    path, _ = records
    seen = []
    for workers in (1, 2):
        tokenize(TextFiles([path]), tmp_path / str(workers), ByteTokenizer(), workers=workers, progress=seen.append)
    one, two = (IndexedTokens(tmp_path / str(workers)) for workers in (1, 2))
    assert np.array_equal(one.tokens, two.tokens)
    assert np.array_equal(one.lengths, two.lengths)
    assert sum(seen) == 2 * sum(len(t.encode()) for t in records[1])


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_reaches_the_caller_and_leaves_nothing(tmp_path, workers):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(DataError, match=r"a.jsonl:2"):
        tokenize(TextFiles([path]), tmp_path / "out" / "t", ByteTokenizer(), workers=workers)
    assert not list((tmp_path / "out").iterdir())
