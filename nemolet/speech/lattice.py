"""The sum over all alignments of a transducer, and its gradient.

A state of the lattice is a frame t and a number of labels s already written. An arc leaves it by writing nothing
(a blank) or the next label, and skips some frames. Every path from (0, 0) ends with a blank that reaches the
utterance's length with all labels written.

A state's score is counted from the sum of the labels before it in its frame. So writing within a frame costs nothing,
arcs to other frames carry the difference, and a frame is one addition and one ``logcumsumexp`` of what enters it.
These differences are made for some frames at a time, and everything that is added up is in double precision.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MINUS_INFINITY = float("-inf")
LEAST = -1e5  # a label less likely than this would spoil the differences of cumulative sums
BLOCKS = 14  # parts of the frames whose differences are made together; they take less room than one tensor B T S


class Arc(NamedTuple):
    """The arcs of one kind, one out of each state.

    Args:
        weight: their log-weights, [B, T, S].
        skip: how many frames they skip; with 0, another arc leaves the same frame. A blank skips at least one.
        written: labels that they write: 0 or 1.
    """

    weight: Tensor
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
        _to_end(arcs, alpha_TBS, peak_TB1, total_B[:, None])
        frame_T1 = torch.arange(len(alpha_TBS), device=lengths_B.device)[:, None]
        none_BT1 = (frame_T1 >= lengths_B[:, None, None]) | ~total_B.isfinite()[:, None, None]
        for arc in arcs:
            arc.weight.masked_fill_(none_BT1, 0.0)
    return total_B


def _enclose(arcs: Sequence[Arc], lengths_B: Tensor, targets_B: Tensor) -> None:
    """Leave arcs within an utterance and blanks that end it; after its end, one costless way to the last frame."""
    _, frames, states = arcs[0].weight.shape
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
    passing.weight.masked_fill_((left_BT1 <= 0) & done_B1S, 0.0)


def _from_start(arcs: Sequence[Arc], lengths_B: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of reaching each state less the largest in its frame, [T, B, S], that, [T, B, 1], and totals, [B]."""
    first = arcs[0].weight
    batch, frames, states = first.shape
    alpha_TBS = first.new_empty((frames, batch, states))
    peak_TB1 = first.new_empty((frames, batch, 1))
    begun_BS = first.new_full((batch, states), MINUS_INFINITY, dtype=torch.double)
    begun_BS[:, 0].masked_fill_(lengths_B > 0, 0.0)
    arriving = {0: begun_BS}
    for block in _blocks(frames):
        score_TBS = _Part(arcs, block).reach(arriving)
        highest_TB1 = score_TBS.amax(-1, keepdim=True)
        peak_TB1[block] = highest_TB1.masked_fill_(highest_TB1 == MINUS_INFINITY, 0.0)  # a frame that no path reaches
        alpha_TBS[block] = score_TBS.sub_(peak_TB1[block])
        del score_TBS
    ended_B = _log_sum(arriving.values()).gather(1, targets_B[:, None])[:, 0]
    return alpha_TBS, peak_TB1, ended_B


def _to_end(arcs: Sequence[Arc], alpha_TBS: Tensor, peak_TB1: Tensor, total_B1: Tensor) -> None:
    """Turn weights into probabilities of arcs, from the last frame to the first."""
    frames, batch, states = alpha_TBS.shape
    after_TBS = alpha_TBS.new_zeros((max(arc.skip for arc in arcs), batch, states), dtype=torch.double)
    sums_TBS = torch.zeros_like(after_TBS)
    for block in reversed(list(_blocks(frames))):
        part = _Part(arcs, block, sums_TBS)
        sums_TBS = part.sums_TBS[: len(after_TBS)].clone()
        beta_TBS = part.leave(after_TBS)
        after_TBS = beta_TBS[: len(after_TBS)].clone()
        part.occupy(alpha_TBS[block], peak_TB1[block] - total_B1, beta_TBS)
        del part, beta_TBS


def _blocks(frames: int) -> Iterator[slice]:
    size = max(1, -(-frames // BLOCKS))
    return (slice(first, min(first + size, frames)) for first in range(0, frames, size))


class _Part:
    """Some frames of a lattice, in double precision and with time first.

    Args:
        arcs: of the lattice.
        block: the frames.
        later_TBS: sums of the frames that arcs lead to, if their weights are used up.

    Attributes:
        sums_TBS: log-weight of writing the first s labels in one frame.
        onward: arcs to later frames, with what they weigh where writing within frames weighs nothing.
        within: the arcs that write within a frame.
    """

    def __init__(self, arcs: Sequence[Arc], block: slice, later_TBS: Tensor | None = None) -> None:
        self.block, self.size = block, block.stop - block.start
        self.within = next((arc for arc in arcs if not arc.skip), None)
        longest = max(arc.skip for arc in arcs)
        ahead = 0 if later_TBS is not None else longest
        sums_TBS = _sums(self.within or arcs[0], block.start, block.stop + ahead)
        self.sums_TBS = sums_TBS if later_TBS is None else torch.cat((sums_TBS, later_TBS))
        del sums_TBS
        self.onward = [(arc, self._gain(arc)) for arc in arcs if arc.skip]

    def _gain(self, arc: Arc) -> Tensor:
        there_TBS = self.sums_TBS[arc.skip : arc.skip + self.size]
        gain_TBS = self.sums_TBS[: self.size] - (F.pad(there_TBS[..., 1:], (0, 1)) if arc.written else there_TBS)
        return gain_TBS.add_(arc.weight[:, self.block].transpose(0, 1))

    def reach(self, arriving: dict[int, Tensor]) -> Tensor:
        """Scores of reaching the states; ``arriving`` holds what enters later frames."""
        score_TBS = torch.empty_like(self.sums_TBS[: self.size])
        steps = [(gain_TBS.unbind(0), arc.skip, arc.written) for arc, gain_TBS in self.onward]
        for t, score_BS in enumerate(score_TBS.unbind(0)):
            now = self.block.start + t
            self._spread(arriving.pop(now, None), into=score_BS)
            for gains, skip, written in steps:
                gone_BS = _raised(score_BS + gains[t], written)
                other_BS = arriving.get(now + skip)
                arriving[now + skip] = gone_BS if other_BS is None else torch.logaddexp(gone_BS, other_BS)
        return score_TBS.add_(self.sums_TBS[: self.size])

    def leave(self, after_TBS: Tensor) -> Tensor:
        """Scores from the states to the end, from those of the frames after."""
        # States are counted from the last one here, so that labels lead upwards as they do from the start.
        beta_TBS = after_TBS.new_empty((self.size + len(after_TBS), *after_TBS.shape[1:]))
        beta_TBS[self.size :] = after_TBS.flip(-1)
        scores = beta_TBS.unbind(0)
        steps = [(gain_TBS.flip(-1).unbind(0), arc.skip, arc.written) for arc, gain_TBS in self.onward]
        for t in range(self.size - 1, -1, -1):
            ways = (gains[t] + _raised(scores[t + skip], written) for gains, skip, written in steps)
            self._spread(_log_sum(ways), into=scores[t])
        del steps
        return beta_TBS.flip(-1)

    def occupy(self, alpha_TBS: Tensor, peak_TB1: Tensor, beta_TBS: Tensor) -> None:
        """Write the probabilities of arcs, from the scores of reaching states less those of whole utterances."""
        before_TBS = self.sums_TBS[: self.size].neg_().add_(alpha_TBS).add_(peak_TB1)
        for arc, gain_TBS in self.onward:
            self._take(arc, gain_TBS.add_(before_TBS), beta_TBS[arc.skip : arc.skip + self.size])
        if self.within is not None:
            self._take(self.within, before_TBS, beta_TBS[: self.size])

    def _take(self, arc: Arc, score_TBS: Tensor, then_TBS: Tensor) -> None:
        if arc.written:
            score_TBS[..., :-1] += then_TBS[..., 1:]
            score_TBS[..., -1] = MINUS_INFINITY
        else:
            score_TBS += then_TBS
        arc.weight[:, self.block] = score_TBS.exp_().transpose(0, 1)

    def _spread(self, enter_BS: Tensor | None, *, into: Tensor) -> None:
        """Let what enters a frame go along its labels."""
        if enter_BS is None:
            into.fill_(MINUS_INFINITY)
        elif self.within is None:
            into.copy_(enter_BS)
        else:
            torch.logcumsumexp(enter_BS, 1, out=into)


def _sums(within: Arc, start: int, stop: int) -> Tensor:
    """Log-weight of writing the first s labels within each frame, [T, B, S]; nothing beyond the last frame."""
    batch, frames, states = within.weight.shape
    if within.skip:
        return within.weight.new_zeros((stop - start, batch, states), dtype=torch.double)
    label_TBS = within.weight[:, start:stop, :-1].transpose(0, 1).double()
    return F.pad(label_TBS, (1, 0, 0, 0, 0, max(0, stop - frames))).cumsum_(-1)


def _raised(score_BS: Tensor, written: int) -> Tensor:
    """Each state's score at the state with that many more labels."""
    return F.pad(score_BS[:, :-1], (1, 0), value=MINUS_INFINITY) if written else score_BS


def _log_sum(scores: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.logaddexp, scores)


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
