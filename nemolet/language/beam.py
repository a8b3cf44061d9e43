"""Beam search: the most probable text that a model from text to text writes, as far as a beam can see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nemolet.errors import GenerationError
from nemolet.generation_rules import Beam, GenerationRules
from nemolet.language.constraints import Constraints
from nemolet.nn.cache import KVCache

_LONGEST = 128  # tokens of a text, where nobody says


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


class Hypothesis(NamedTuple):
    """A text that was found, and what it is worth."""

    tokens: list[int]
    worth: float


@dataclass
class _Row:
    """The hypotheses of one source that are complete, and whether more are looked for."""

    done: list[Hypothesis] = field(default_factory=list)
    open: bool = True

    def add(self, hypothesis: Hypothesis, size: int) -> None:
        self.done = sorted([*self.done, hypothesis], key=lambda h: -h.worth)[:size]


@torch.inference_mode()
def beam_search(
    model: SequenceModel,
    source_BS: Tensor,
    source_mask_BS: Tensor,
    *,
    rules: GenerationRules,
    beam: Beam | None = None,
    constraints: Constraints | None = None,
) -> list[list[Hypothesis]]:
    """The best texts for each source, the best first; without the token that ends them.

    With the rules of a checkpoint it finds what transformers finds, in its ``generate`` with one or several beams.

    Args:
        model: in evaluation mode.
        source_BS: what is read.
        source_mask_BS: False at padding.
        rules: with the token before a text and those that end one.
        beam: how far the search looks; None for that of the rules.
        constraints: what every text has to contain, and what none may.

    Raises:
        GenerationError: for rules without beginning or end, or where no text that was seen obeys the constraints.
    """
    beam, constraints = beam or rules.beam or Beam(), constraints or Constraints()
    start, longest = rules.beginning(), beam.max_length or rules.room(1) or _LONGEST
    batch, size = source_BS.shape[0], beam.size
    memory = model.encode(source_BS, source_mask_BS).repeat_interleave(size, 0)
    seen = source_mask_BS.repeat_interleave(size, 0)
    cache = model.new_cache(batch * size, longest)
    tokens = torch.full((batch * size, 1), start, device=source_BS.device)
    scores_BK = torch.full((batch, size), -torch.inf, device=source_BS.device)
    scores_BK[:, 0] = 0.0  # all hypotheses are the same at first, so one of them is enough
    written: list[list[int]] = [[] for _ in range(batch * size)]
    rows = [_Row() for _ in range(batch)]
    for length in range(1, longest + 1):
        logits = model.decode(tokens, memory, seen, cache=cache, last_only=True)[:, -1].float()
        log_probs = _log_probs(logits, written, rules, beam, start, longest)
        after = (scores_BK.flatten()[:, None] + log_probs).view(batch, -1)
        vocab = logits.shape[-1]
        candidates = _candidates(after, written, vocab, beam, rules.stop, constraints)
        parents, chosen, kept = [], [], []
        for number, row in enumerate(rows):
            texts = _Texts(number * size, vocab, written, length == longest)
            live = _advance(row, candidates[number], texts, rules.stop, beam, constraints)
            _close(row, max((score for _, _, score in live), default=-torch.inf), beam, length, longest)
            live += [(number * size, rules.stop[0], -torch.inf)] * (size - len(live))  # nothing goes on here
            parents += [parent for parent, _, _ in live]
            chosen += [token for _, token, _ in live]
            kept += [score for _, _, score in live]
        written = [[*written[parent], token] for parent, token in zip(parents, chosen)]
        scores_BK = torch.tensor(kept, device=source_BS.device).view(batch, size)
        if not any(row.open for row in rows):
            break
        cache.reorder(torch.tensor(parents, device=source_BS.device), same_memory=True)
        tokens = torch.tensor(chosen, device=source_BS.device)[:, None]
    for number, row in enumerate(rows):
        if constraints and not row.done:
            raise GenerationError(
                "no text that was found obeys the constraints",
                where=f"source {number}",
                expected=f"all of {list(constraints.forced)} and none of {list(constraints.forbidden)}",
                fix="allow more tokens (max_length), a wider beam, or fewer phrases",
            )
    return [row.done for row in rows]


def _log_probs(
    logits_BV: Tensor, written: Sequence[list[int]], rules: GenerationRules, beam: Beam, start: int, longest: int
) -> Tensor:
    """Scores of the next tokens as the rules leave them; with one hypothesis they bind logits, as in greedy search."""
    scores_BV = logits_BV if beam.size == 1 else logits_BV.log_softmax(-1)
    scores_BV = rules.bound(scores_BV, [([start, *text], 1, longest + 1) for text in written])
    return scores_BV.log_softmax(-1) if beam.size == 1 or rules.renormalize else scores_BV


def _candidates(
    after_BM: Tensor,
    written: Sequence[list[int]],
    vocab: int,
    beam: Beam,
    stop: Sequence[int],
    constraints: Constraints,
) -> list[list[tuple[float, int]]]:
    """Score and number of the texts that each row may go on with, in the order in which they are taken."""
    batch, many = len(after_BM), min(max(2, 1 + len(stop)) * beam.size, after_BM.shape[1])
    if not constraints:
        best_BM, index_BM = after_BM.topk(many, dim=-1)
        return [list(zip(best.tolist(), index.tolist())) for best, index in zip(best_BM, index_BM)]
    chosen = []
    for row in range(batch):
        texts = written[row * beam.size : (row + 1) * beam.size]
        after_KV = after_BM[row].view(beam.size, vocab)
        for text, scores_V in zip(texts, after_KV):
            out = constraints.ruled_out(text) | (set() if constraints.complete(text) else set(stop))
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


class _Texts(NamedTuple):
    """The texts of one source: where they stand among all, and what is written of them."""

    first: int
    vocab: int
    written: Sequence[list[int]]
    last: bool  # whether they end with the next token, whatever it is


def _advance(
    row: _Row,
    candidates: Sequence[tuple[float, int]],
    texts: _Texts,
    stop: Sequence[int],
    beam: Beam,
    constraints: Constraints,
) -> list[tuple[int, int, float]]:
    """Put texts that end among the complete ones; return parent, token and score of those that go on."""
    live: list[tuple[int, int, float]] = []
    for rank, (score, index) in enumerate(candidates):
        parent, token = texts.first + index // texts.vocab, index % texts.vocab
        if score == -torch.inf:
            continue
        text = texts.written[parent] if token in stop else [*texts.written[parent], token]
        if token in stop or texts.last:
            if row.open and rank < beam.size and constraints.complete(text):
                row.add(Hypothesis(list(text), beam.worth(score, len(texts.written[parent]) + 1)), beam.size)
        elif len(live) < beam.size:
            live.append((parent, token, score))
    return live


def _close(row: _Row, best: float, beam: Beam, length: int, longest: int) -> None:
    """End the search for a text where nothing that goes on counts any more."""
    if best == -torch.inf or (len(row.done) == beam.size and (beam.ends == "first" or beam.size == 1)):
        row.open = False
    elif len(row.done) == beam.size:
        far = longest if beam.ends == "never" and beam.length_penalty > 0 else length
        row.open = row.open and beam.worth(best, far) > row.done[-1].worth
