"""Learning rate over the steps of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nemolet.rules import Checked


@dataclass(frozen=True)
class Schedule(Checked):
    """How the learning rate moves: up over the warm-up, then by name (final).

    Args:
        name: ``"cosine"`` and ``"linear"`` fall to ``min_ratio`` at the last step; ``"wsd"`` stays up and falls over
            the last ``decay_ratio`` of the steps (Hu et al., 2024); ``"inverse_sqrt"`` falls with the square root of
            the step (Vaswani et al., 2017); ``"constant"`` stays.
        warmup_steps: steps of a linear rise from zero.
        min_ratio: last learning rate over the highest.
        decay_ratio: share of the steps over which ``"wsd"`` falls.

    Example:
        >>> schedule = Schedule("linear", warmup_steps=2, min_ratio=0.0)
        >>> [round(schedule.factor(step, 6), 2) for step in range(6)]
        [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    name: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "cosine"
    warmup_steps: int = 100
    min_ratio: float = 0.1
    decay_ratio: float = 0.2

    CONFIG_RULES = (
        ("warmup_steps >= 0", "warmup_steps is at least 0"),
        ("min_ratio >= 0 and min_ratio <= 1", "min_ratio is between 0 and 1"),
        ("decay_ratio > 0 and decay_ratio <= 1", "decay_ratio is above 0 and at most 1"),
    )

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by at a step, counted from 0, of ``total``."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "constant":
            return 1.0
        if self.name == "inverse_sqrt":
            return math.sqrt(max(1, self.warmup_steps) / max(1, self.warmup_steps, step + 1))
        peak = max(0, self.warmup_steps - 1)  # the step of the highest rate, from which on it falls
        done = min(1.0, (step - peak) / max(1, total - 1 - peak))
        if self.name == "wsd":
            done = max(0.0, (done - (1 - self.decay_ratio)) / self.decay_ratio)
        shape = 0.5 * (1 + math.cos(math.pi * done)) if self.name == "cosine" else 1 - done
        return self.min_ratio + (1 - self.min_ratio) * shape
