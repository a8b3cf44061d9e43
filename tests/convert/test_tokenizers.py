"""The ids of a text are those of transformers' tokenizer, whatever its kind puts before and after a text."""

from __future__ import annotations

import json

import pytest

from nemolet.data import ParallelTexts
from nemolet.data.encoding import TextEncoding
from nemolet.language.decoding import encode_prompt

from .tiny_tokenizers import TOKENIZERS, ours, save_tokenizer

TEXT = "to be, naïve f(x)"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_are_those_of_transformers(kind, tmp_path):
    theirs, mine = save_tokenizer(kind, tmp_path), ours(tmp_path)
    assert mine.encode(TEXT) == theirs(TEXT, add_special_tokens=False).input_ids
    whole = theirs(TEXT).input_ids
    assert TextEncoding(mine).text(TEXT, "here") == whole
    after = mine.marks[1]
    assert encode_prompt(mine, TEXT) == whole[: len(whole) - len(after)]
    assert mine.decode(whole) == theirs.decode(whole, skip_special_tokens=True)


def test_a_token_that_looks_like_a_beginning_is_none(tmp_path):
    """Qwen has no beginning of text, although a token of this name may be among its own."""
    save_tokenizer("qwen2", tmp_path)
    mine = ours(tmp_path)
    assert "<s>" in mine.special_tokens
    assert (mine.bos_id, mine.opener, mine.marks) == (None, None, ([], []))


def test_targets_end_and_begin_as_the_decoder_of_the_model_does(tmp_path):
    """As transformers shifts its labels: T5 begins with its padding, BART with its end."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"source": "to be", "target": "or not"}) + "\n")
    for kind, start in {"t5": 0, "bart": 2}.items():
        theirs = save_tokenizer(kind, tmp_path / kind)
        data = ParallelTexts(path=str(path), start=start).prepare(ours(tmp_path / kind), split=False)
        labels = theirs("or not").input_ids
        (sample,) = data.train
        assert sample["source"] == theirs("to be").input_ids
        assert (sample["labels"], sample["tokens"]) == (labels, [start, *labels[:-1]])
