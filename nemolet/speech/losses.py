"""Losses of speech models, as sums with their counts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.types import IGNORED, CountScalar, LabelsB, LabelsBU, LengthsB, LogitsBTV, LogitsBV, LossScalar


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


class ClassCrossEntropy(NeuralModule):
    """Cross-entropy of the class of an utterance, summed (final).

    Args:
        label_smoothing: share of probability spread over all classes.

    Shape: logits_BV, labels_B -> scalar, scalar.

    Example:
        >>> loss, count = ClassCrossEntropy()(torch.zeros(2, 4), torch.tensor([1, 3]))
        >>> round(loss.item(), 4), count.item()
        (2.7726, 2)
    """

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: LogitsBV, labels: LabelsB) -> SequenceLoss:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(wide, labels, reduction="sum", label_smoothing=self.label_smoothing)
        return SequenceLoss(loss, labels.ne(IGNORED).sum())


class AngularMargin(NeuralModule):
    """Cross-entropy of cosines where the right class has to win by an angle (AAM-softmax; Deng et al., 2019; final).

    Args:
        margin: the angle, in radians.
        scale: what cosines are multiplied by.

    Shape: cosines ``B V``, labels_B -> scalar, scalar.

    Example:
        >>> cosines = torch.tensor([[1.0, 0.0]])
        >>> AngularMargin(margin=0.2)(cosines, torch.tensor([0])).loss.item() < 1e-6
        True
    """

    def __init__(self, *, margin: float = 0.2, scale: float = 30.0) -> None:
        super().__init__()
        self.margin, self.scale = margin, scale

    def forward(self, logits: LogitsBV, labels: LabelsB) -> SequenceLoss:
        cosine_BV = logits.to(torch.promote_types(logits.dtype, torch.float32)).clamp(-1, 1)
        target_B1 = labels.clamp(min=0)[:, None]
        right_B1 = cosine_BV.gather(1, target_B1)
        sine_B1 = (1 - right_B1.square()).clamp(min=1e-9).sqrt()
        moved_B1 = right_B1 * math.cos(self.margin) - sine_B1 * math.sin(self.margin)
        # Beyond a half turn the cosine would rise again; there the margin is taken off linearly.
        far_B1 = right_B1 <= -math.cos(self.margin)
        moved_B1 = torch.where(far_B1, right_B1 - self.margin * math.sin(self.margin), moved_B1)
        score_BV = self.scale * cosine_BV.scatter(1, target_B1, moved_B1)
        return SequenceLoss(F.cross_entropy(score_BV, labels, reduction="sum"), labels.ne(IGNORED).sum())
