"""What CTC says about labels that are known: the probability of a beginning, and where each label lies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemolet.errors import GenerationError


class PrefixState(NamedTuple):
    """Log-probabilities of having written just a prefix after each frame, for each hypothesis, ``[T, R]``.

    The way is told apart by its last frame: a label, or a blank.
    """

    by_label: Tensor
    by_blank: Tensor
    last: Tensor  # the last label of each hypothesis, [R]; -1 for none


class CTCPrefix:
    """Probability that a text begins with some labels, summed over all alignments (Watanabe et al., 2017; final).

    Args:
        log_probs_TV: of each frame; the last column is the blank.

    Example:
        >>> scorer = CTCPrefix(torch.full((3, 3), 1 / 3).log())
        >>> score_RV, _ = scorer.extend(scorer.start())
        >>> score_RV[0].exp().sum()  # every text begins with a label, or is empty
        tensor(1.0000)
    """

    def __init__(self, log_probs_TV: Tensor) -> None:
        self.log_probs_TV = log_probs_TV.float()

    def start(self) -> PrefixState:
        """Of one hypothesis without labels."""
        blank_T1 = self.log_probs_TV[:, -1:].cumsum(0)
        return PrefixState(torch.full_like(blank_T1, -torch.inf), blank_T1, torch.tensor([-1], device=blank_T1.device))

    def extend(self, state: PrefixState) -> tuple[Tensor, PrefixState]:
        """Scores of each hypothesis with each label after it, and with nothing after it in the last column.

        Returns:
            ``[R, V]``, and the states of all ``R * (V - 1)`` longer hypotheses, hypothesis by hypothesis.
        """
        heard_TV, blank_T = self.log_probs_TV[:, :-1], self.log_probs_TV[:, -1]
        frames, labels = heard_TV.shape
        rows = state.last.shape[0]
        sum_TR = torch.logaddexp(state.by_label, state.by_blank)
        again_RV = torch.arange(labels, device=heard_TV.device) == state.last[:, None]
        # How likely the old prefix stood before a frame; the same label again needs a blank between.
        ready_TRV = torch.where(again_RV, state.by_blank[:, :, None], sum_TR[:, :, None])
        first_RV = torch.where(state.last[:, None] < 0, 0.0, -torch.inf).expand(rows, labels)
        ready_TRV = torch.cat((first_RV[None], ready_TRV[:-1]))
        by_label, by_blank = [], []
        label_RV = blank_RV = torch.full((rows, labels), -torch.inf, device=heard_TV.device)
        for frame in range(frames):
            blank_RV, label_RV = (
                torch.logaddexp(blank_RV, label_RV) + blank_T[frame],
                torch.logaddexp(label_RV, ready_TRV[frame]) + heard_TV[frame],
            )
            by_label.append(label_RV.flatten())
            by_blank.append(blank_RV.flatten())
        longer_RV = (ready_TRV + heard_TV[:, None]).logsumexp(0)
        last = torch.arange(labels, device=heard_TV.device).repeat(rows)
        score_RV = torch.cat((longer_RV, sum_TR[-1][:, None]), 1)
        return score_RV, PrefixState(torch.stack(by_label), torch.stack(by_blank), last)


def chosen(state: PrefixState, rows: Tensor) -> PrefixState:
    """The states of some hypotheses, in this order."""
    return PrefixState(state.by_label[:, rows], state.by_blank[:, rows], state.last[rows])


class Alignment(NamedTuple):
    """The frames of labels: first and last of each, and the log-probability of this one way."""

    first: list[int]
    last: list[int]
    score: float


def align(log_probs_TV: NDArray[np.floating], labels: list[int]) -> Alignment:
    """The likeliest way to write labels over frames (forced alignment by Viterbi).

    Raises:
        GenerationError: for labels that do not fit into the frames.

    Example:
        >>> probs = np.array([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.1, 0.8, 0.1]])
        >>> align(np.log(probs), [0, 1])[:2]
        ([0, 3], [1, 3])
    """
    blank, frames = log_probs_TV.shape[1] - 1, len(log_probs_TV)
    states = np.full(2 * len(labels) + 1, blank)
    states[1::2] = labels
    may_skip = np.zeros(len(states), bool)  # from label to label, where they differ
    may_skip[3::2] = states[3::2] != states[1:-2:2]
    score = np.full(len(states), -np.inf)
    came = np.zeros((frames, len(states)), np.int64)
    for frame in range(frames):
        if frame == 0:
            score[:2] = log_probs_TV[0, states[:2]]
            continue
        one = np.concatenate(([-np.inf], score[:-1]))
        two = np.where(may_skip, np.concatenate(([-np.inf, -np.inf], score[:-2]))[: len(states)], -np.inf)
        ways = np.stack((score, one, two))
        came[frame] = ways.argmax(0)
        score = ways.max(0) + log_probs_TV[frame, states]
    ends = score[-2:] if len(states) > 1 else score
    place = len(states) - len(ends) + int(ends.argmax())
    if not frames or not np.isfinite(score[place]):
        raise GenerationError(
            "the labels do not fit into the frames",
            where="align",
            expected=f"room for {len(labels)} labels, and a blank between two that are equal",
            found=f"{frames} frames",
        )
    total = float(score[place])
    where: list[list[int]] = [[] for _ in labels]
    for frame in range(frames - 1, -1, -1):
        if place % 2:
            where[place // 2].insert(0, frame)
        place -= int(came[frame, place])
    return Alignment([at[0] for at in where], [at[-1] for at in where], total)
