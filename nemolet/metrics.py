"""Metrics as typed modules: shares of two counts, which add up over batches and ranks."""

from __future__ import annotations

from typing import NamedTuple

from nemolet.errors import ConfigError
from nemolet.module import NeuralModule
from nemolet.types import IGNORED, CountScalar, LabelsB, LabelsBT, LogitsBTV, LogitsBV


class Share(NamedTuple):
    """A part of a whole. Both are sums, so only their totals over all batches are ever divided."""

    part: CountScalar
    whole: CountScalar


class Accuracy(NeuralModule):
    """How many samples were put into their class (final).

    Args:
        top: a sample counts where its class is among so many of the likeliest; of no more classes than that, every
            one counts.

    Shape: logits_BV, labels_B -> scalar, scalar.

    Example:
        >>> import torch
        >>> share = Accuracy()(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
        >>> share.part.item(), share.whole.item()
        (1, 2)
    """

    def __init__(self, *, top: int = 1) -> None:
        super().__init__()
        if top < 1:
            raise ConfigError("no class is counted", where="Accuracy.top", expected="at least 1", found=top)
        self.top = top

    def forward(self, logits: LogitsBV, labels: LabelsB) -> Share:
        likeliest = logits.topk(min(self.top, logits.shape[-1]), dim=-1).indices
        hits = (likeliest == labels[:, None]).any(-1)
        return Share(hits.sum(), (labels != IGNORED).sum())


class TokenAccuracy(NeuralModule):
    """How many positions were labelled rightly (final).

    Shape: logits_BTV, labels_BT -> scalar, scalar.

    Example:
        >>> import torch
        >>> share = TokenAccuracy()(torch.eye(2)[None], torch.tensor([[0, -100]]))
        >>> share.part.item(), share.whole.item()
        (1, 1)
    """

    def forward(self, logits: LogitsBTV, labels: LabelsBT) -> Share:
        return Share((logits.argmax(-1) == labels).sum(), (labels != IGNORED).sum())
