"""The sum over all alignments of a transducer, and its gradient.

A state of the lattice is a frame t and a number of labels s already written. An arc leaves it by writing nothing
(a blank) or the next label, and skips some frames. Every path from (0, 0) ends with a blank that reaches the
utterance's length with all labels written. Recursions run over frames; the labels of one frame, which wait for
each other, are one ``logcumsumexp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MINUS_INFINITY = float("-inf")
LEAST = -1e5  # a label less likely than this would spoil the differences of cumulative sums


class Arcs(NamedTuple):
    """Log-weights [B, T, S] of the arcs that leave each state, one tensor for each number of skipped frames."""

    blanks: Sequence[Tensor]
    labels: Sequence[Tensor]
    blank_skips: Sequence[int]  # at least 1
    label_skips: Sequence[int]  # 0: another arc leaves the same frame


def _within_frame(enter_BS: Tensor, label_BS: Tensor | None) -> Tensor:
    """Spread what enters a frame along its labels."""
    if label_BS is None:
        return enter_BS
    sums_BS = _sums(label_BS)
    return sums_BS + (enter_BS - sums_BS).logcumsumexp(1)


def _sums(label_BS: Tensor) -> Tensor:
    """Log-weight of writing the first s labels in one frame."""
    return F.pad(label_BS[:, :-1].clamp(min=LEAST).cumsum(1), (1, 0))


def forward_scores(arcs: Arcs, lengths_B: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of reaching each state, [B, T, S], and of each utterance, [B] in double precision."""
    first = arcs.blanks[0]
    batch, frames, states = first.shape
    alpha_BTS, total_B = torch.empty_like(first), first.new_full((batch,), MINUS_INFINITY, dtype=torch.double)
    ends = set(lengths_B.tolist())
    history: dict[int, Tensor] = {}
    for t in range(frames + 1):
        by_blank = [
            history[t - skip] + weight[:, t - skip]
            for weight, skip in zip(arcs.blanks, arcs.blank_skips)
            if t - skip in history
        ]
        enter_BS = _log_sum(by_blank, first.new_full((batch, states), MINUS_INFINITY, dtype=torch.double))
        if t in ends:
            total_B = torch.where(lengths_B == t, enter_BS.gather(1, targets_B[:, None])[:, 0], total_B)
        if t == frames:
            break
        by_label = [
            F.pad((history[t - skip] + weight[:, t - skip])[:, :-1], (1, 0), value=MINUS_INFINITY)
            for weight, skip in zip(arcs.labels, arcs.label_skips)
            if skip and t - skip in history
        ]
        enter_BS = _log_sum([enter_BS, *by_label], enter_BS)
        if t == 0:
            enter_BS[:, 0] = 0.0
        history[t] = _within_frame(enter_BS, _same_frame(arcs, t))
        alpha_BTS[:, t] = history[t].to(alpha_BTS.dtype)
        history.pop(t - max(*arcs.blank_skips, *arcs.label_skips), None)
    return alpha_BTS, total_B


def occupy(arcs: Arcs, alpha_BTS: Tensor, total_B: Tensor, lengths_B: Tensor, targets_B: Tensor) -> None:
    """Turn the weight of every arc, in place, into the probability that an alignment takes it."""
    _, frames, states = alpha_BTS.shape
    at_end_BS = torch.arange(states, device=alpha_BTS.device) == targets_B[:, None]
    nothing_BS = alpha_BTS.new_full(at_end_BS.shape, MINUS_INFINITY, dtype=torch.double)
    end_BS = nothing_BS.masked_fill(at_end_BS, 0.0)
    ends = set(lengths_B.tolist())
    # Beyond an utterance a blank may only reach its very end, and a label nothing.
    after_blank: dict[int, Tensor] = {}
    after_label: dict[int, Tensor] = {}
    longest = max(*arcs.blank_skips, *arcs.label_skips)
    for t in range(frames + longest, -1, -1):
        beta_BS = nothing_BS
        if t < frames:
            beta_BS = _leave(arcs, t, after_blank, after_label).masked_fill((t >= lengths_B)[:, None], MINUS_INFINITY)
            for weight, skip in zip(arcs.labels, arcs.label_skips):
                if skip == 0:
                    weight[:, t] += _next_state(beta_BS)
        after_label[t] = beta_BS
        after_blank[t] = torch.where((lengths_B == t)[:, None], end_BS, beta_BS) if t in ends else beta_BS
        after_label.pop(t + longest, None)
        after_blank.pop(t + longest, None)
    alpha_BTS -= total_B.to(alpha_BTS.dtype).masked_fill(~total_B.isfinite(), 0.0)[:, None, None]
    outside_BT1 = torch.arange(frames, device=lengths_B.device)[:, None] >= lengths_B[:, None, None]
    outside_BT1 = outside_BT1 | ~total_B.isfinite()[:, None, None]
    for weight in (*arcs.blanks, *arcs.labels):
        weight.add_(alpha_BTS).exp_().masked_fill_(outside_BT1, 0.0)


def _leave(arcs: Arcs, t: int, after_blank: dict[int, Tensor], after_label: dict[int, Tensor]) -> Tensor:
    """Log-probability of the end from each state of a frame; adds to each arc to a later frame what follows it."""
    ways = []
    for weight, skip in zip(arcs.blanks, arcs.blank_skips):
        ways.append(weight[:, t] + after_blank[t + skip])
        weight[:, t] = ways[-1]
    for weight, skip in zip(arcs.labels, arcs.label_skips):
        if skip:
            ways.append(weight[:, t] + _next_state(after_label[t + skip]))
            weight[:, t] = ways[-1]
    leave_BS = _log_sum(ways, ways[0])
    label_BS = _same_frame(arcs, t)
    if label_BS is None:
        return leave_BS
    sums_BS = _sums(label_BS)
    return (leave_BS + sums_BS).flip(1).logcumsumexp(1).flip(1) - sums_BS


def _same_frame(arcs: Arcs, t: int) -> Tensor | None:
    """The labels that follow each other within frame t."""
    for weight, skip in zip(arcs.labels, arcs.label_skips):
        if skip == 0:
            return weight[:, t].double()
    return None


def _next_state(scores_BS: Tensor) -> Tensor:
    return F.pad(scores_BS[:, 1:], (0, 1), value=MINUS_INFINITY)


def _log_sum(scores: list[Tensor], otherwise: Tensor) -> Tensor:
    if not scores:
        return otherwise
    total = scores[0]
    for other in scores[1:]:
        total = torch.logaddexp(total, other)
    return total


class ArcLoss(torch.autograd.Function):
    """Minus the log-probability of all alignments, from weights of arcs that were computed elsewhere."""

    @staticmethod
    def forward(
        ctx: Any,
        lengths_B: Tensor,
        targets_B: Tensor,
        blank_skips: tuple[int, ...],
        label_skips: tuple[int, ...],
        *weights: Tensor,
    ) -> Tensor:
        """Minus the log-probability of each utterance."""
        count = len(blank_skips)
        taken = tuple(weight.clone() for weight in weights) if any(ctx.needs_input_grad) else weights
        arcs = Arcs(taken[:count], taken[count:], blank_skips, label_skips)
        alpha_BTS, total_B = forward_scores(arcs, lengths_B, targets_B)
        if any(ctx.needs_input_grad):
            occupy(arcs, alpha_BTS, total_B, lengths_B, targets_B)
            ctx.save_for_backward(*taken)
        return -total_B.to(weights[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, ...]:
        """Minus how often each arc is taken."""
        return None, None, None, None, *(-grad_B[:, None, None] * taken for taken in ctx.saved_tensors)
