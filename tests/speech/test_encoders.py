"""What holds for every encoder, pooling and classifier."""

from __future__ import annotations

import pytest
import torch

import nemolet as nl
from nemolet.errors import ShapeError
from nemolet.nn.recurrent import LSTM
from nemolet.speech.classifiers import AudioClassifier, SpeakerVerifier, SpeechDetector
from nemolet.speech.conformer import ConformerEncoder
from nemolet.speech.convolutional import ConvEncoder
from nemolet.speech.ecapa import ECAPAEncoder
from nemolet.speech.features import LogMel
from nemolet.speech.front_end import FrontEnd
from nemolet.speech.losses import AngularMargin, ClassCrossEntropy
from nemolet.speech.planar import Conv2dEncoder
from nemolet.speech.pooling import AttentivePooling, MeanPooling
from nemolet.speech.recurrent import LSTMEncoder

ENCODERS = {
    "quartznet": lambda: ConvEncoder(bins=8, width=12, kernels=[3, 5], repeats=2),
    "citrinet": lambda: ConvEncoder(bins=8, width=12, kernels=[3, 5], repeats=2, strides=[2, 2], squeeze=True),
    "every_frame": lambda: ConvEncoder(bins=8, width=12, kernels=[3], strides=[1]),
    "planes": lambda: Conv2dEncoder(bins=8, width=12, channels=[4, 6], strides=[2, 1], kernels=[3]),
    "ecapa": lambda: ECAPAEncoder(bins=8, width=12, channels=16, groups=4),
    "lstm": lambda: LSTMEncoder(bins=8, layers=2, width=12, hidden=6, factor=4, channels=4),
    "conformer": lambda: ConformerEncoder(bins=8, layers=1, width=12, heads=2, kernel=3, channels=4),
}


@pytest.fixture(params=ENCODERS)
def encoder(request):
    torch.manual_seed(0)
    made = ENCODERS[request.param]().eval()
    for parameter in made.parameters():  # biases that start at zero hide mistakes
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def test_padding_and_neighbours_change_nothing(encoder):
    features, lengths = torch.randn(3, 37, 8), torch.tensor([37, 20, 5])
    together, left = encoder(features, lengths)
    assert left.tolist() == [-(-n // encoder.factor) for n in lengths.tolist()]
    for row, length in enumerate(lengths.tolist()):
        alone, _ = encoder(features[row : row + 1, :length], lengths[row : row + 1])
        assert torch.allclose(alone[0], together[row, : left[row]], atol=1e-5)
        assert not together[row, left[row] :].any()


def test_every_parameter_has_axes_is_learned_and_every_output_has_its_shape(encoder):
    assert set(nl.parameter_axes(encoder)) == {n for n, _ in encoder.named_parameters()}
    with nl.checked():
        encoder(torch.randn(2, 30, 8), torch.tensor([30, 12])).hidden.square().sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []


def test_a_config_builds_the_encoder_again(encoder):
    again = nl.build(encoder.config())
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in encoder.named_parameters()}


@pytest.mark.parametrize("pooling", [MeanPooling(4), AttentivePooling(4, hidden=3)])
def test_a_pooled_vector_does_not_see_padding(pooling):
    hidden, lengths = torch.randn(2, 9, 4), torch.tensor([9, 4])
    together = pooling(hidden, lengths)
    assert together.shape == (2, pooling.out_width)
    assert torch.allclose(pooling(hidden[1:, :4], lengths[1:]), together[1:], atol=1e-6)


def test_even_weights_are_the_statistics_of_an_utterance():
    pooling, hidden = AttentivePooling(4, hidden=3), torch.randn(1, 9, 4)
    pooling.score.weight.data.zero_()
    expected = torch.cat((hidden.mean(1), hidden.std(1, correction=0)), -1)
    assert torch.allclose(pooling(hidden, torch.tensor([9])), expected, atol=1e-5)


def test_an_lstm_is_torchs():
    torch.manual_seed(0)
    mine, torchs = LSTM(4, 5, bidirectional=True), torch.nn.LSTM(4, 5, bidirectional=True, batch_first=True)
    for way, suffix in enumerate(["", "_reverse"]):
        for name, other in (("input", "ih"), ("state", "hh")):
            for part in ("weight", "bias"):
                source = getattr(torchs, f"{part}_{other}_l0{suffix}")
                getattr(mine, f"{name}_{part}_{way}").data.copy_(source.data)
    hidden = torch.randn(1, 7, 4)
    assert torch.allclose(mine(hidden, torch.tensor([7])), torchs(hidden)[0], atol=1e-6)


# ---------------------------------------------------------------- classifiers


def front_end():
    return FrontEnd(features=LogMel(sample_rate=8000, bins=8))


def small():
    return ConvEncoder(bins=8, width=12, kernels=[3], strides=[1])


BATCH = {"audio": torch.randn(2, 2000), "audio_lengths": torch.tensor([2000, 1200])}


def trained(model, loss, labels):
    graph = nl.training.training_graph(model, loss)
    with nl.checked():
        result = graph(**BATCH, labels=labels)
    result["loss"].backward() if isinstance(result, dict) else result.loss.backward()
    assert [n for n, p in graph.named_parameters() if p.grad is None] == []
    return graph


def test_a_classifier_learns():
    model = AudioClassifier(front_end=front_end(), encoder=small(), classes=3, names=["a", "b", "c"])
    trained(model, ClassCrossEntropy(label_smoothing=0.1), torch.tensor([2, 0]))
    assert model.names == ("a", "b", "c")
    with pytest.raises(ShapeError, match="3 names"):
        AudioClassifier(front_end=front_end(), encoder=small(), classes=3, names=["a"])


def test_vectors_of_speakers_have_length_one():
    model = SpeakerVerifier(front_end=front_end(), encoder=small(), classes=4, embedding=6)
    trained(model, AngularMargin(), torch.tensor([3, 0]))
    vectors = model.eval()(**BATCH).embedding
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(2), atol=1e-5)


def test_speech_is_detected_frame_by_frame():
    model = SpeechDetector(front_end=front_end(), encoder=small())
    trained(model, nl.language.CrossEntropy(), torch.ones(2, 25, dtype=torch.long))
    assert model.seconds_per_frame == 0.01


def test_a_margin_moves_the_angle_of_the_right_class():
    angle = torch.tensor([0.3, 1.0, 2.0, 3.1])
    cosines = torch.stack((angle.cos(), torch.zeros(4)), 1)
    loss = AngularMargin(margin=0.2, scale=1.0)
    for row in range(3):
        moved = torch.stack((torch.cos(angle[row] + 0.2), torch.tensor(0.0)))
        expected = torch.nn.functional.cross_entropy(moved[None], torch.tensor([0]))
        assert torch.allclose(loss(cosines[row : row + 1], torch.tensor([0])).loss, expected, atol=1e-5)
    far = [loss(cosines[row : row + 1], torch.tensor([0])).loss.item() for row in (2, 3)]
    assert far[1] > far[0]
