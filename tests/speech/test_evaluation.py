"""Reports against counts by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import nemolet as nl
from nemolet.errors import DataError
from nemolet.speech.classifiers import AudioClassifier, SpeakerVerifier, SpeechDetector
from nemolet.speech.convolutional import ConvEncoder
from nemolet.speech.decoding import Hypothesis
from nemolet.speech.evaluation import evaluate, evaluates, loudest
from nemolet.speech.features import LogMel
from nemolet.speech.front_end import FrontEnd


def parts():
    torch.manual_seed(0)
    return {
        "front_end": FrontEnd(features=LogMel(sample_rate=8000, bins=8)),
        "encoder": ConvEncoder(bins=8, width=8, kernels=[3], strides=[1]),
    }


def batches(labels):
    torch.manual_seed(1)
    rows = [torch.randn(2, 1600), torch.randn(2, 1600)]
    return [
        {"audio": audio, "audio_lengths": torch.tensor([1600, 800]), "labels": label}
        for audio, label in zip(rows, labels)
    ]


def test_words_and_characters_are_counted(recognizer, letters):
    model = recognizer()
    heard = iter([[Hypothesis([1, 2, 0, 3]), Hypothesis([])], [Hypothesis([1]), Hypothesis([4])]])
    labels = [torch.tensor([[1, 2, 0, 4], [3, -100, -100, -100]]), torch.tensor([[1], [4]])]
    report = evaluate(model, batches(labels), tokenizer=letters, search=lambda encoded: next(heard))
    assert report.numbers["word_error_rate"] == 2 / 5
    assert report.numbers["character_error_rate"] == 2 / 7
    assert report.entries[0] == {"text": "ab d", "pred_text": "ab c"}
    assert "nothing was heard in 1 of 4" in report.text


def test_classes_are_counted():
    model = AudioClassifier(**parts(), classes=2, names=["no", "yes"]).eval()
    right = [model(b["audio"], b["audio_lengths"]).argmax(-1) for b in batches([None, None])]
    wrong = [right[0].clone(), right[1].clone()]
    wrong[0][0] = 1 - wrong[0][0]
    assert evaluate(model, batches(right)).numbers["accuracy"] == 1.0
    report = evaluate(model, batches(wrong))
    assert report.numbers["accuracy"] == 0.75
    assert "commonest" in report.text


def test_pairs_of_speakers_are_scored():
    report = evaluate(SpeakerVerifier(**parts(), classes=3), batches([torch.tensor([0, 1]), torch.tensor([0, 1])]))
    assert 0 <= report.numbers["equal_error_rate"] <= 1
    assert "over 6 pairs" in report.text


def test_speech_is_compared_with_loudness():
    labels = [torch.tensor([[0, 1] * 10, [1] * 10 + [-100] * 10])] * 2
    report = evaluate(SpeechDetector(**parts()), batches(labels))
    assert {"f1", "energy_f1"} <= set(report.numbers)
    assert "over 60 frames" in report.text
    quiet_then_loud = np.array([0.1] * 50 + [0.9] * 50, np.float32)
    assert loudest(np.array([0] * 50 + [1] * 50), quiet_then_loud).f1 == 1.0


def test_other_models_are_not_evaluated_so():
    model = nl.language.CausalLM(vocab_size=5, layers=1, width=8, heads=2)
    assert not evaluates(model)
    with pytest.raises(DataError, match="not evaluated on recordings"):
        evaluate(model, [])


def test_the_verb_writes_what_jiwer_counts_alike(recognizer, letters, tmp_path, capsys):
    jiwer = pytest.importorskip("jiwer")
    soundfile = pytest.importorskip("soundfile")
    lines = []
    for number, text in enumerate(["ab cd", "a", "dd", "b a"]):
        tone = 0.3 * np.sin(np.arange(6400) * (0.2 + 0.3 * number))
        soundfile.write(tmp_path / f"{number}.wav", tone, 8000)
        lines.append(json.dumps({"audio_filepath": f"{number}.wav", "text": text, "duration": 0.8}) + "\n")
    (tmp_path / "manifest.jsonl").write_text("".join(lines))
    nl.save(tmp_path / "model.nemolet", model=recognizer(), tokenizer=letters)
    command = [
        f"archive={tmp_path}/model.nemolet",
        "data=audio",
        "data.sample_rate=8000",
        f"data.path={tmp_path}/manifest.jsonl",
        f"data.valid_path={tmp_path}/manifest.jsonl",
        f"out={tmp_path}/heard.jsonl",
    ]
    from nemolet.cli import main

    assert main(["evaluate", *command]) == 0
    entries = [json.loads(line) for line in (tmp_path / "heard.jsonl").read_text().splitlines()]
    rate = jiwer.wer([e["text"] for e in entries], [e["pred_text"] for e in entries])
    assert len(entries) == 4
    assert f"word error rate {100 * rate:.2f}%" in capsys.readouterr().out
