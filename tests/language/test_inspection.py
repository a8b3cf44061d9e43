"""Looking inside: attributions that add up, and tables that count what is there."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest
import torch

from nemolet.errors import ConfigError, DataError
from nemolet.language import NgramEncoder, TextClassifier, TextEncoder
from nemolet.language.mistakes import Calibration, Confusion, report
from nemolet.language.saliency import Attribution, explain, page
from nemolet.nn import Encoder
from nemolet.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()


def classifiers():
    torch.manual_seed(0)
    return {
        "ngrams": TextClassifier(encoder=NgramEncoder(vocab_size=257, width=16, buckets=64), labels=["a", "b"]),
        "attention": TextClassifier(
            encoder=TextEncoder(vocab_size=257, stack=Encoder(layers=1, width=16, heads=2)), labels=["a", "b"]
        ),
        "types": TextClassifier(
            encoder=TextEncoder(vocab_size=257, token_types=2, stack=Encoder(layers=1, width=16, heads=2)),
            labels=["a", "b"],
        ),
    }


@pytest.mark.parametrize("name", list(classifiers()))
def test_integrated_gradients_add_up_to_the_difference_of_scores(name):
    model = classifiers()[name].eval()
    torch.nn.init.normal_(model.head.weight)
    found = explain(model, BYTES, "some text", label="b", steps=256)
    nothing = explain_nothing(model)
    with torch.no_grad():
        score = model(torch.tensor([[*b"some text", 256]]))[0, 1]
    assert len(found.scores) == len(found.pieces) == 10
    assert sum(found.scores) == pytest.approx(float(score - nothing), abs=0.02 + 0.02 * abs(float(score - nothing)))


def explain_nothing(model):
    """The score where all vectors of tokens are zero."""
    from nemolet.nn import Embedding

    hooks = [
        m.register_forward_hook(lambda module, inputs, output: output * (output.shape[1] == 1))
        for m in model.encoder.modules()
        if isinstance(m, Embedding)
    ]
    with torch.no_grad():
        score = model(torch.tensor([[*b"some text", 256]]))[0, 1]
    for hook in hooks:
        hook.remove()
    return score


def test_the_token_that_decides_stands_out():
    model = classifiers()["ngrams"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    texts = [("xxaxx", 0), ("xaxxx", 0), ("xxbxx", 1), ("xxxbx", 1)]
    tokens = torch.tensor([[*t.encode(), 256] for t, _ in texts])
    labels = torch.tensor([n for _, n in texts])
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
    for method in ("gradient", "integrated"):
        found = explain(model, BYTES, "xxbxx", method=method)
        assert found.label == "b"
        # the letter itself, or a run that begins with it
        assert max(range(6), key=lambda i: found.scores[i]) in (2, 3, 4)
    assert model.training


def test_a_page_shows_texts_as_they_are():
    model = classifiers()["ngrams"]
    text = page([explain(model, BYTES, "<b> & c")])
    assert "&lt;" in text
    assert "<b> &" not in text.replace("<b>a</b>", "").replace("<b>b</b>", "")
    with pytest.raises(ConfigError, match="no such label"):
        explain(model, BYTES, "x", label="c")


def test_classes_are_scored_as_by_sklearn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference")
    generator = torch.Generator().manual_seed(0)
    real, said = ([f"c{i}" for i in torch.randint(5, (200,), generator=generator).tolist()] for _ in range(2))
    confusion = Confusion.of(real, said)
    precision, recall, f1, count = metrics.precision_recall_fscore_support(real, said, labels=confusion.labels)
    for score in confusion.scores():
        i = confusion.labels.index(score.label)
        assert (score.count, score.precision, score.recall, score.f1) == pytest.approx(
            (count[i], precision[i], recall[i], f1[i])
        )
    assert sum(n for _, _, n in confusion.worst(100)) == sum(r != s for r, s in zip(real, said))
    assert confusion.table(3).count("\n") == 3
    cells = ET.fromstring(confusion.svg()).findall(".//{http://www.w3.org/2000/svg}rect")
    assert len(cells) == len(confusion.counts)
    with pytest.raises(DataError):
        Confusion.of(["a"], [])


def test_calibration_compares_confidence_with_accuracy():
    calibration = Calibration.of([0.9, 0.9, 0.9, 0.9, 0.6, 0.6], [True, True, True, False, True, False], bins=5)
    assert [b.count for b in calibration.bins] == [2, 4]
    assert calibration.error == pytest.approx((4 * 0.15 + 2 * 0.1) / 6)
    assert Calibration.of([1.0], [True]).error == 0.0
    assert len(ET.fromstring(calibration.svg()).findall(".//{http://www.w3.org/2000/svg}circle")) == 2


def test_a_strip_has_a_field_for_each_token():
    """Decoded by hand: a PNG of three bytes a pixel, where each row begins with the number of its filter."""
    picture = Attribution("a", ("x", "y", "z"), (1.0, -0.5, 0.0)).png(cell=2)
    width, height, depth, kind = struct.unpack(">IIBB", picture[16:26])
    assert (width, height, depth, kind) == (6, 2, 8, 2)
    start = picture.index(b"IDAT")
    size = struct.unpack(">I", picture[start - 4 : start])[0]
    rows = np.frombuffer(zlib.decompress(picture[start + 4 : start + 4 + size]), np.uint8).reshape(2, 19)
    assert not rows[:, 0].any()
    pixels = rows[:, 1:].reshape(2, 6, 3)
    assert pixels[0, ::2].tolist() == [[46, 160, 67], [236, 154, 153], [255, 255, 255]]
    assert (pixels[:, ::2] == pixels[:, 1::2]).all()


def test_a_report_shows_what_is_wrong():
    model = classifiers()["attention"]
    texts = ["<one>", "two"]
    said = [each.label for each in model.classify(BYTES, texts)]
    text = report(model, BYTES, texts, ["b" if label == "a" else "a" for label in said])
    assert "0 of 2 right" in text and text.count(" taken for</p>") == 2
    assert "&lt;" in text and "<one>" not in text
    assert "2 of 2 right" in report(model, BYTES, texts, said)
