"""Attention seen from outside is what transformers says it looks at."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch

import nemolet as nl
from nemolet.errors import ConfigError
from nemolet.language.attention_maps import attention_maps, attention_page
from nemolet.nn import recorded_attention
from nemolet.tokenizers import ByteTokenizer

IDS = [5, 9, 31, 7, 64, 12, 40]


class Numbers:
    """A tokenizer whose tokens are numbers."""

    def decode(self, ids, *, special=False):
        return "".join(f"<{i}>" for i in ids)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama3", "mistral", "gemma2"])
@torch.no_grad()
def test_a_model_looks_where_theirs_does(name, pairs):
    pair = pairs(name)
    expected = pair.theirs(torch.tensor([IDS]), output_attentions=True).attentions
    maps = attention_maps(pair.ours.model, Numbers(), IDS)
    assert len(maps) == len(expected)
    for found, theirs in zip(maps, expected):
        torch.testing.assert_close(found.weights, theirs[0], rtol=0, atol=1e-5)
        assert found.queries == found.keys == tuple(f"<{i}>" for i in IDS)
    assert expected[0].std() > 0.01


@pytest.mark.parametrize("name", ["bart", "t5"])
@torch.no_grad()
def test_an_encoder_decoder_looks_where_theirs_does(name, pairs):
    pair, written = pairs(name), [1, 8, 3]
    theirs = pair.theirs(torch.tensor([IDS]), decoder_input_ids=torch.tensor([written]), output_attentions=True)
    maps = {found.layer: found for found in attention_maps(pair.ours.model, Numbers(), IDS, written=written)}
    kinds = {"encoder_attentions": (7, 7), "decoder_attentions": (3, 3), "cross_attentions": (3, 7)}
    seen = 0
    for kind, shape in kinds.items():
        part = "encoder" if kind.startswith("encoder") else "decoder"
        layer = "cross_attention" if kind.startswith("cross") else "attention"
        for index, expected in enumerate(theirs[kind]):
            found = maps[f"graph.{part}.blocks.{index}.{layer}"]
            torch.testing.assert_close(found.weights, expected[0], rtol=0, atol=1e-5)
            assert (len(found.queries), len(found.keys)) == shape
            seen += 1
    assert seen == len(maps)
    with pytest.raises(ConfigError, match="writes another"):
        attention_maps(pair.ours.model, Numbers(), IDS)


@torch.no_grad()
def test_padding_is_not_looked_at(pairs):
    pair, mask = pairs("bert"), torch.tensor([[True] * 5 + [False] * 2])
    theirs = pair.theirs(torch.tensor([IDS]), attention_mask=mask.long(), output_attentions=True).attentions
    with recorded_attention(pair.ours.model) as found:
        pair.ours.model(torch.tensor([IDS]), mask=mask)
    for ours, expected in zip(found.values(), theirs):
        torch.testing.assert_close(ours[:, :, :5], expected[:, :, :5], rtol=0, atol=1e-5)


def test_the_model_is_as_before(pairs):
    model = pairs("gpt2").ours.model
    cores = [module.core for module in model.modules() if hasattr(module, "core")]
    with pytest.raises(RuntimeError), recorded_attention(model):
        raise RuntimeError
    assert [module.core for module in model.modules() if hasattr(module, "core")] == cores
    with pytest.raises(ConfigError, match="cannot be seen"), recorded_attention(torch.nn.Linear(1, 1)):
        pass


def test_pages_and_pictures_show_the_numbers():
    image = pytest.importorskip("PIL.Image", reason="Pillow reads the picture")
    torch.manual_seed(0)
    model = nl.language.CausalLM(vocab_size=257, layers=2, width=8, heads=2)
    maps = attention_maps(model, ByteTokenizer(), "<a>")
    text = attention_page(maps)
    assert "&lt;" in text and "<a>" not in text
    shares = [float(share) for share in re.findall(r"rgba\(31,111,235,([\d.]+)\)", text)]
    means = torch.cat([found.weights.mean(0).flatten() for found in maps])
    torch.testing.assert_close(torch.tensor(shares), means, rtol=0, atol=6e-4)
    grey = np.asarray(image.open(io.BytesIO(maps[0].png(1, cell=3))))
    side = 3 * len(maps[0].queries)
    assert grey.shape == (side, side)
    expected = np.round(255 * (1 - maps[0].weights[1].numpy()))
    assert (abs(grey[1::3, 1::3] - expected) <= 1).all()
    assert image.open(io.BytesIO(maps[0].png(cell=3))).size == (2 * side + 3, side)
