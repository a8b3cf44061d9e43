"""Relative attention against one score at a time."""

from __future__ import annotations

import pytest
import torch

from nemolet.errors import ShapeError
from nemolet.nn.conv import Conv1d, Conv2d
from nemolet.nn.relative_attention import (
    RelativeAttention,
    RelativeContext,
    chunk_mask,
    joined,
    relative_distances,
)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    made = RelativeAttention(8, 2)
    for bias in (made.content_bias.weight, made.position_bias.weight):
        torch.nn.init.normal_(bias)
    return made


def by_hand(layer, hidden, allowed):
    batch, length, width = hidden.shape
    query, key, value = layer.qkv(hidden).view(batch, length, 2, 3, 4).unbind(3)
    rates = 10000.0 ** (-torch.arange(0, width, 2) / width)
    score = torch.full((batch, 2, length, length), float("-inf"))
    for i in range(length):
        for j in range(length):
            angle = (i - j) * rates
            vector = layer.position(torch.stack((angle.sin(), angle.cos()), -1).flatten()).view(2, 4)
            by_content = ((query[:, i] + layer.content_bias.weight) * key[:, j]).sum(-1)
            by_position = ((query[:, i] + layer.position_bias.weight) * vector).sum(-1)
            if allowed is None or allowed[0, 0, i, j]:
                score[:, :, i, j] = (by_content + by_position) / 2
    mixed = torch.einsum("bhts,bshk->bthk", score.softmax(-1), value)
    return layer.out(mixed.reshape(batch, length, width))


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_attention_is_that_of_single_scores(layer, length, chunk):
    hidden = torch.randn(2, length, 8)
    allowed = chunk_mask(length, chunk=chunk, left_chunks=1, valid_BT=None)
    out = layer(hidden, RelativeContext(relative_distances(length, length, 8), allowed))
    assert torch.allclose(out, by_hand(layer, hidden, allowed), atol=1e-6)


@pytest.mark.parametrize("new", [1, 3])
def test_frames_after_a_past_see_it(layer, new):
    hidden = torch.randn(1, 7, 8)
    whole = layer(hidden, RelativeContext(relative_distances(7, 7, 8), None))
    _, past = layer.project(hidden[:, : 7 - new])
    context = RelativeContext(relative_distances(new, 7, 8), None)
    assert torch.allclose(layer(hidden[:, 7 - new :], context, past), whole[:, 7 - new :], atol=1e-6)
    query, last = layer.project(hidden[:, 7 - new :])
    assert joined(past, last).last(4).keys.shape[1] == 4
    assert query.shape[1] == new


def test_heads_divide_the_width():
    with pytest.raises(ShapeError, match="heads do not divide"):
        RelativeAttention(8, 3)


def test_a_convolution_goes_on_where_it_stopped():
    layer, hidden = Conv1d("D", "D", 4, 4, kernel=3, dilation=2, depthwise=True, causal=True), torch.randn(2, 9, 4)
    whole = layer(hidden)
    assert torch.allclose(layer(hidden[:, 5:], hidden[:, 1:5]), whole[:, 5:], atol=1e-6)


@pytest.mark.parametrize("settings", [{"kernel": 4}, {"kernel": 3, "stride": 0}, {"kernel": 3, "depthwise": True}])
def test_impossible_convolutions_are_refused(settings):
    with pytest.raises(ShapeError):
        Conv1d("D", "D", 4, 8, **settings)
    with pytest.raises(ShapeError):
        Conv2d("C", "C", 4, 8, **settings)
