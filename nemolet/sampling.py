"""Choosing the next token from its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemolet.errors import GenerationError

_GREEDY = 1e-6  # a temperature below this leaves no choice, and would not survive a division


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the most likely token; 1 samples from the model's own distribution.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability (nucleus; Holtzman et al.,
            2020).
        min_p: keep tokens at least this likely relative to the best one (Nguyen et al., 2024).

    Raises:
        GenerationError: naming the field that is out of range.

    Example:
        >>> Sampling(temperature=0.8, top_k=40).greedy
        False
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0; 0 keeps all"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
        }
        for name, (fits, expected) in bounds.items():
            if not fits:
                raise GenerationError(
                    "out of range", where=f"sampling.{name}", expected=expected, found=getattr(self, name)
                )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < _GREEDY


def penalise(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely. ``seen_BV`` is boolean."""
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def keep_likely(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Set the logits of tokens outside top-k, then top-p, then min-p to minus infinity.

    Example:
        >>> keep_likely(torch.tensor([[1.0, 3.0, 2.0]]), Sampling(top_k=2))
        tensor([[-inf, 3., 2.]])
    """
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, -torch.inf)
    if sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        probs_BV = sorted_BV.softmax(-1)
        # A token is dropped when those before it already hold the mass; so the best one always stays.
        drop_BV = probs_BV.cumsum(-1) - probs_BV >= sampling.top_p
        logits_BV = logits_BV.masked_fill(drop_BV.scatter(-1, order_BV, drop_BV), -torch.inf)
    if sampling.min_p > 0:
        probs_BV = logits_BV.softmax(-1)
        logits_BV = logits_BV.masked_fill(probs_BV < sampling.min_p * probs_BV.amax(-1, keepdim=True), -torch.inf)
    return logits_BV


def choose(logits_BV: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """Choose one token per row.

    Each row has its own generator, so a row's text does not depend on its neighbours.

    Shape: logits_BV -> tokens_B.
    """
    logits_BV = logits_BV.float()
    if sampling.greedy:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV - logits_BV.amax(-1, keepdim=True)  # a low temperature makes no infinity of them
    logits_BV = keep_likely(logits_BV / sampling.temperature, sampling)
    # Exponential races: argmax of p / Exp(1) is a draw from p, without a cumulative sum.
    noise_BV = torch.stack(
        [torch.empty_like(row_V).exponential_(generator=own) for row_V, own in zip(logits_BV, generators)]
    )
    return (logits_BV.softmax(-1) / noise_BV).argmax(-1)
