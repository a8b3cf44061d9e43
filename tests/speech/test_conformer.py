"""Conformer encoders: padding, chunks, streams."""

from __future__ import annotations

import pytest
import torch

import nemolet as nl
from nemolet.errors import ShapeError
from nemolet.speech.conformer import ConformerEncoder
from nemolet.speech.streaming import ConformerStream
from nemolet.speech.subsampling import ConvSubsampling


def encoder(**settings):
    torch.manual_seed(0)
    made = ConformerEncoder(**{"bins": 8, "layers": 2, "width": 16, "heads": 2, "kernel": 5, **settings}).eval()
    for parameter in made.parameters():  # biases that start at zero hide mistakes
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return made


VARIANTS = {
    "whole": {},
    "fast": {"factor": 8, "separable": True},
    "chunks": {"chunk": 3, "left_chunks": 1},
    "fast_chunks": {"factor": 8, "separable": True, "chunk": 2, "left_chunks": 2},
    "half": {"factor": 2, "chunk": 1, "left_chunks": 0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_and_neighbours_change_nothing(name):
    model = encoder(**VARIANTS[name])
    features, lengths = torch.randn(3, 61, 8), torch.tensor([61, 40, 7])
    together, left = model(features, lengths)
    assert left.tolist() == [-(-n // model.factor) for n in lengths.tolist()]
    for row, length in enumerate(lengths.tolist()):
        alone, _ = model(features[row : row + 1, :length], lengths[row : row + 1])
        assert torch.allclose(alone[0], together[row, : left[row]], atol=1e-5)
        assert not together[row, left[row] :].any()


@pytest.mark.parametrize("name", ["chunks", "fast_chunks", "half"])
@pytest.mark.parametrize("pieces", [[61], [1] * 61, [7, 30, 24]])
def test_a_stream_equals_the_whole(name, pieces):
    model = encoder(**VARIANTS[name])
    features = torch.randn(2, 61, 8)
    whole = model(features, torch.tensor([61, 61])).hidden
    stream = ConformerStream(model, batch=2)
    parts = [stream.push(piece) for piece in features.split(pieces, 1)] + [stream.flush()]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_a_frame_sees_its_chunk_and_those_before_it_may_see():
    model = encoder(layers=1, kernel=1, chunk=2, left_chunks=1, factor=2)
    features = torch.randn(1, 24, 8)
    base = model(features, torch.tensor([24])).hidden
    changed = features.clone()
    changed[:, 16:] += 1
    moved = (model(changed, torch.tensor([24])).hidden - base).abs().amax((0, 2)) > 1e-6
    assert moved.nonzero().flatten().tolist() == [8, 9, 10, 11]
    early = features.clone()
    early[:, 0] += 1  # seen by the first outputs of the subsampling, in the first chunk
    moved = (model(early, torch.tensor([24])).hidden - base).abs().amax((0, 2)) > 1e-6
    assert moved.nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_only_an_encoder_with_chunks_streams():
    with pytest.raises(ShapeError, match="cannot stream"):
        ConformerStream(encoder())
    with pytest.raises(ShapeError, match="training=True"):
        ConformerStream(encoder(chunk=2).train())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_axes_and_every_output_its_declared_shape(name):
    model = encoder(**VARIANTS[name])
    assert set(nl.parameter_axes(model)) == {n for n, _ in model.named_parameters()}
    with nl.checked():
        model(torch.randn(2, 30, 8), torch.tensor([30, 12]))
    assert str(model.output_ports["hidden"].type) == "B S D=16 Hidden"


def test_gradients_reach_every_parameter():
    model = encoder().train()
    model(torch.randn(2, 30, 8), torch.tensor([30, 12])).hidden.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_another_factor_is_refused():
    with pytest.raises(ShapeError, match="2, 4 or 8"):
        ConvSubsampling(bins=8, width=4, factor=3, channels=2)
