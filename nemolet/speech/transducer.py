"""Transducer losses: RNN-T and TDT, and RNN-T beside CTC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.speech.lattice import ArcLoss, Arcs, forward_scores, occupy
from nemolet.speech.losses import CTC, SequenceLoss, label_lengths
from nemolet.types import LabelsBU, LengthsB, LogitsBTSV, LogitsBTV


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
        blank_places = [i for i, skip in enumerate(self.durations) if skip > 0]
        weights = [blank_BTS + skips_BTSD[..., i] for i in blank_places]
        weights += [label_BTS + skips_BTSD[..., i] for i in range(len(self.durations))]
        blank_skips = tuple(self.durations[i] for i in blank_places)
        loss_B: Tensor = ArcLoss.apply(lengths, targets_B, blank_skips, self.durations, *weights)
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
    """An utterance without any alignment adds nothing."""
    return loss_B.where(loss_B.isfinite(), 0.0)


def _label_index(labels_BU: Tensor, shape: Sequence[int]) -> Tensor:
    """For each state the label that follows it, ``[B, T, S, 1]``; after the last one, any."""
    following_BS = torch.nn.functional.pad(labels_BU, (0, 1))
    return following_BS[:, None, :, None].expand(shape[0], shape[1], shape[2], 1)


class _LogitLoss(torch.autograd.Function):
    """From logits, a few rows at a time: neither probabilities nor a second gradient of their size are kept."""

    @staticmethod
    def forward(
        ctx: Any, logits_BTSV: Tensor, lengths_B: Tensor, labels_BU: Tensor, targets_B: Tensor, emit_weight: float
    ) -> Tensor:
        shape = logits_BTSV.shape
        wide = torch.promote_types(logits_BTSV.dtype, torch.float32)
        flat_NV = logits_BTSV.reshape(-1, shape[-1])
        norm_BTS = torch.cat([rows.to(wide).logsumexp(-1) for rows in flat_NV.split(_rows(flat_NV))]).view(shape[:3])
        index_BTS1 = _label_index(labels_BU, shape)
        blank_BTS = logits_BTSV[..., -1] - norm_BTS
        label_BTS = logits_BTSV.gather(-1, index_BTS1).squeeze(-1) - norm_BTS
        arcs = Arcs([blank_BTS], [label_BTS], [1], [0])
        alpha_BTS, total_B = forward_scores(arcs, lengths_B, targets_B)
        if ctx.needs_input_grad[0]:
            occupy(arcs, alpha_BTS, total_B, lengths_B, targets_B)
            if emit_weight:
                label_BTS.mul_(1 + emit_weight)
            ctx.save_for_backward(logits_BTSV, norm_BTS, blank_BTS, label_BTS, labels_BU)
        return -total_B.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_BTSV, norm_BTS, blank_BTS, label_BTS, labels_BU = ctx.saved_tensors
        shape, size = logits_BTSV.shape, logits_BTSV.shape[-1]
        blank_N1 = (blank_BTS * grad_B[:, None, None]).view(-1, 1)
        label_N1 = (label_BTS * grad_B[:, None, None]).view(-1, 1)
        index_N1 = _label_index(labels_BU, shape).reshape(-1, 1)
        flat_NV = logits_BTSV.reshape(-1, size)
        grad_NV = torch.empty_like(flat_NV)
        tensors = (flat_NV, grad_NV, norm_BTS.view(-1, 1), blank_N1, label_N1, index_N1)
        for rows, into, norm, blank, label, index in zip(*(t.split(_rows(flat_NV)) for t in tensors)):
            slope = torch.sub(rows, norm, out=into if into.dtype == norm.dtype else None).exp_().mul_(blank + label)
            slope[:, -1:] -= blank
            slope.scatter_add_(1, index, -label)
            if slope is not into:
                into.copy_(slope)
        return grad_NV.view(shape), None, None, None, None


def _rows(flat_NV: Tensor) -> int:
    """How many rows a chunk has: few enough for a CPU's cache, many enough to keep an accelerator busy."""
    return max(1, 2 ** (18 if flat_NV.device.type == "cpu" else 26) // flat_NV.shape[1])
