"""Losses of language models, as sums with their counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.types import CountScalar, LabelsBT, LogitsBTV, LossScalar

IGNORED = -100  # the label of a position that does not count, as in torch


class TokenLoss(NamedTuple):
    """A loss summed over tokens, and the number of tokens: dividing is left to whoever knows them all."""

    loss: LossScalar
    count: CountScalar


class CrossEntropy(NeuralModule):
    """Cross-entropy of the next token, summed over all labels that count (final).

    The sum is not divided here: over micro-batches and ranks only the sum of sums by the sum of counts is
    the mean over tokens.

    Args:
        label_smoothing: share of probability spread over the whole vocabulary.
        z_loss: weight of the squared log-partition, which keeps logits from drifting (PaLM, 2022, section 5).

    Shape: logits_BTV, labels_BT -> scalar, scalar.

    Example:
        >>> loss, count = CrossEntropy()(torch.zeros(1, 2, 4), torch.tensor([[1, -100]]))
        >>> round(loss.item(), 4), count.item()
        (1.3863, 1)
    """

    def __init__(self, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ShapeError("label smoothing is a share", where="CrossEntropy.label_smoothing",
                             expected="0 <= value < 1", found=label_smoothing, fix="0.1 is usual")
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    def forward(self, logits: LogitsBTV, labels: LabelsBT) -> TokenLoss:
        flat_logits, flat_labels = logits.flatten(0, -2), labels.flatten()
        loss = F.cross_entropy(
            flat_logits, flat_labels, ignore_index=IGNORED, reduction="sum", label_smoothing=self.label_smoothing
        )
        counted = flat_labels.ne(IGNORED)
        if self.z_loss:
            partition = torch.logsumexp(flat_logits.float(), dim=-1)
            loss = loss + self.z_loss * (partition.square() * counted).sum()
        return TokenLoss(loss, counted.sum())
