"""Examples become batches: aligned, padded, sharded, resumable; labels and lengths follow explicit policies."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from nemolet.data import (
    Corpus,
    IntentsAndSlots,
    LabelledTexts,
    MaskedText,
    MultiLabelledTexts,
    ParallelTexts,
    Questions,
    SimilarTexts,
    TaggedWords,
    TextEncoding,
    TokenizerSpec,
)
from nemolet.data.batches import Batching, BucketLoader, PassLoader
from nemolet.data.encoding import split_words
from nemolet.data.labelled import NO_ANSWER, windows
from nemolet.data.prepared import DummyBatch
from nemolet.errors import DataError
from nemolet.tokenizers import ByteTokenizer, SentencePieceTokenizer
from nemolet.types import IGNORED, LabelsB, MaskBT, TokenIdsBT

PORTS = {"tokens": TokenIdsBT, "mask": MaskBT, "labels": LabelsB}
BYTES = ByteTokenizer()


def table(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def texts(tmp_path):
    rows = [{"text": "x" * (1 + i % 7), "label": "ab"[i % 2]} for i in range(40)]
    return table(tmp_path / "texts.jsonl", rows)


def samples(count):
    return [{"tokens": list(range(1, 2 + i % 9)), "labels": i} for i in range(count)]


# ---------------------------------------------------------------------------------------- batches


def test_each_pass_gives_every_sample_once_and_like_lengths_together():
    loader = BucketLoader(Batching(samples(64), PORTS, batch_size=8), seed=3)
    batches = list(itertools.islice(iter(loader), 16))
    for epoch in (batches[:8], batches[8:]):
        assert sorted(torch.cat([b["labels"] for b in epoch]).tolist()) == list(range(64))
    assert [b["labels"].tolist() for b in batches[:8]] != [b["labels"].tolist() for b in batches[8:]]
    padding = sum(int((~b["mask"]).sum()) for b in batches)
    assert padding < 0.3 * sum(b["mask"].numel() for b in batches)
    assert all((b["tokens"] != 0).equal(b["mask"]) for b in batches)


def test_a_loader_goes_on_where_another_stood():
    make = lambda: BucketLoader(Batching(samples(50), PORTS, batch_size=8), seed=3)  # noqa: E731
    whole, first, second = make(), make(), make()
    expected = [b["labels"].tolist() for b in itertools.islice(iter(whole), 20)]
    seen = [b["labels"].tolist() for b in itertools.islice(iter(first), 9)]
    second.load_state_dict(first.state_dict())
    assert seen + [b["labels"].tolist() for b in itertools.islice(iter(second), 11)] == expected


def test_ranks_share_a_pass():
    parts = [BucketLoader(Batching(samples(48), PORTS, batch_size=4, rank=r, ranks=3), seed=1) for r in range(3)]
    labels = [torch.cat([b["labels"] for b in itertools.islice(iter(p), 4)]).tolist() for p in parts]
    assert sorted(sum(labels, [])) == list(range(48))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_counts_each_sample_once_and_ranks_keep_step(ranks):
    loaders = [PassLoader(Batching(samples(9), PORTS, batch_size=2, rank=r, ranks=ranks)) for r in range(ranks)]
    assert len({len(list(loader)) for loader in loaders}) == 1
    batches = [b for loader in loaders for b in loader if not isinstance(b, DummyBatch)]
    labels = [label for b in batches for label in b["labels"].tolist()]
    assert sorted(labels) == list(range(9))


def test_no_samples_are_no_batches():
    with pytest.raises(DataError, match="no examples"):
        Batching([], PORTS, batch_size=2)


# ---------------------------------------------------------------------------------------- sources


def test_texts_and_their_classes(texts):
    data = LabelledTexts(path=texts, batch_size=4).prepare(BYTES)
    assert data.sizes == {"vocab_size": 257, "labels": ["a", "b"]}
    assert (len(data.train), len(data.valid)) == (36, 4)
    batch = next(iter(data.train_loader()))
    assert set(batch) == set(data.fields)
    row, keep = batch["tokens"][0], batch["mask"][0]
    assert BYTES.decode(row[keep].tolist()) == "x" * (int(keep.sum()) - 1)
    assert row[keep][-1] == BYTES.eos_id


def test_labels_that_nobody_knows_are_listed_with_their_lines(texts, tmp_path):
    valid = table(tmp_path / "v.jsonl", [{"text": "x", "label": "a"}, {"text": "x", "label": "aa"}])
    with pytest.raises(DataError) as caught:
        LabelledTexts(path=texts, valid_path=valid).prepare(BYTES)
    assert "v.jsonl:2: 1 labels are not in the label set" in str(caught.value)
    assert "did you mean 'a'" in str(caught.value)
    given = LabelledTexts(path=texts, valid_path=valid, labels=("b", "a", "aa")).prepare(BYTES)
    assert given.sizes["labels"] == ["b", "a", "aa"]


def test_classes_may_be_left_out(texts):
    data = LabelledTexts(path=texts, without=("b",)).prepare(BYTES)
    assert data.sizes["labels"] == ["a"]


@pytest.mark.parametrize("text, policy", [("", "empty"), (" \n", "empty"), ("long" * 9, "too_long")])
def test_empty_and_long_texts_are_refused_or_left_out(tmp_path, text, policy):
    rows = [{"text": "fine", "label": "a"}] * 20 + [{"text": text, "label": "a"}]
    path = table(tmp_path / "t.jsonl", rows)
    with pytest.raises(DataError, match=r"t.jsonl:21"):
        LabelledTexts(path=path, context=16).prepare(BYTES)
    data = LabelledTexts(path=path, context=16, **{policy: "skip"}).prepare(BYTES)
    assert len(data.train) + len(data.valid) == 20
    reason = "empty" if policy == "empty" else "longer than 16 tokens"
    assert f"; 1 left out ({reason}): {path}:21)" in data.summary and data.counts.left_out == 1


def test_long_texts_may_be_cut(tmp_path):
    path = table(tmp_path / "t.jsonl", [{"text": "abcdefgh", "label": "a"}] * 20)
    data = LabelledTexts(path=path, context=4, too_long="truncate").prepare(BYTES)
    assert data.train[0]["tokens"] == [*b"abc", 256]
    assert f"; 20 cut after 4 tokens: {path}:1, {path}:2, {path}:3, ...)" in data.summary
    assert data.counts.left_out == 0


def test_where_no_example_is_left_it_is_said_why(tmp_path):
    path = table(tmp_path / "t.jsonl", [{"text": "abcdefgh", "label": "a"}] * 20)
    with pytest.raises(DataError, match="no example is left") as caught:
        LabelledTexts(path=path, context=4, too_long="skip").prepare(BYTES)
    assert "20 examples; 20 left out (longer than 4 tokens)" in caught.value.found
    other = table(tmp_path / "v.jsonl", [{"text": "abcdefgh", "label": "a"}])
    short = table(tmp_path / "s.jsonl", [{"text": "abc", "label": "a"}])
    with pytest.raises(DataError, match="v.jsonl: no example is left"):
        LabelledTexts(path=short, valid_path=other, context=4, too_long="skip").prepare(BYTES)


def test_several_labels(tmp_path):
    rows = [{"text": "x", "labels": labels} for labels in (["a"], [], ["b", "a"], ["b"]) * 5]
    data = MultiLabelledTexts(path=table(tmp_path / "t.jsonl", rows)).prepare(BYTES)
    assert [s["labels"] for s in data.train[:3]] == [[1, 0], [0, 0], [1, 1]]


def test_words_keep_their_tags_where_they_are_split(tmp_path):
    rows = [{"text": "play naïve songs", "tags": "O B-song I-song", "intent": "Play"}] * 12
    path = table(tmp_path / "t.jsonl", rows)
    tokenizer = SentencePieceTokenizer.train(["play songs play songs"] * 20, vocab_size=275)
    for chosen in (BYTES, tokenizer):
        data = IntentsAndSlots(path=path).prepare(chosen)
        sample = data.train[0]
        assert data.sizes["slots"] == ["O", "B-song", "I-song"]
        assert sample["labels"] == [0, 1, 2]
        firsts = [*sample["words"], len(sample["tokens"]) - 1]
        pieces = [chosen.decode(sample["tokens"][a:b]).strip() for a, b in itertools.pairwise(firsts)]
        assert pieces == ["play", "naïve", "songs"]


def test_each_word_needs_a_tag(tmp_path):
    path = table(tmp_path / "t.jsonl", [{"text": "two words", "tags": "O", "intent": "x"}])
    with pytest.raises(DataError, match="each word needs one tag"):
        IntentsAndSlots(path=path).prepare(BYTES)


def test_words_beyond_the_context_go_with_their_tags(tmp_path):
    path = tmp_path / "t.conll"
    path.write_text("ab\tO\ncd\tB-x\nef\tO\n\n" * 12)
    with pytest.raises(DataError, match=r"t.conll:1"):
        TaggedWords(path=str(path), context=8).prepare(BYTES)
    data = TaggedWords(path=str(path), context=8, too_long="truncate").prepare(BYTES)
    assert data.train[0] == {"tokens": [*b"ab cd", 256], "words": [0, 2], "labels": [0, 1]}


def test_a_long_text_is_read_in_windows_that_overlap():
    text = " ".join(f"w{i}" for i in range(100))
    encoding = TextEncoding(BYTES, 64)
    made = windows("who?", text, encoding, "here")
    assert all(len(w.tokens) == len(w.readable) == len(w.spans) <= 64 for w in made)
    for word in split_words(text):
        holding = [w for w in made if w.places(word.start, word.end) is not None]
        assert holding
        for window in holding:
            first, last = window.places(word.start, word.end)
            assert BYTES.decode(window.tokens[first : last + 1]).strip() == word.text


def test_questions_of_real_data_keep_their_answers(shared_data):
    source = Questions(path=str(shared_data / "xquad_en" / "train.json"), context=384)
    data = source.prepare(TokenizerSpec(vocab_size=1000))
    records = {r.where: r for r in source.read(source.path)}
    assert len(records) == 927
    checked = 0
    for record in list(records.values())[:200]:
        encoding = TextEncoding(data.tokenizer, 384)
        answer = record.values["answers"][0]
        for sample in source.encode(record, encoding, {}):
            if sample["starts"] == NO_ANSWER:  # a window without it
                continue
            said = data.tokenizer.decode(sample["tokens"][sample["starts"] : sample["ends"] + 1]).strip()
            assert answer["text"].replace(" ", "") in said.replace(" ", "")
            checked += 1
    assert checked >= 200


def test_pairs_and_translations(tmp_path):
    pairs = table(tmp_path / "p.jsonl", [{"text": "one", "other": "eins", "source": "a", "target": "b"}] * 12)
    alike = SimilarTexts(path=pairs).prepare(BYTES)
    assert next(iter(alike.valid_loader()))["other_tokens"][0].tolist() == [*b"eins", 256]
    translated = ParallelTexts(path=pairs).prepare(BYTES)
    sample = translated.train[0]
    assert (sample["source"], sample["tokens"], sample["labels"]) == ([97, 256], [256, 98], [98, 256])


# ---------------------------------------------------------------------------------------- masked text


def test_holes_are_where_the_labels_are_and_always_the_same(poem):
    spec = TokenizerSpec(vocab_size=300, special_tokens=("<mask>",))
    source = MaskedText(text=Corpus(path=str(poem), sequence_length=32, batch_size=4), share=0.3)
    data = source.prepare(spec)
    whole = data.text.train_loader().samples
    sampler = data.train_loader().samples
    hidden = []
    for number in range(40):
        holed, full = sampler.sample(number), whole.sample(number)
        chosen = holed.labels != IGNORED
        assert np.array_equal(holed.labels[chosen], full.tokens[chosen])
        assert np.array_equal(holed.tokens[~chosen], full.tokens[~chosen])
        assert np.array_equal(holed.tokens, sampler.sample(number).tokens)
        hidden.append((chosen.mean(), (holed.tokens[chosen] == data.mask).mean()))
    share, masked = np.mean(hidden, axis=0)
    assert 0.25 < share < 0.35
    assert 0.7 < masked < 0.9


def test_a_tokenizer_needs_a_mask(poem):
    with pytest.raises(DataError, match="no mask token"):
        MaskedText(text=Corpus(path=str(poem), sequence_length=32)).prepare(BYTES)
