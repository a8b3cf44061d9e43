"""Metrics of language models."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemolet.errors import DataError


@dataclass(frozen=True)
class LanguageScore:
    """How well a model predicts a text.

    Args:
        loss_sum: cross-entropy summed over all tokens, in nats.
        tokens: how many tokens were predicted.
        text_bytes: UTF-8 bytes of the text those tokens stand for; 0 where unknown.

    Example:
        >>> score = LanguageScore(loss_sum=200.0, tokens=100, text_bytes=400)
        >>> round(score.loss, 2), round(score.perplexity, 2), round(score.bits_per_byte, 3)
        (2.0, 7.39, 0.721)
    """

    loss_sum: float
    tokens: int
    text_bytes: float = 0.0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise DataError(
                "there is nothing to evaluate",
                expected="at least one predicted token",
                found=self.tokens,
                fix="use a longer text, or a shorter data.sequence_length",
            )

    @property
    def loss(self) -> float:
        """Mean cross-entropy per token, in nats."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss; depends on the tokenizer."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits needed per byte of text; comparable between tokenizers."""
        return self.loss_sum / math.log(2) / self.text_bytes if self.text_bytes else math.nan

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}  perplexity {self.perplexity:.2f}  bits per byte {self.bits_per_byte:.3f}"
            f"  over {self.tokens:,} tokens"
        )
