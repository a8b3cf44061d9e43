"""Scores of a uniform model, which everyone can compute."""

import math

import pytest

from nemolet.errors import DataError
from nemolet.language.metrics import LanguageScore


def test_a_uniform_byte_model_needs_eight_bits_per_byte():
    score = LanguageScore(loss_sum=100 * math.log(256), tokens=100, text_bytes=100)
    assert score.bits_per_byte == pytest.approx(8.0)
    assert score.perplexity == pytest.approx(256.0)


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(DataError, match="nothing to evaluate"):
        LanguageScore(loss_sum=0.0, tokens=0)
