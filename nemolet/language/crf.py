"""Linear-chain conditional random fields: the likelihood of a sequence of tags, and the likeliest one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemolet.data.schemes import OUTSIDE, Scheme, tag_of
from nemolet.types import IGNORED

_NEVER = -1e4  # of a transition that cannot be; finite, so that gradients are


def chain_log_likelihood(logits_BUV: Tensor, transitions_PV: Tensor, labels_BU: Tensor) -> Tensor:
    """Log-probability of whole sequences of tags (Lafferty et al., 2001).

    Args:
        logits_BUV: score of each tag at each word.
        transitions_PV: score of a tag after another; its last two rows are the scores of beginning and ending with it.
        labels_BU: the tags; :data:`IGNORED` behind the end.

    Shape: -> [B]; 0 for a sequence without words.

    Example:
        >>> even = chain_log_likelihood(torch.zeros(1, 2, 3), torch.zeros(5, 3), torch.tensor([[0, 2]]))
        >>> round(even.exp().item() * 9, 4)
        1.0
    """
    tags = logits_BUV.shape[-1]
    between, begin, end = transitions_PV[:tags], transitions_PV[tags], transitions_PV[tags + 1]
    valid_BU = labels_BU != IGNORED
    gold_BU = labels_BU.clamp(min=0)
    own_BU = logits_BUV.gather(-1, gold_BU[..., None])[..., 0]
    steps_BU = between[gold_BU[:, :-1], gold_BU[:, 1:]] * valid_BU[:, 1:]
    last_B = gold_BU.gather(1, (valid_BU.sum(1, keepdim=True) - 1).clamp(min=0))[:, 0]
    score_B = (own_BU * valid_BU).sum(1) + steps_BU.sum(1) + begin[gold_BU[:, 0]] + end[last_B]
    alpha_BV = begin + logits_BUV[:, 0]
    for word in range(1, logits_BUV.shape[1]):
        new_BV = torch.logsumexp(alpha_BV[:, :, None] + between, dim=1) + logits_BUV[:, word]
        alpha_BV = torch.where(valid_BU[:, word, None], new_BV, alpha_BV)
    partition_B = torch.logsumexp(alpha_BV + end, dim=-1)
    return torch.where(valid_BU[:, 0], score_B - partition_B, torch.zeros_like(score_B))


def likeliest_chain(logits_BUV: Tensor, transitions_PV: Tensor, lengths_B: Tensor) -> Tensor:
    """The sequence of tags with the highest score (Viterbi); 0 behind the end.

    Args:
        logits_BUV: score of each tag at each word.
        transitions_PV: as for :func:`chain_log_likelihood`.
        lengths_B: number of words.

    Shape: -> [B, U].
    """
    _, words, tags = logits_BUV.shape
    between, begin, end = transitions_PV[:tags], transitions_PV[tags], transitions_PV[tags + 1]
    score_BV = begin + logits_BUV[:, 0]
    came_from: list[Tensor] = []
    stay_V = torch.arange(tags, device=logits_BUV.device)
    for word in range(1, words):
        best_BV, from_BV = (score_BV[:, :, None] + between).max(dim=1)
        live = (word < lengths_B)[:, None]
        score_BV = torch.where(live, best_BV + logits_BUV[:, word], score_BV)
        came_from.append(torch.where(live, from_BV, stay_V))
    tag_B = (score_BV + end).argmax(-1)
    path = [tag_B]
    for from_BV in reversed(came_from):
        tag_B = from_BV.gather(1, tag_B[:, None])[:, 0]
        path.append(tag_B)
    path_BU = torch.stack(path[::-1], dim=1)
    return path_BU.masked_fill(torch.arange(words, device=path_BU.device) >= lengths_B[:, None], 0)


def forbidden_transitions(labels: Sequence[str], scheme: Scheme) -> Tensor:
    """Scores that keep a tag from following one that it may not follow in its scheme; 0 elsewhere.

    Where a chain may end is left open: a sentence may have been cut there.

    Shape: [V + 2, V], as transitions.

    Example:
        >>> from nemolet.data.schemes import scheme_for
        >>> labels = ["O", "B-a", "I-a"]
        >>> (forbidden_transitions(labels, scheme_for(labels)) < 0).int().tolist()
        [[0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]]
    """
    tags = [tag_of(label) for label in labels]
    after = [[0.0 if scheme.allows(first, second) else _NEVER for second in tags] for first in [*tags, tag_of(OUTSIDE)]]
    return torch.tensor([*after, [0.0] * len(labels)])
