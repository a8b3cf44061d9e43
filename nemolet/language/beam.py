"""Beam search: the most probable text that a model from text to text writes, as far as a beam can see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nemolet.errors import GenerationError
from nemolet.language.constraints import Constraints
from nemolet.nn.cache import KVCache


class SequenceModel(Protocol):
    """What beam search needs of a model."""

    def encode(self, source_BS: Tensor, source_mask_BS: Tensor | None = None) -> Tensor: ...

    def decode(
        self,
        tokens: Tensor,
        memory_BSD: Tensor,
        memory_mask_BS: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor: ...

    def new_cache(self, batch: int, capacity: int) -> KVCache: ...


@dataclass(frozen=True)
class Beam:
    """How far the search looks.

    Args:
        size: hypotheses that are kept; 1 is greedy.
        length_penalty: 0 compares sums of log-probabilities, which favours short texts; with 1 they are almost means
            (Wu et al., 2016, equation 14).
        max_length: most tokens that are written.

    Raises:
        GenerationError: for a beam without hypotheses or length.
    """

    size: int = 4
    length_penalty: float = 1.0
    max_length: int = 128

    def __post_init__(self) -> None:
        if self.size < 1 or self.max_length < 1 or self.length_penalty < 0:
            raise GenerationError(
                "the beam is impossible",
                where="beam",
                expected="size and max_length of at least 1, length_penalty of at least 0",
                found=self,
            )

    def worth(self, score: float, length: int) -> float:
        """The score by which texts of different lengths are compared."""
        penalty: float = ((5 + length) / 6) ** self.length_penalty
        return score / penalty


class Hypothesis(NamedTuple):
    """A text that was found, and what it is worth."""

    tokens: list[int]
    worth: float


@dataclass
class _Row:
    """The hypotheses of one source that are complete."""

    done: list[Hypothesis] = field(default_factory=list)

    def add(self, hypothesis: Hypothesis, size: int) -> None:
        self.done = sorted([*self.done, hypothesis], key=lambda h: -h.worth)[:size]


@torch.inference_mode()
def beam_search(
    model: SequenceModel,
    source_BS: Tensor,
    source_mask_BS: Tensor,
    *,
    start: int,
    end: int,
    beam: Beam | None = None,
    constraints: Constraints | None = None,
) -> list[list[Hypothesis]]:
    """The best texts for each source, the best first; without the token that ends them.

    Args:
        model: in evaluation mode.
        source_BS: what is read.
        source_mask_BS: False at padding.
        start: the token that a text begins with.
        end: the token that ends it.
        beam: how far the search looks.
        constraints: what every text has to contain, and what none may.

    Raises:
        GenerationError: where no text that was seen obeys the constraints.
    """
    beam, constraints = beam or Beam(), constraints or Constraints()
    batch, size = source_BS.shape[0], beam.size
    memory = model.encode(source_BS, source_mask_BS).repeat_interleave(size, 0)
    seen = source_mask_BS.repeat_interleave(size, 0)
    cache = model.new_cache(batch * size, beam.max_length)
    tokens = torch.full((batch * size, 1), start, device=source_BS.device)
    scores_BK = torch.full((batch, size), -torch.inf, device=source_BS.device)
    scores_BK[:, 0] = 0.0  # all hypotheses are the same at first, so one of them is enough
    written: list[list[int]] = [[] for _ in range(batch * size)]
    rows = [_Row() for _ in range(batch)]
    for length in range(1, beam.max_length + 1):
        logits = model.decode(tokens, memory, seen, cache=cache, last_only=True)[:, -1].float()
        after = (scores_BK.flatten()[:, None] + logits.log_softmax(-1)).view(batch, -1)
        vocab = logits.shape[-1]
        candidates = _candidates(after, written, vocab, beam, end, constraints)
        parents, chosen, kept = [], [], []
        for row in range(batch):
            live = _advance(rows[row], candidates[row], vocab, row * size, written, beam, length, end)
            live += [(row * size, end, -torch.inf)] * (size - len(live))  # nothing goes on here
            parents += [parent for parent, _, _ in live]
            chosen += [token for _, token, _ in live]
            kept += [score for _, _, score in live]
        written = [[*written[parent], token] for parent, token in zip(parents, chosen)]
        scores_BK = torch.tensor(kept, device=source_BS.device).view(batch, size)
        if all(_finished(rows[row], scores_BK[row], beam, length) for row in range(batch)):
            break
        cache.reorder(torch.tensor(parents, device=source_BS.device), same_memory=True)
        tokens = torch.tensor(chosen, device=source_BS.device)[:, None]
    for row in range(batch):  # what the length limit cut off counts where nothing ended by itself
        for k in range(size):
            text = written[row * size + k]
            if not rows[row].done and scores_BK[row, k] > -torch.inf and constraints.complete(text):
                rows[row].add(Hypothesis(text, beam.worth(float(scores_BK[row, k]), len(text))), size)
        if constraints and not rows[row].done:
            raise GenerationError(
                "no text that was found obeys the constraints",
                where=f"source {row}",
                expected=f"all of {list(constraints.forced)} and none of {list(constraints.forbidden)}",
                fix="allow more tokens (max_length), a wider beam, or fewer phrases",
            )
    return [row.done for row in rows]


def _candidates(
    after_BM: Tensor, written: Sequence[list[int]], vocab: int, beam: Beam, end: int, constraints: Constraints
) -> list[list[tuple[float, int]]]:
    """Score and number of the texts that each row may go on with, in the order in which they are taken."""
    batch, many = len(after_BM), min(2 * beam.size, after_BM.shape[1])
    if not constraints:
        best_BM, index_BM = after_BM.topk(many, dim=-1)
        return [list(zip(best.tolist(), index.tolist())) for best, index in zip(best_BM, index_BM)]
    chosen = []
    for row in range(batch):
        texts = written[row * beam.size : (row + 1) * beam.size]
        after_KV = after_BM[row].view(beam.size, vocab)
        for text, scores_V in zip(texts, after_KV):
            out = constraints.ruled_out(text) | (set() if constraints.complete(text) else {end})
            scores_V[sorted(out)] = -torch.inf
        numbers = set(after_BM[row].topk(many).indices.tolist())
        numbers |= {k * vocab + int(token) for k, token in enumerate(after_KV.argmax(-1))}  # each has a chance to go on
        numbers |= {k * vocab + token for k, text in enumerate(texts) for token in constraints.advancing(text)}
        scores = {number: float(after_BM[row, number]) for number in numbers}
        following = [
            (score, number, [*texts[number // vocab], number % vocab])
            for number, score in scores.items()
            if score > -torch.inf
        ]
        chosen.append(constraints.shared_out(following))
    return chosen


def _advance(
    row: _Row,
    candidates: Sequence[tuple[float, int]],
    vocab: int,
    first: int,
    written: Sequence[list[int]],
    beam: Beam,
    length: int,
    end: int,
) -> list[tuple[int, int, float]]:
    """Put texts that end among the complete ones; return parent, token and score of those that go on."""
    live: list[tuple[int, int, float]] = []
    for rank, (score, index) in enumerate(candidates):
        parent, token = first + index // vocab, index % vocab
        if score == -torch.inf or len(live) == beam.size:
            continue
        if token == end:
            if rank < beam.size:
                row.add(Hypothesis(list(written[parent]), beam.worth(score, length)), beam.size)
        else:
            live.append((parent, token, score))
    return live


def _finished(row: _Row, scores_K: Tensor, beam: Beam, length: int) -> bool:
    """Whether nothing that goes on can be worth more than the worst of the complete ones."""
    if bool((scores_K == -torch.inf).all()):
        return True
    if len(row.done) < beam.size:
        return False
    longest = beam.max_length if beam.length_penalty else length
    return beam.worth(float(scores_K.max()), longest) <= row.done[-1].worth
