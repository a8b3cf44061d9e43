"""Texts and times of whole, long and arriving recordings."""

from __future__ import annotations

import pytest
import torch

import nemolet as nl
from nemolet.errors import GenerationError, ShapeError
from nemolet.speech.conformer import ConformerEncoder
from nemolet.speech.decoding import Hypothesis
from nemolet.speech.features import LogMel
from nemolet.speech.front_end import FrontEnd
from nemolet.speech.live import LiveRecognizer
from nemolet.speech.losses import CTC
from nemolet.speech.models import CTCRecognizer
from nemolet.speech.transcription import Windows, transcribe, transcript
from nemolet.speech.transducer import Hybrid, TokenAndDuration, Transducer

LOSSES = {
    "ctc": CTC,
    "rnnt": Transducer,
    "tdt": lambda: TokenAndDuration(durations=[0, 1, 2]),
    "hybrid": Hybrid,
}
GREEDY = ["ctc", "rnnt", "tdt", "hybrid"]


def waves(*seconds):
    """Tones that change eight times a second."""
    torch.manual_seed(1)
    made = []
    for each in seconds:
        size = round(8000 * each)
        pitch = (torch.rand(size // 1000 + 1) * 3000).repeat_interleave(1000)[:size]
        made.append((pitch.cumsum(0) * (2 * torch.pi / 8000)).sin() * 0.3)
    return made


def test_times_are_those_of_frames(letters):
    hypothesis = Hypothesis([1, 2, 0, 3, 4], [0, 2, 4, 5, 9], [1, 2, 4, 8, 9], [0.9, 0.8, 0.7, 0.6, 1.0], -1.0)
    result = transcript(hypothesis, letters, seconds_per_frame=0.04, duration=0.39)
    assert result.text == "ab cd"
    assert [(w.text, w.start, w.end, w.confidence) for w in result.words] == [
        ("ab", 0.0, 0.12, 0.8),
        ("cd", 0.2, 0.39, 0.6),
    ]
    assert [t.text for t in result.tokens] == ["a", "b", " ", "c", "d"]
    assert abs(result.confidence - 0.8) < 1e-9
    assert result.as_json()["words"][1]["start"] == 0.2


def test_words_of_subword_pieces(poem):
    tokenizer = nl.tokenizers.SentencePieceTokenizer.train([poem.read_text()], vocab_size=300)
    labels = tokenizer.encode("the rain in spain")
    count = len(labels)
    hypothesis = Hypothesis(labels, list(range(count)), list(range(count)), [1.0] * count)
    words = transcript(hypothesis, tokenizer, seconds_per_frame=1.0, duration=float(count)).words
    assert [w.text for w in words] == ["the", "rain", "in", "spain"]
    assert words[0].start == 0.0
    assert words[-1].end == float(count)


@pytest.mark.parametrize("kind", GREEDY)
def test_a_batch_is_read_as_each_alone(kind, recognizer, letters):
    model, audio = recognizer(kind), waves(1.0, 0.3, 0.005, 2.1)
    together = transcribe(model, letters, audio)
    alone = [transcribe(model, letters, [one])[0] for one in audio]
    assert [t.text for t in together] == [t.text for t in alone]
    assert [[w.start for w in t.words] for t in together] == [[w.start for w in t.words] for t in alone]
    assert together[2].text == ""
    assert any(t.text for t in together)


@pytest.mark.parametrize("kind", ["ctc", "rnnt"])
def test_windows_give_the_text_and_the_times_of_the_whole(kind, recognizer, letters):
    """An encoder with little context sees the same in a window, so nothing may change, times least of all."""
    model, [audio] = recognizer(kind, chunk=2, left_chunks=1), waves(5.3)
    whole = transcribe(model, letters, [audio])[0]
    cut = transcribe(model, letters, [audio], windows=Windows(seconds=0.8, margin=0.4))[0]
    assert len(whole.tokens) > 3
    assert cut.text == whole.text
    assert [t.start for t in cut.tokens] == [t.start for t in whole.tokens]
    assert [t.end for t in cut.tokens] == [t.end for t in whole.tokens]


@pytest.mark.parametrize("kind", ["ctc", "rnnt", "hybrid"])
@pytest.mark.parametrize("pieces", [[16960], [100] * 169 + [60], [9000, 7960]])
def test_audio_that_arrives_is_recognized_as_the_whole(kind, pieces, recognizer, letters):
    model, [audio] = recognizer(kind, chunk=2, left_chunks=1), waves(2.12)
    live = LiveRecognizer(model)
    labels = [label for piece in audio.split(pieces) for label in live.push(piece)] + live.flush()
    [whole] = model.greedy(model.encode(audio[None], torch.tensor([len(audio)])))
    assert len(labels) > 3
    assert labels == whole.labels == live.hypothesis.labels
    assert live.hypothesis.first == whole.first
    assert live.hypothesis.last == whole.last
    assert abs(live.hypothesis.score - whole.score) < 1e-3


def test_what_cannot_stream_says_why(recognizer):
    with pytest.raises(GenerationError, match="whole recording"):
        LiveRecognizer(recognizer())
    with pytest.raises(GenerationError, match="skips frames"):
        LiveRecognizer(recognizer("tdt", chunk=2))


def test_a_model_in_training_is_refused(recognizer, letters):
    with pytest.raises(GenerationError, match="training"):
        transcribe(recognizer().train(), letters, waves(1.0))


@pytest.mark.parametrize("kind", GREEDY)
def test_a_recognizer_learns_from_a_batch(kind, recognizer):
    graph = nl.training.training_graph(recognizer(kind).train(), LOSSES[kind]())
    assert [*graph.input_ports] == ["audio", "audio_lengths", "labels"]
    batch = {
        "audio": torch.stack(waves(1.0, 1.0)),
        "audio_lengths": torch.tensor([8000, 6000]),
        "labels": torch.tensor([[1, 2, 3], [2, -100, -100]]),
    }
    with nl.checked():
        loss, count = graph(**batch)
    loss.backward()
    assert count.item() == 4
    assert [n for n, p in graph.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", GREEDY)
def test_an_archive_gives_the_same_model_back(kind, recognizer, letters, tmp_path):
    model = recognizer(kind)
    nl.save(tmp_path / "model.nemolet", model=model, tokenizer=letters)
    again = nl.load(tmp_path / "model.nemolet")
    audio = waves(1.0)
    assert transcribe(again.model.eval(), again.tokenizer, audio) == transcribe(model, letters, audio)


def test_audio_of_another_rate_is_refused_by_its_type(recognizer):
    audio = nl.Input(nl.types.NeuralType("B N", nl.types.Audio(sample_rate=16000)), "audio")
    with pytest.raises(nl.errors.WiringError, match="sample_rate=8000"):
        recognizer()(audio, nl.Input(nl.types.AudioLengthsB, "audio_lengths"))


def test_an_encoder_of_other_features_is_refused():
    encoder = ConformerEncoder(bins=8, layers=1, width=8, heads=2)
    with pytest.raises(ShapeError, match=r"encoder.bins"):
        CTCRecognizer(front_end=FrontEnd(features=LogMel(sample_rate=8000)), encoder=encoder, vocab_size=3)
