"""Tiny recognizers with random weights."""

from __future__ import annotations

import pytest
import torch

from nemolet.speech.conformer import ConformerEncoder
from nemolet.speech.features import LogMel
from nemolet.speech.front_end import FrontEnd, Normalize
from nemolet.speech.models import CTCRecognizer, HybridRecognizer, TransducerRecognizer
from nemolet.tokenizers import CharTokenizer

KINDS = {"ctc": CTCRecognizer, "rnnt": TransducerRecognizer, "tdt": TransducerRecognizer, "hybrid": HybridRecognizer}


@pytest.fixture(scope="session")
def letters() -> CharTokenizer:
    return CharTokenizer(list(" abcd"))


@pytest.fixture
def recognizer():
    """Builds one; with ``chunk`` it can stream."""

    def build(kind="ctc", **settings):
        torch.manual_seed(0)
        head = settings.pop("head", {})
        whole = settings.get("chunk") is None
        normalize = None if whole else Normalize(over="fixed", mean=-4.0, std=2.0)
        front_end = FrontEnd(features=LogMel(sample_rate=8000, bins=16), normalize=normalize)
        encoder = ConformerEncoder(bins=16, layers=1, width=16, heads=2, kernel=3, **settings)
        if kind == "tdt":
            head = {"durations": [0, 1, 2], **head}
        model = KINDS[kind](front_end=front_end, encoder=encoder, vocab_size=5, **head)
        for parameter in model.parameters():  # larger weights, so that more than blanks is written
            parameter.data *= 2
        return model.eval()

    return build
