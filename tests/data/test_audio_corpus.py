"""From settings to prepared data: targets, splits, policies, real recordings."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

import nemolet as nl
from nemolet.data.audio_corpus import AudioCorpus
from nemolet.data.corpus import TokenizerSpec
from nemolet.data.manifest import utterances_of_arrays
from nemolet.errors import DataError

RATE = 8000
CHAR = TokenizerSpec(kind="char")


def entries(count=20, **fields):
    random = np.random.default_rng(0)
    waves = [0.1 * random.standard_normal(1000 + 10 * n) for n in range(count)]
    return utterances_of_arrays(waves, sample_rate=RATE, **fields)


def corpus(**settings):
    return AudioCorpus(**{"sample_rate": RATE, "batch_seconds": 1.0, "valid_fraction": 0.2, **settings})


def test_texts_become_tokens():
    data = corpus().prepare(CHAR, entries=entries(texts=["one", "two"] * 10))
    assert data.tokenizer.vocab_size == data.sizes["vocab_size"] == 5
    assert (len(data.train), len(data.valid)) == (16, 4)
    batch = next(iter(data.train_loader()))
    assert tuple(batch) == data.fields == ("audio", "audio_lengths", "labels")
    assert {data.tokenizer.decode(row[row >= 0].tolist()) for row in batch["labels"]} <= {"one", "two"}
    assert "16 utterances" in data.summary and data.derived(1.0) == {}
    assert data.unit.count(batch["audio"].numel()) == batch["audio"].numel() / RATE


def test_labels_become_numbers():
    data = corpus(target="label").prepare(entries=entries(labels=list("abcd") * 5))
    assert data.classes == ("a", "b", "c", "d") and data.sizes == {"classes": 4}
    assert data.tokenizer is None
    batch = next(iter(data.valid_loader()))
    assert batch["labels"].shape == (len(batch["audio"]),)


def test_speakers_may_be_set_aside():
    given = entries(texts=["a"] * 20, speakers=list("xyzz") * 5)
    data = corpus(valid_speakers=["z"]).prepare(CHAR, entries=given)
    assert {u.utterance.speaker for u in data.valid} == {"z"} and len(data.valid) == 10
    assert {u.utterance.speaker for u in data.train} == {"x", "y"}
    with pytest.raises(DataError, match=r"no recordings of these speakers[\s\S]*x, y, z[\s\S]*nobody"):
        corpus(valid_speakers=["nobody"]).prepare(CHAR, entries=given)
    with pytest.raises(DataError, match=r"array 2: a speaker that training does not have: z"):
        corpus(target="speaker", valid_speakers=["z"]).prepare(entries=given)


def test_audio_alone_needs_no_labels():
    data = corpus(target="none").prepare(entries=entries())
    assert tuple(next(iter(data.train_loader()))) == data.fields == ("audio", "audio_lengths")


def test_joined_texts_know_the_space_between_them():
    data = corpus(join=(2, 2), pause=(0.0, 0.0), batch_seconds=9.0).prepare(CHAR, entries=entries(texts=["a"] * 20))
    batch = next(iter(data.train_loader()))
    assert {data.tokenizer.decode(row[row >= 0].tolist()) for row in batch["labels"]} == {"a a"}


def test_the_split_is_always_the_same_and_loaders_share_what_is_decoded():
    given = entries(texts=["a"] * 20)
    one, two = (corpus(seed=seed).prepare(CHAR, entries=given) for seed in (1, 2))
    assert [u.utterance.where for u in one.valid] == [u.utterance.where for u in two.valid]
    next(iter(one.train_loader()))
    assert one.train_loader().batcher.store.kept


def test_bad_entries_are_an_error_or_are_left_out_with_a_list(caplog):
    given = entries(texts=["a", "b"] * 9 + ["a", ""])
    given[3] = replace(given[3], text=None)
    with pytest.raises(DataError, match=r"2 of the entries cannot be used[\s\S]*array 3[\s\S]*array 19"):
        corpus().prepare(CHAR, entries=given)
    with caplog.at_level(logging.WARNING, "nemolet"):
        data = corpus(on_bad="skip").prepare(CHAR, entries=given)
    assert len(data.train) + len(data.valid) == 18 and "2 left out" in data.summary
    assert "array 3: the field text is missing" in caplog.text and "array 19: the text is empty" in caplog.text


def test_texts_outside_the_vocabulary_and_strange_labels_are_found():
    valid = entries(4, texts=["aa", "az", "a", "a"])
    with pytest.raises(DataError, match=r"array 1: a text outside the vocabulary: 'z'"):
        corpus().prepare(CHAR, entries=entries(texts=["a"] * 20), valid_entries=valid)
    data = corpus(on_bad="skip").prepare(CHAR, entries=entries(texts=["a"] * 20), valid_entries=valid)
    assert len(data.valid) == 3
    strange = entries(2, labels=["a", "q"])
    with pytest.raises(DataError, match=r"array 1: a label that training does not have: q"):
        corpus(target="label").prepare(entries=entries(labels=["a"] * 20), valid_entries=strange)


def test_too_long_and_too_short_are_left_out_and_counted():
    data = corpus(min_seconds=0.13, max_seconds=0.14).prepare(CHAR, entries=entries(texts=["a"] * 20))
    assert len(data.train) + len(data.valid) == 9 and "11 left out" in data.summary


def test_another_rate_is_refused_where_resampling_is():
    with pytest.raises(DataError, match="another sample rate: 8000 instead of 16000"):
        corpus(sample_rate=16000, resample=False).prepare(CHAR, entries=entries(texts=["a"] * 20))


@pytest.mark.parametrize(
    "settings, given, message",
    [
        ({}, None, "no data was named"),
        ({}, entries(1, texts=["a"]), "nothing is left for training"),
        ({"target": "text"}, entries(texts=["a"] * 20), "texts need a tokenizer"),
    ],
)
def test_impossible_data_is_refused(settings, given, message):
    with pytest.raises(DataError, match=message):
        corpus(**settings).prepare(entries=given)


def test_a_config_builds_it():
    built = nl.build({"_target_": "nemolet.data.AudioCorpus", "path": "x.jsonl", "join": [3, 7], "sample_rate": 8000})
    assert built == AudioCorpus(path="x.jsonl", join=[3, 7], sample_rate=8000)
    assert built.typical["N"] == 40000
    with pytest.raises(nl.errors.ConfigError, match="min_seconds is at least 0"):
        nl.build({"_target_": "nemolet.data.AudioCorpus", "min_seconds": 5, "max_seconds": 2})


def test_two_channels_of_a_meeting_become_frames_of_speech(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.1, 0.1, (RATE, 2)), RATE)
    lines = [
        {"audio_filepath": "a.wav", "segments": [{"start": 0.2, "end": 0.4}]},
        {"audio_filepath": "a.wav", "offset": 0.3, "duration": 0.5, "segments": [{"start": 0.2, "end": 0.4}]},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = corpus(path=str(tmp_path / "m.jsonl"), target="segments", hop=0.1, valid_fraction=0.5).prepare()
    labels = {u.utterance.where: b["labels"][0] for u, b in zip(data.train, data.train_loader())}
    labels |= {u.utterance.where: b["labels"][0] for u, b in zip(data.valid, data.valid_loader())}
    assert [row.tolist() for _, row in sorted(labels.items())] == [[0, 0, 1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]


def test_digits_of_real_speakers(shared_data):
    path = shared_data / "fsdd" / "valid.jsonl"
    data = corpus(path=str(path), valid_speakers=["theo"], batch_seconds=20.0).prepare(CHAR)
    assert (len(data.train), len(data.valid)) == (200, 50)
    loader = data.train_loader()
    total = sum(len(batch["audio"]) for _, batch in zip(loader.plan.epoch(0), loader))
    assert total == loader.consumed == 200
    assert all(torch.isfinite(batch["audio"]).all() for batch in data.valid_loader())


def test_corrupt_recordings_are_found_before_training(shared_data):
    with pytest.raises(DataError, match=r"2 of the entries[\s\S]*275.flac[\s\S]*32.flac"):
        AudioCorpus(path=str(shared_data / "kws6" / "corrupt"), target="none").prepare()
