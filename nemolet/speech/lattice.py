"""The sum over all alignments of a transducer, and its gradient.

A state of the lattice is a frame t and a number of labels s already written. An arc leaves it by writing nothing
(a blank) or the next label, and skips some frames. Every path from (0, 0) ends with a blank that reaches the
utterance's length with all labels written.

A state's score is counted from the sum of the labels before it in its frame. So writing within a frame costs nothing,
arcs to other frames carry the difference, and a frame is one addition and one ``logcumsumexp`` of what enters it.
These differences are made for some frames at a time, and everything that is added up is in double precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MINUS_INFINITY = float("-inf")
LEAST = -1e5  # a label less likely than this would spoil the differences of cumulative sums
BLOCKS = 10  # parts of the frames whose differences are made together; they take less room than one tensor B T S


class Arc(NamedTuple):
    """The arcs of one kind, one out of each state.

    Args:
        weight_BTS: their log-weights.
        skip: how many frames they skip; with 0, another arc leaves the same frame. A blank skips at least one.
        written: labels that they write: 0 or 1.
    """

    weight_BTS: Tensor
    skip: int
    written: int


def sum_alignments(arcs: Sequence[Arc], lengths_B: Tensor, targets_B: Tensor, *, occupy: bool) -> Tensor:
    """Log-probability of all alignments of each utterance, [B] in double precision.

    The weights are used up. With ``occupy`` each becomes the probability that an alignment takes its arc.

    Args:
        arcs: those of each kind; at most one of them writes within a frame.
        lengths_B: frames.
        targets_B: labels to be written.
        occupy: whether the probabilities of arcs are wanted.
    """
    _enclose(arcs, lengths_B, targets_B)
    alpha_TBS, peak_TB1, total_B = _from_start(arcs, lengths_B, targets_B)
    if occupy:
        _to_end(arcs, alpha_TBS, peak_TB1 - total_B[:, None])
        frame_T1 = torch.arange(len(alpha_TBS), device=lengths_B.device)[:, None]
        none_BT1 = (frame_T1 >= lengths_B[:, None, None]) | ~total_B.isfinite()[:, None, None]
        for arc in arcs:
            arc.weight_BTS.masked_fill_(none_BT1, 0.0)
    return total_B


def _enclose(arcs: Sequence[Arc], lengths_B: Tensor, targets_B: Tensor) -> None:
    """Leave arcs within an utterance and blanks that end it; after its end, one costless way to the last frame."""
    _, frames, states = arcs[0].weight_BTS.shape
    left_BT1 = lengths_B[:, None, None] - torch.arange(frames, device=lengths_B.device)[:, None]
    done_B1S = torch.arange(states, device=lengths_B.device) == targets_B[:, None, None]
    passing = next(arc for arc in arcs if not arc.written)
    for weight_BTS, skip, written in arcs:
        if not skip:
            weight_BTS.clamp_(min=LEAST).masked_fill_(left_BT1 <= 0, 0.0)
        elif written:
            weight_BTS.masked_fill_(left_BT1 <= skip, MINUS_INFINITY)
        else:
            weight_BTS.masked_fill_((left_BT1 < skip) | ((left_BT1 == skip) & ~done_B1S), MINUS_INFINITY)
    passing.weight_BTS.masked_fill_((left_BT1 <= 0) & done_B1S, 0.0)


def _from_start(arcs: Sequence[Arc], lengths_B: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of reaching each state less the largest in its frame, [T, B, S], that, [T, B, 1], and totals, [B]."""
    first = arcs[0].weight_BTS
    batch, frames, states = first.shape
    longest = max(arc.skip for arc in arcs)
    nothing_BS = first.new_full((batch, states), MINUS_INFINITY, dtype=torch.double)
    begun_BS = nothing_BS.masked_fill((torch.arange(states, device=first.device) == 0) & (lengths_B > 0)[:, None], 0.0)
    alpha_TBS = first.new_empty((frames, batch, states))
    peak_TB1 = first.new_empty((frames, batch, 1), dtype=torch.double)
    arriving: dict[int, list[Tensor]] = {0: [begun_BS]}
    for block in _blocks(frames):
        part = _Part(arcs, block, _sums(arcs, block.start, block.stop + longest))
        score_TBS = torch.empty_like(part.within_TBS)
        steps = [(weight.unbind(0), arc.skip, arc.written) for arc, weight in part.onward]
        for t, score_BS in enumerate(score_TBS.unbind(0)):
            part.spread(_log_sum(arriving.pop(block.start + t, [nothing_BS])), into=score_BS)
            for weights, skip, written in steps:
                gone_BS = score_BS + weights[t]
                arriving.setdefault(block.start + t + skip, []).append(_shifted(gone_BS) if written else gone_BS)
        score_TBS += part.within_TBS
        peak_TB1[block] = score_TBS.amax(-1, keepdim=True)
        alpha_TBS[block] = score_TBS - peak_TB1[block]
    ended_BS = _log_sum([score_BS for way in arriving.values() for score_BS in way])
    return alpha_TBS, peak_TB1, ended_BS.gather(1, targets_B[:, None])[:, 0]


def _to_end(arcs: Sequence[Arc], alpha_TBS: Tensor, peak_TB1: Tensor) -> None:
    """Turn weights into probabilities of arcs, from the last frame to the first."""
    frames, batch, states = alpha_TBS.shape
    longest = max(arc.skip for arc in arcs)
    after_TBS = alpha_TBS.new_zeros((longest, batch, states), dtype=torch.double)
    later_TBS = torch.zeros_like(after_TBS)  # sums of frames whose weights are no more
    for block in reversed(list(_blocks(frames))):
        size = block.stop - block.start
        sums_TBS = torch.cat((_sums(arcs, block.start, block.stop), later_TBS))
        later_TBS = sums_TBS[:longest].clone()
        part = _Part(arcs, block, sums_TBS)
        # States are counted from the last one here, so that labels lead upwards as they do from the start.
        beta_TBS = torch.cat((torch.empty_like(part.within_TBS), after_TBS))
        scores = beta_TBS.unbind(0)
        steps = [(weight.flip(-1).unbind(0), arc.skip, arc.written) for arc, weight in part.onward]
        for t in range(size - 1, -1, -1):
            ways = [
                weights[t] + (_shifted(scores[t + skip]) if written else scores[t + skip])
                for weights, skip, written in steps
            ]
            part.spread(_log_sum(ways), into=scores[t])
        after_TBS = beta_TBS[:longest].clone()
        del steps, scores
        beta_TBS = beta_TBS.flip(-1)
        before_TBS = part.within_TBS.neg_().add_(alpha_TBS[block]).add_(peak_TB1[block])
        for arc, weight in part.onward:
            then_TBS = beta_TBS[arc.skip : arc.skip + size]
            weight.add_(before_TBS).add_(_followed(then_TBS) if arc.written else then_TBS)
            arc.weight_BTS[:, block] = weight.exp_().transpose(0, 1)
        for arc in arcs:
            if not arc.skip:
                arc.weight_BTS[:, block] = before_TBS.add_(_followed(beta_TBS[:size])).exp_().transpose(0, 1)


def _blocks(frames: int) -> Iterator[slice]:
    size = -(-frames // BLOCKS)
    return (slice(first, min(first + size, frames)) for first in range(0, frames, size))


class _Part:
    """Some frames of a lattice, in double precision and with time first.

    Args:
        arcs: of the lattice.
        block: the frames.
        sums_TBS: of writing labels within these frames, and within those that arcs lead to.

    Attributes:
        within_TBS: log-weight of writing the first s labels in one frame.
        onward: arcs to later frames, with what they weigh where writing within frames weighs nothing.
    """

    def __init__(self, arcs: Sequence[Arc], block: slice, sums_TBS: Tensor) -> None:
        size = block.stop - block.start
        self.spreads = any(not arc.skip for arc in arcs)
        self.within_TBS = sums_TBS[:size]
        self.onward: list[tuple[Arc, Tensor]] = []
        for arc in arcs:
            if arc.skip:
                there_TBS = sums_TBS[arc.skip : arc.skip + size]
                gain_TBS = self.within_TBS - (F.pad(there_TBS[..., 1:], (0, 1)) if arc.written else there_TBS)
                self.onward.append((arc, gain_TBS.add_(arc.weight_BTS[:, block].transpose(0, 1))))

    def spread(self, enter_BS: Tensor, *, into: Tensor) -> None:
        """Let what enters a frame go along its labels."""
        if self.spreads:
            torch.logcumsumexp(enter_BS, 1, out=into)
        else:
            into.copy_(enter_BS)


def _sums(arcs: Sequence[Arc], start: int, stop: int) -> Tensor:
    """Log-weight of writing the first s labels within each frame, [T, B, S]; nothing beyond the last frame."""
    batch, frames, states = arcs[0].weight_BTS.shape
    writes_BTS = next((arc.weight_BTS for arc in arcs if not arc.skip), None)
    if writes_BTS is None:
        return arcs[0].weight_BTS.new_zeros((stop - start, batch, states), dtype=torch.double)
    label_TBS = writes_BTS[:, start:stop, :-1].transpose(0, 1).double()
    return F.pad(label_TBS, (1, 0, 0, 0, 0, max(0, stop - frames))).cumsum_(-1)


def _shifted(score_BS: Tensor) -> Tensor:
    """Each state's score at the next one."""
    return F.pad(score_BS[:, :-1], (1, 0), value=MINUS_INFINITY)


def _followed(score_TBS: Tensor) -> Tensor:
    """The next state's score at each."""
    return F.pad(score_TBS[..., 1:], (0, 1), value=MINUS_INFINITY)


def _log_sum(scores: list[Tensor]) -> Tensor:
    total = scores[0]
    for other in scores[1:]:
        total = torch.logaddexp(total, other)
    return total


class ArcLoss(torch.autograd.Function):
    """Minus the log-probability of all alignments, from weights of arcs that were computed elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, lengths_B: Tensor, targets_B: Tensor, kinds: tuple[tuple[int, int], ...], *weights: Tensor
    ) -> Tensor:
        """Minus the log-probability of each utterance, by arcs that skip and write as their kind says."""
        taken = [weight.clone() for weight in weights]
        arcs = [Arc(weight, *kind) for weight, kind in zip(taken, kinds)]
        total_B = sum_alignments(arcs, lengths_B, targets_B, occupy=any(ctx.needs_input_grad))
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*taken)
        return -total_B.to(weights[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, ...]:
        """Minus how often each arc is taken."""
        return None, None, None, *(-grad_B[:, None, None] * taken for taken in ctx.saved_tensors)
