"""Transducer losses: RNN-T and TDT, and RNN-T beside CTC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemolet.data.ports import LabelsBU
from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.speech.lattice import Arc, ArcLoss, sum_alignments
from nemolet.speech.losses import CTC, SequenceLoss, label_lengths
from nemolet.types import LengthsB, LogitsBTSV, LogitsBTV


class Transducer(NeuralModule):
    """The transducer loss: a blank goes to the next frame, a label stays (Graves, 2012; final).

    The blank is the last column of the logits; S is one more than the number of labels. Beside the logits and
    their gradient, four tensors of size B T S are held.

    Args:
        emit_weight: above 0, gradients of labels are this much larger, so that they are written earlier
            (FastEmit; Yu et al., 2021).

    Shape: logits_BTSV, lengths_B, labels_BU -> scalar, scalar.

    Example:
        >>> loss, count = Transducer()(torch.zeros(1, 2, 2, 3), torch.tensor([2]), torch.tensor([[0]]))
        >>> round(loss.item(), 3), count.item()
        (2.603, 1)
    """

    def __init__(self, *, emit_weight: float = 0.0) -> None:
        super().__init__()
        self.emit_weight = emit_weight

    def forward(self, logits: LogitsBTSV, lengths: LengthsB, labels: LabelsBU) -> SequenceLoss:
        targets_B = _checked_targets(logits, labels)
        loss_B: Tensor = _LogitLoss.apply(logits, lengths, labels.clamp(min=0), targets_B, self.emit_weight)
        return SequenceLoss(_possible(loss_B).sum(), targets_B.sum())


class TokenAndDuration(NeuralModule):
    """The transducer loss where each arc also says how many frames it skips (TDT; Xu et al., 2023; final).

    The last columns of the logits score the durations, the one before them the blank. A blank takes at least one
    frame.

    Args:
        durations: the numbers of frames, such as ``[0, 1, 2, 3, 4]``; at least one is above 0.
        sigma: subtracted from every token's log-probability, so that long skips are not preferred too early.

    Shape: logits_BTSV, lengths_B, labels_BU -> scalar, scalar.

    Example:
        >>> loss, _ = TokenAndDuration(durations=[0, 1])(
        ...     torch.zeros(1, 2, 2, 5), torch.tensor([2]), torch.tensor([[0]]))
        >>> round(loss.item(), 3)
        3.296
    """

    def __init__(self, *, durations: Sequence[int] = (0, 1, 2, 3, 4), sigma: float = 0.0) -> None:
        super().__init__()
        if not durations or min(durations) < 0 or max(durations) < 1 or len(set(durations)) < len(durations):
            raise ShapeError(
                "the durations are impossible",
                where="TokenAndDuration.durations",
                expected="different numbers of frames, one of them above 0",
                found=list(durations),
                fix="[0, 1, 2, 3, 4] is usual",
            )
        self.durations, self.sigma = tuple(durations), sigma

    def forward(self, logits: LogitsBTSV, lengths: LengthsB, labels: LabelsBU) -> SequenceLoss:
        targets_B = _checked_targets(logits, labels)
        wide = torch.promote_types(logits.dtype, torch.float32)
        vocab = logits.shape[-1] - len(self.durations)
        tokens_BTSV = logits[..., :vocab].log_softmax(-1, dtype=wide) - self.sigma
        skips_BTSD = logits[..., vocab:].log_softmax(-1, dtype=wide)
        blank_BTS = tokens_BTSV[..., -1]
        label_BTS = tokens_BTSV.gather(-1, _label_index(labels.clamp(min=0), logits.shape)).squeeze(-1)
        arcs = [(skip, written) for written in (0, 1) for skip in self.durations if skip or written]
        weights = [
            (label_BTS if written else blank_BTS) + skips_BTSD[..., self.durations.index(skip)]
            for skip, written in arcs
        ]
        loss_B: Tensor = ArcLoss.apply(lengths, targets_B, tuple(arcs), *weights)
        return SequenceLoss(_possible(loss_B).sum(), targets_B.sum())


class Hybrid(NeuralModule):
    """A transducer's loss and CTC's on the same encoder, weighed (final).

    Args:
        ctc_weight: share of CTC's loss.
        emit_weight: see :class:`nemolet.speech.Transducer`.

    Shape: logits_BTSV, frame_logits_BTV, lengths_B, labels_BU -> scalar, scalar.
    """

    def __init__(self, *, ctc_weight: float = 0.3, emit_weight: float = 0.0) -> None:
        super().__init__()
        self.ctc_weight = ctc_weight
        self.ctc, self.transducer = CTC(), Transducer(emit_weight=emit_weight)

    def forward(self, logits: LogitsBTSV, frame_logits: LogitsBTV, lengths: LengthsB, labels: LabelsBU) -> SequenceLoss:
        by_frame, count = self.ctc(frame_logits, lengths, labels)
        by_lattice, _ = self.transducer(logits, lengths, labels)
        return SequenceLoss(self.ctc_weight * by_frame + (1 - self.ctc_weight) * by_lattice, count)


def _checked_targets(logits_BTSV: Tensor, labels_BU: Tensor) -> Tensor:
    if logits_BTSV.shape[2] != labels_BU.shape[1] + 1:
        raise ShapeError(
            "the lattice does not belong to these labels",
            where="logits",
            expected=f"S = {labels_BU.shape[1] + 1} states, one more than labels",
            found=f"S = {logits_BTSV.shape[2]}",
            fix="run the prediction network on these labels, with the start symbol before them",
        )
    return label_lengths(labels_BU)


def _possible(loss_B: Tensor) -> Tensor:
    """An utterance without any alignment adds nothing; what is not a number stays so."""
    return loss_B.where(loss_B != float("inf"), 0.0)


def _label_index(labels_BU: Tensor, shape: Sequence[int]) -> Tensor:
    """For each state the label that follows it, ``[B, T, S, 1]``; after the last one, any."""
    following_BS = torch.nn.functional.pad(labels_BU, (0, 1))
    return following_BS[:, None, :, None].expand(shape[0], shape[1], shape[2], 1)


class _LogitLoss(torch.autograd.Function):
    """From logits, some rows at a time. Probabilities are computed once and kept where the gradient will be."""

    @staticmethod
    def forward(
        ctx: Any, logits_BTSV: Tensor, lengths_B: Tensor, labels_BU: Tensor, targets_B: Tensor, emit_weight: float
    ) -> Tensor:
        learns = ctx.needs_input_grad[0]
        blank_BTS, label_BTS, probs_BTSV = _scores(logits_BTSV, labels_BU, keep=learns)
        arcs = [Arc(blank_BTS, skip=1, written=0), Arc(label_BTS, skip=0, written=1)]
        total_B = sum_alignments(arcs, lengths_B, targets_B, occupy=learns)
        if learns:
            if emit_weight:
                label_BTS.mul_(1 + emit_weight)
            ctx.probs_BTSV = probs_BTSV
            ctx.save_for_backward(logits_BTSV, blank_BTS, label_BTS, labels_BU)
        return -total_B.to(blank_BTS.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_BTSV, blank_BTS, label_BTS, labels_BU = ctx.saved_tensors
        # The kept probabilities become the gradient; a second pass over the same graph computes them anew.
        probs_BTSV, ctx.probs_BTSV = ctx.probs_BTSV, None
        grad_BTSV = torch.empty_like(logits_BTSV) if probs_BTSV is None else probs_BTSV
        for place, index_BTS1 in _chunks(logits_BTSV, labels_BU):
            rows = logits_BTSV[place]
            slope = grad_BTSV[place] if probs_BTSV is not None else rows.softmax(-1, dtype=blank_BTS.dtype)
            factor_B111 = grad_B[place[0], None, None, None]
            blank, label = (taken_BTS[place].unsqueeze(-1) * factor_B111 for taken_BTS in (blank_BTS, label_BTS))
            slope.mul_(blank + label)
            slope[..., -1:] -= blank
            slope.scatter_add_(-1, index_BTS1, label.neg_())
            if probs_BTSV is None:
                grad_BTSV[place] = slope
        return grad_BTSV, None, None, None, None


def _scores(logits_BTSV: Tensor, labels_BU: Tensor, *, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities of the blank and of the next label, and if they are to be kept the probabilities of all.

    In half precision these would not be exact enough to be kept.
    """
    wide = torch.promote_types(logits_BTSV.dtype, torch.float32)
    probs_BTSV = torch.empty_like(logits_BTSV) if keep and logits_BTSV.dtype == wide else None
    blank_BTS, label_BTS = (logits_BTSV.new_empty(logits_BTSV.shape[:3], dtype=wide) for _ in range(2))
    for place, index_BTS1 in _chunks(logits_BTSV, labels_BU):
        rows = logits_BTSV[place].to(wide)
        probs = torch.softmax(rows, -1, out=None if probs_BTSV is None else probs_BTSV[place])
        norm = rows.amax(-1) - probs.amax(-1).log_()  # the log-partition, from the likeliest token
        torch.sub(rows[..., -1], norm, out=blank_BTS[place])
        torch.sub(rows.gather(-1, index_BTS1).squeeze(-1), norm, out=label_BTS[place])
    return blank_BTS, label_BTS, probs_BTSV


def _chunks(logits_BTSV: Tensor, labels_BU: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Some utterances, or some frames of one, few enough for a CPU's cache; and the labels after their states."""
    batch, frames, states, columns = logits_BTSV.shape
    room = 2 ** (19 if logits_BTSV.device.type == "cpu" else 26)
    rows = max(1, min(batch * frames // 4, room // (states * columns)))  # of frames
    index_BTS1 = _label_index(labels_BU, logits_BTSV.shape)
    whole = max(1, rows // max(1, frames))  # utterances
    for first in range(0, batch, whole):
        some = slice(first, first + whole)
        for begin in range(0, frames, rows):
            place = some, slice(begin, begin + rows)
            yield place, index_BTS1[place]
