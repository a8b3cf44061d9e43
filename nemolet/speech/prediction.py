"""The part of a transducer that reads labels: prediction network and joint."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemolet.data.ports import LabelsBU
from nemolet.module import NeuralModule
from nemolet.nn.conv import Conv1d
from nemolet.nn.embedding import Embedding
from nemolet.nn.linear import Linear
from nemolet.nn.norm import LayerNorm
from nemolet.types import Hidden, HiddenBTD, LogitsBTSV, NeuralType

StatesBSF = Annotated[Tensor, NeuralType("B S F", Hidden())]


class History(NamedTuple):
    """The last labels of each row, ``[B, context]``; before the first label stands the blank."""

    labels: Tensor


class TransducerDecoder(NeuralModule):
    """Scores of the next label from a frame and the last labels (final).

    The prediction network sees a few labels, not all (Ghodsi et al., 2020): on small data it learns as well, and
    any number of hypotheses shares one state.

    Args:
        width: D of the encoder.
        vocab_size: labels, without the blank.
        hidden: F, width of the prediction network and of the joint.
        context: how many labels are seen.
        durations: how many durations the joint scores too, for TDT; 0 for RNN-T.
        dropout: of the prediction network's result, in training.
        label_dropout: probability that a label is not seen, in training, so that when to write has to be heard; else
            a word that was just written, and whose sound goes on, is not told from the same word said again.

    Shape: hidden_BTD, labels_BU -> logits_BTSV with S = U + 1 and V = vocab_size + 1 + durations.

    Example:
        >>> decoder = TransducerDecoder(width=8, vocab_size=5, hidden=8)
        >>> decoder(torch.zeros(2, 7, 8), torch.zeros(2, 3, dtype=torch.long)).shape
        torch.Size([2, 7, 4, 6])
    """

    def __init__(
        self,
        *,
        width: int,
        vocab_size: int,
        hidden: int = 256,
        context: int = 2,
        durations: int = 0,
        dropout: float = 0.0,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__(D=width, V=vocab_size + 1 + durations)
        self.blank, self.context = vocab_size, context
        self.dropout, self.label_dropout = dropout, label_dropout
        self.embed = Embedding("V", "F", vocab_size + 1, hidden, init_std=1.0)
        self.mix = Conv1d("F", "F", hidden, hidden, kernel=context, causal=True)
        self.norm = LayerNorm("F", hidden)
        self.of_frame = Linear("D", "F", width, hidden, bias=True)
        self.of_labels = Linear("F", "F", hidden, hidden)
        self.out = Linear("F", "V", hidden, vocab_size + 1 + durations, bias=True)

    def forward(self, hidden: HiddenBTD, labels: LabelsBU) -> LogitsBTSV:
        known_BU = labels.masked_fill(labels < 0, self.blank)
        if self.training and self.label_dropout > 0:
            unseen_BU = torch.rand(labels.shape, device=labels.device) < self.label_dropout
            known_BU = known_BU.masked_fill(unseen_BU, self.blank)
        states_BSF = self._predict(F.pad(known_BU, (self.context, 0), value=self.blank))
        return self.join(hidden[:, :, None], states_BSF[:, None])

    def _predict(self, labels_BU: Tensor) -> Tensor:
        """One state for each window of ``context`` labels."""
        vectors = self.embed(labels_BU)
        mixed = self.mix(vectors[:, self.context - 1 :], vectors[:, : self.context - 1])
        return F.dropout(F.silu(self.norm(mixed)), self.dropout, self.training)

    def join(self, frame: Tensor, state: Tensor) -> Tensor:
        """Scores of frames ``[..., D]`` with states ``[..., F]``."""
        logits: Tensor = self.out(torch.tanh(self.of_frame(frame) + self.of_labels(state)))
        return logits

    def start(self, rows: int) -> History:
        """What is known before the first label."""
        return History(torch.full((rows, self.context), self.blank, device=self.out.weight.device))

    def state(self, history: History) -> Tensor:
        """The state that follows the last labels, ``[B, F]``."""
        return self._predict(history.labels)[:, 0]

    def extend(self, history: History, labels_B: Tensor, where_B: Tensor) -> History:
        """Add a label to some of the rows."""
        longer = torch.cat((history.labels[:, 1:], labels_B[:, None]), 1)
        return History(torch.where(where_B[:, None], longer, history.labels))
