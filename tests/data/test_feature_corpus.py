"""Features that were computed elsewhere, from files to batches and into a graph."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import nemolet as nl
from nemolet.data.corpus import TokenizerSpec
from nemolet.data.feature_corpus import FeatureCorpus
from nemolet.errors import DataError

TEXTS = ["ab", "b", "aba", "bb", "a", "ab"]


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"u{n}": rng.normal(size=(20 + 5 * n, 3)).astype(np.float16) for n in range(6)}
    np.savez(tmp_path / "arrays.npz", **arrays)
    lines = [{"utt": f"u{n}", "text": text, "speaker": f"s{n // 2}"} for n, text in enumerate(TEXTS)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path, arrays


def corpus(folder, **settings):
    return FeatureCorpus(path=str(folder / "list.jsonl"), arrays=str(folder / "arrays.npz"), batch_size=4, **settings)


def test_the_last_speakers_are_set_aside(files):
    folder, arrays = files
    data = corpus(folder).prepare(TokenizerSpec(kind="char"))
    assert [entry.text for entry in data.valid] == TEXTS[4:]
    assert data.sizes == {"vocab_size": 2}
    batch = next(iter(data.valid_loader()))
    assert set(batch) == set(data.fields)
    row = batch["lengths"].tolist().index(40)
    assert torch.equal(batch["spectrogram"][row, :40], torch.from_numpy(arrays["u4"].astype(np.float32)))
    assert batch["labels"][row].tolist() == [0, -100]
    assert not batch["spectrogram"][row, 40:].any()


def test_every_utterance_is_read_once_in_an_epoch_and_a_loader_goes_on(files):
    data = corpus(files[0]).prepare(TokenizerSpec(kind="char"))
    loader = data.train_loader()
    stream = iter(loader)
    next(stream)
    state = loader.state_dict()
    after = next(stream)
    again = data.train_loader()
    again.load_state_dict(state)
    assert all(torch.equal(tensor, after[name]) for name, tensor in next(iter(again)).items())


def test_a_recognizer_is_snapped_together_for_them(files):
    data = corpus(files[0]).prepare(TokenizerSpec(kind="char"))
    lstm = {"_target_": "nemolet.speech.LSTMEncoder", "bins": 3, "layers": 1, "width": 8, "hidden": 4, "channels": 2}
    head = {"_target_": "nemolet.nn.Head", "in_axis": "D", "out_axis": "V", "width": 8, "vocab": 3}
    normalize = {"_target_": "nemolet.speech.Normalize"}
    modules = {"normalize": normalize, "encoder": lstm, "head": head}
    model = nl.build({"_target_": "nemolet.graph.compose", "modules": modules})
    graph = nl.training.training_graph(model, nl.speech.CTC())
    loss, count = graph(**next(iter(data.train_loader())))
    assert loss.isfinite()
    assert count > 0


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "a"}', "lacks something"),
        ("no json", "lacks something"),
        ('{"utt": "other", "text": "a"}', "no array of this name"),
    ],
)
def test_a_bad_entry_is_named(files, line, message):
    folder, _ = files
    with (folder / "list.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message) as error:
        corpus(folder).prepare(TokenizerSpec(kind="char"))
    assert "list.jsonl:7" in str(error.value)


def test_somebody_has_to_be_left(files):
    with pytest.raises(DataError, match="no speaker is left"):
        corpus(files[0], valid_speakers=3).prepare(TokenizerSpec(kind="char"))
    with pytest.raises(DataError, match="no such file"):
        FeatureCorpus(path="nowhere", arrays="nowhere").prepare(TokenizerSpec(kind="char"))
