"""Losses of speech models, as sums with their counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.types import IGNORED, CountScalar, LabelsBU, LengthsB, LogitsBTV, LossScalar


class SequenceLoss(NamedTuple):
    """A loss summed over utterances, and the number of labels: dividing is left to whoever knows them all."""

    loss: LossScalar
    count: CountScalar  # type: ignore[assignment]  # hides tuple.count, which nobody needs here


def label_lengths(labels_BU: Tensor) -> Tensor:
    """How many labels each row has; what follows them is -100."""
    return labels_BU.ne(IGNORED).sum(1)


class CTC(NeuralModule):
    """Connectionist temporal classification: the labels in order, blanks anywhere (Graves et al., 2006; final).

    The blank is the last column of the logits. An utterance whose labels do not fit into its frames has no
    alignment; it adds nothing, and training refuses it beforehand.

    Args:
        smoothing: weight of the distance to a uniform distribution at every frame, which keeps a young model
            from collapsing to blanks.

    Shape: logits_BTV, lengths_B, labels_BU -> scalar, scalar.

    Example:
        >>> loss, count = CTC()(torch.zeros(1, 4, 3), torch.tensor([4]), torch.tensor([[0, 1, -100]]))
        >>> round(loss.item(), 3), count.item()
        (1.686, 2)
    """

    def __init__(self, *, smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= smoothing < 1.0:
            raise ShapeError(
                "smoothing is a share", where="CTC.smoothing", expected="0 <= value < 1", found=smoothing, fix="try 0.1"
            )
        self.smoothing = smoothing

    def forward(self, logits: LogitsBTV, lengths: LengthsB, labels: LabelsBU) -> SequenceLoss:
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_probs_BTV = logits.log_softmax(-1, dtype=wide)
        targets_B = label_lengths(labels)
        loss = F.ctc_loss(
            log_probs_BTV.transpose(0, 1),
            labels.clamp(min=0),
            lengths,
            targets_B,
            blank=logits.shape[-1] - 1,
            reduction="sum",
            zero_infinity=True,
        )
        if self.smoothing:
            valid_BT = torch.arange(logits.shape[1], device=lengths.device) < lengths[:, None]
            uniform = -log_probs_BTV.mean(-1).masked_fill(~valid_BT, 0.0).sum()
            loss = (1 - self.smoothing) * loss + self.smoothing * uniform
        return SequenceLoss(loss, targets_B.sum())
