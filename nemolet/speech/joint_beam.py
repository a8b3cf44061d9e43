"""Beam search over the labels of an attention decoder, with CTC's probability of what begins so."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemolet.speech.attention_recognizer import AttentionRecognizer
from nemolet.speech.ctc_prefix import CTCPrefix, chosen
from nemolet.speech.decoding import Hypothesis
from nemolet.speech.encoder import Encoded
from nemolet.speech.scorers import Matched

if TYPE_CHECKING:
    from nemolet.speech.beam import Beam


@dataclass(frozen=True)
class _Text:
    """Labels written so far; ``total`` counts the decoder, CTC and what the beam adds."""

    labels: tuple[int, ...] = ()
    spoken: float = 0.0  # by the decoder
    added: float = 0.0
    matched: Matched = field(default_factory=Matched)
    confidence: tuple[float, ...] = ()
    total: float = 0.0
    state: int = 0  # of CTC, among those of the last step
    row: int = 0  # of the cache


@torch.inference_mode()
def joint_beam(model: AttentionRecognizer, hidden_TD: Tensor, beam: Beam) -> Hypothesis:
    """The best text of one recording.

    Args:
        model: gives the scores of both, and the weight of CTC.
        hidden_TD: from the encoder, valid frames only.
        beam: how many texts are kept, and what is added for a language model and for phrases.
    """
    if not len(hidden_TD):
        return Hypothesis()
    log_probs_TV = model.frame_logits(hidden_TD[None])[0].float().log_softmax(-1)
    ctc = CTCPrefix(log_probs_TV)
    cache = model.new_cache(1, len(hidden_TD) + 1)
    texts, states = [_Text()], ctc.start()
    best: _Text | None = None
    growing = beam.bonus > 0 or beam.boost is not None or (beam.scorer is not None and beam.weight < 0)
    while texts:
        rows = torch.tensor([text.row for text in texts], device=hidden_TD.device)
        cache.reorder(rows)
        states = chosen(states, torch.tensor([text.state for text in texts], device=hidden_TD.device))
        last_R1 = torch.tensor([[(text.labels or (model.end,))[-1]] for text in texts], device=hidden_TD.device)
        lengths_R = torch.full((len(texts),), len(hidden_TD), device=hidden_TD.device)
        memory = Encoded(hidden_TD.expand(len(texts), *hidden_TD.shape), lengths_R)
        spoken_RV = model.next_logits(last_R1, memory, cache)[:, -1].float().log_softmax(-1)
        begun_RV, states = ctc.extend(states)
        longer: list[_Text] = []
        for row, text in enumerate(texts):
            done = _ended(text, float(spoken_RV[row, -1]), float(begun_RV[row, -1]), model, beam)
            if best is None or done.total > best.total:
                best = done
            longer += _extended(text, row, spoken_RV[row], begun_RV[row], model, beam)
        longer.sort(key=lambda text: -text.total)
        texts = longer[: beam.size]
        if texts and best is not None and not growing and best.total >= texts[0].total:
            break
    assert best is not None
    found = Hypothesis(list(best.labels), confidence=list(best.confidence), score=best.total)
    lengths_B = torch.tensor([len(hidden_TD)], device=hidden_TD.device)
    return model.placed([found], Encoded(hidden_TD[None], lengths_B))[0]


def _extended(
    text: _Text, row: int, spoken_V: Tensor, begun_V: Tensor, model: AttentionRecognizer, beam: Beam
) -> list[_Text]:
    """A text with the likeliest labels after it; those for which CTC has no frame are left out."""
    weight, labels = model.ctc_weight, model.vocab_size
    both_V = _weighed(weight, begun_V[:labels]) + _weighed(1 - weight, text.spoken + spoken_V[:labels])
    both_V = both_V.masked_fill(begun_V[:labels] == -math.inf, -math.inf)
    values, indices = both_V.topk(min(beam.candidates, labels))
    found = []
    for value, label in zip(values.tolist(), indices.tolist()):
        if value == -math.inf:
            continue
        added, matched = beam.added(text.labels, label, text.matched)
        found.append(
            _Text(
                (*text.labels, label),
                text.spoken + float(spoken_V[label]),
                text.added + added,
                matched,
                (*text.confidence, float(spoken_V[label].exp())),
                value + text.added + added,
                row * labels + label,
                row,
            )
        )
    return found


def _ended(text: _Text, spoken: float, heard: float, model: AttentionRecognizer, beam: Beam) -> _Text:
    """The text with nothing after it."""
    weight = model.ctc_weight
    sound = (weight * heard if weight else 0.0) + (1 - weight) * (text.spoken + spoken)
    total = sound + text.added + beam.final(text.labels, text.matched)
    return _Text(text.labels, text.spoken + spoken, text.added, text.matched, text.confidence, total)


def _weighed(weight: float, scores: Tensor) -> Tensor:
    """No weight means no say, even where a score is minus infinity."""
    return weight * scores if weight else torch.zeros_like(scores)
