"""Pictures: the pixels are the numbers, and tokens stand at their times."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import torch

from nemolet.nn import Decoder
from nemolet.speech import AttentionRecognizer, ConvEncoder, FrontEnd, LogMel, attention_picture, spectrogram_picture
from nemolet.speech.pictures import attention_weights, heat_map
from nemolet.speech.transcription import Piece

SVG = "{http://www.w3.org/2000/svg}"


def pixels(path):
    """Decode the picture in the picture."""
    data = base64.b64decode(re.search(r"base64,([^\"]+)", path.read_text())[1])
    width, height = struct.unpack(">II", data[16:24])
    body = data[data.index(b"IDAT") + 4 : data.index(b"IEND") - 8]
    return np.frombuffer(zlib.decompress(body), np.uint8).reshape(height, width + 1)[:, 1:]


def model_of():
    torch.manual_seed(0)
    return AttentionRecognizer(
        front_end=FrontEnd(features=LogMel(sample_rate=8000, bins=8)),
        encoder=ConvEncoder(bins=8, width=8, kernels=[3]),
        decoder=Decoder(layers=2, width=8, heads=2, kv_heads=1, cross=True),
        vocab_size=4,
    ).eval()


def test_the_darkest_pixel_is_the_largest_number(tmp_path):
    values = np.array([[0.0, 1.0, 2.0], [4.0, 3.0, 2.0]])
    heat_map(values, tmp_path / "a.svg", title="a < b", seconds=3.0, up="x", tokens=[Piece("<&", 1.5, 2.0, 1.0)])
    assert pixels(tmp_path / "a.svg").tolist() == [[255, 191, 128], [0, 64, 128]]
    tree = ElementTree.parse(tmp_path / "a.svg")
    texts = [text.text for text in tree.iter(f"{SVG}text")]
    assert "a < b" in texts and "<&" in texts and texts.count("3.00 s") == 1
    image, line = next(tree.iter(f"{SVG}image")), next(tree.iter(f"{SVG}line"))
    assert float(line.get("x1")) == float(image.get("x")) + float(image.get("width")) / 2  # at half of the time
    for nothing in (np.zeros((0, 4)), np.ones((2, 2))):
        heat_map(nothing, tmp_path / "b.svg", title="", seconds=0.0, up="")
        ElementTree.parse(tmp_path / "b.svg")


def test_a_spectrogram_is_what_the_model_hears(tmp_path):
    model, tone = model_of(), torch.sin(torch.arange(4000) * 0.2)
    spectrogram_picture(model, tone, tmp_path / "a.svg", title="tone")
    drawn = pixels(tmp_path / "a.svg")
    heard = model.front_end(tone[None], torch.tensor([4000])).spectrogram[0]
    assert drawn.shape == (8, 50)
    assert 7 - drawn[:, 25].argmin() == heard[25].argmax()  # low features lie below


@torch.no_grad()
def test_attention_is_that_of_the_decoder(tmp_path):
    model, audio = model_of(), torch.randn(1600)
    weights = attention_weights(model, audio, [0, 1, 3])
    assert weights.shape == (4, 10) and torch.allclose(weights.sum(1), torch.ones(4))
    encoded = model.encode(audio[None], torch.tensor([1600]))
    inputs, hooks = [], []
    for block in model.decoder.blocks:
        layer = block.cross_attention
        hooks.append(layer.register_forward_pre_hook(lambda module, args: inputs.append((module, args[0], args[1]))))
    model.next_logits(torch.tensor([[4, 0, 1, 3]]), encoded)
    expected = []
    for layer, hidden, memory in inputs:
        query = layer.query(hidden).view(4, 2, 4)
        key = layer.kv(memory).view(10, 1, 2, 4)[:, 0, 0]
        expected += [(query[:, head] @ key.T / 2).softmax(-1) for head in range(2)]
    assert torch.allclose(weights, torch.stack(expected).mean(0), atol=1e-5)
    attention_picture(model, audio, [0, 1, 3], tmp_path / "a.svg", title="t")
    assert pixels(tmp_path / "a.svg").shape == (4, 10)
