"""What a beam search knows beside the audio: language models, and phrases that are to be expected."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch

from nemolet.errors import GenerationError
from nemolet.module import NeuralModule

History = tuple[int, ...]


class Scorer(Protocol):
    """Log-probabilities of the label that follows others."""

    def scores(self, history: History) -> Sequence[float]:
        """One for each label of the vocabulary."""

    def end(self, history: History) -> float:
        """That nothing follows."""


class NgramModel:
    """An n-gram model of labels, interpolated over all orders (Witten and Bell, 1991; final).

    Args:
        texts: labels of each text.
        vocab_size: number of labels.
        order: labels that are looked at, the new one included.

    Example:
        >>> model = NgramModel([[0, 1, 0, 1]], vocab_size=2, order=2)
        >>> model.scores((0,))[1] > model.scores((0,))[0]
        True
    """

    def __init__(self, texts: Iterable[Sequence[int]], *, vocab_size: int, order: int = 4) -> None:
        if order < 1:
            raise GenerationError("an n-gram has a label", where="order", expected="at least 1", found=order)
        self.order, self.vocab_size = order, vocab_size
        counts: dict[History, Counter[int]] = defaultdict(Counter)
        for text in texts:
            labels = (*text, vocab_size)  # the end counts as a label
            for place, label in enumerate(labels):
                for length in range(min(order - 1, place) + 1):
                    counts[labels[place - length : place]][label] += 1
        self.counts = dict(counts)
        self._known: dict[History, list[float]] = {}

    def scores(self, history: History) -> Sequence[float]:
        """Log-probability of each label, and last of the end."""
        context = history[max(0, len(history) - self.order + 1) :] if self.order > 1 else ()
        if context not in self._known:
            self._known[context] = [math.log(p) for p in self._probabilities(context)]
        return self._known[context]

    def end(self, history: History) -> float:
        """Log-probability that the text ends."""
        return self.scores(history)[self.vocab_size]

    def _probabilities(self, context: History) -> list[float]:
        """Each order gives what it has not seen to the next shorter one."""
        found = [1.0 / (self.vocab_size + 1)] * (self.vocab_size + 1)
        for length in range(len(context) + 1):
            seen = self.counts.get(context[len(context) - length :])
            if seen is None:
                break
            total, kinds = seen.total(), len(seen)
            found = [p * kinds / (total + kinds) for p in found]
            for label, count in seen.items():
                found[label] += count / (total + kinds)
        return found


class NeuralScorer:
    """A causal language model with the recognizer's vocabulary (final).

    Args:
        model: from tokens to logits, in evaluation.
        vocab_size: labels of the recognizer.
        start: token before the first label; a model that has none is asked from the second label on.
        end_token: token that ends a text, or None.
    """

    def __init__(
        self, model: NeuralModule, *, vocab_size: int, start: int | None = None, end_token: int | None = None
    ) -> None:
        self.model, self.vocab_size, self.start, self.end_token = model.eval(), vocab_size, start, end_token
        self._known: dict[History, list[float]] = {}

    def scores(self, history: History) -> Sequence[float]:
        """Log-probability of each label; each history is computed once."""
        if history not in self._known:
            tokens = history if self.start is None else (self.start, *history)
            if not tokens:
                self._known[history] = [-math.log(self.vocab_size)] * self.vocab_size
            else:
                device = next(self.model.parameters()).device
                with torch.inference_mode():
                    logits = self.model(torch.tensor([tokens], device=device))[0, -1]
                self._known[history] = logits.float().log_softmax(-1).tolist()
        return self._known[history]

    def end(self, history: History) -> float:
        """Log-probability of the end, or 0 where the model knows none."""
        return 0.0 if self.end_token is None else self.scores(history)[self.end_token]


class Matched(NamedTuple):
    """How far into which phrase a hypothesis is, and what it was promised for it."""

    node: int = 0
    promised: float = 0.0


class Boost:
    """Phrases that are worth more: each label of one adds a bonus, which is lost if the phrase is not finished (final).

    Args:
        phrases: labels of each phrase.
        weight: bonus of a label.

    Example:
        >>> boost = Boost([[1, 2]], weight=2.0)
        >>> state, first = boost.step(Matched(), 1)
        >>> _, second = boost.step(state, 2)
        >>> _, lost = boost.step(state, 3)
        >>> first, second, lost
        (2.0, 2.0, -2.0)
    """

    def __init__(self, phrases: Iterable[Sequence[int]], *, weight: float = 1.0) -> None:
        self.weight = weight
        self.next: list[dict[int, int]] = [{}]
        self.ends: set[int] = set()
        for phrase in phrases:
            node = 0
            for label in phrase:
                if label not in self.next[node]:
                    self.next[node][label] = len(self.next)
                    self.next.append({})
                node = self.next[node][label]
            if node:
                self.ends.add(node)

    def step(self, state: Matched, label: int) -> tuple[Matched, float]:
        """The state after a label, and what the label adds to the score."""
        gain = 0.0
        node = self.next[state.node].get(label)
        promised = state.promised
        if node is None and state.node:
            gain, promised = -promised, 0.0
            node = self.next[0].get(label)
        if node is None:
            return Matched(), gain
        promised += self.weight
        if node in self.ends:  # what is finished stays
            promised = 0.0
        return Matched(node if self.next[node] else 0, promised), gain + self.weight

    def finish(self, state: Matched) -> float:
        """What is lost at the end of the audio."""
        return -state.promised
