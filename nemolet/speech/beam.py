"""Beam search over labels: CTC by prefixes, transducers frame by frame, with language models and phrases."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemolet.errors import GenerationError
from nemolet.speech.attention_recognizer import AttentionRecognizer
from nemolet.speech.decoding import Hypothesis
from nemolet.speech.encoder import Encoded
from nemolet.speech.joint_beam import joint_beam
from nemolet.speech.models import CTCRecognizer, HybridRecognizer, Recognizer, TransducerRecognizer
from nemolet.speech.prediction import History, TransducerDecoder
from nemolet.speech.scorers import Boost, Matched, Scorer

NEVER = -math.inf
Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Beam:
    """How labels are searched (final).

    Args:
        size: hypotheses that are kept.
        scorer: a language model; None for none.
        weight: of its log-probabilities.
        bonus: added for each label, against a language model's love of short texts.
        boost: phrases that are expected; None for none.
        candidates: labels that are tried at each frame.
    """

    size: int = 8
    scorer: Scorer | None = None
    weight: float = 0.5
    bonus: float = 0.0
    boost: Boost | None = None
    candidates: int = 16

    def __post_init__(self) -> None:
        if self.size < 1 or self.candidates < 1:
            raise GenerationError(
                "the beam keeps nothing",
                where="beam.size, beam.candidates",
                expected="at least 1",
                found=f"{self.size}, {self.candidates}",
            )

    def added(self, prefix: Prefix, label: int, matched: Matched) -> tuple[float, Matched]:
        """What a label adds to the score beside its sound."""
        score = self.bonus
        if self.scorer is not None:
            score += self.weight * self.scorer.scores(prefix)[label]
        if self.boost is not None:
            matched, gain = self.boost.step(matched, label)
            score += gain
        return score, matched

    def final(self, prefix: Prefix, matched: Matched) -> float:
        """What the end adds."""
        score = 0.0 if self.scorer is None else self.weight * self.scorer.end(prefix)
        return score if self.boost is None else score + self.boost.finish(matched)

    def __call__(self, model: Recognizer, encoded: Encoded) -> list[Hypothesis]:
        """The best hypothesis of each row."""
        lengths = encoded.lengths.tolist()
        if isinstance(model, CTCRecognizer) or (isinstance(model, HybridRecognizer) and model.decode_by_ctc):
            with torch.inference_mode():
                logits_BTV = model.frame_logits(encoded.hidden)
            return [ctc_beam(rows[:length], self) for rows, length in zip(logits_BTV, lengths)]
        if isinstance(model, AttentionRecognizer):
            return [joint_beam(model, rows[:length], self) for rows, length in zip(encoded.hidden, lengths)]
        assert isinstance(model, (TransducerRecognizer, HybridRecognizer))
        if isinstance(model, TransducerRecognizer) and model.durations is not None:
            raise GenerationError("a model that skips frames is decoded greedily", where=model.label, fix="set beam=1")
        return [
            transducer_beam(model.decoder, rows[:length], self, max_symbols=model.max_symbols)
            for rows, length in zip(encoded.hidden, lengths)
        ]


@dataclass
class _Path:
    """A prefix with all ways to have written it so far, and the best of them."""

    blank: float = NEVER  # log-probability of the ways that end in a blank
    label: float = NEVER  # and in its last label
    added: float = 0.0
    matched: Matched = field(default_factory=Matched)
    best: float = NEVER  # of one way
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()

    @property
    def sound(self) -> float:
        return _add(self.blank, self.label)

    @property
    def total(self) -> float:
        return self.sound + self.added

    def take(self, way: float, first: tuple[int, ...], last: tuple[int, ...], confidence: tuple[float, ...]) -> None:
        """Keep the times of the best way."""
        if way > self.best:
            self.best, self.first, self.last, self.confidence = way, first, last, confidence


def ctc_beam(logits_TV: Tensor, beam: Beam) -> Hypothesis:
    """Prefix beam search (Hannun et al., 2014): the ways to write one prefix are summed.

    Example:
        >>> probs = torch.tensor([[0.4, 0.6], [0.4, 0.6]])  # the best path is blank, the best text is not
        >>> ctc_beam(probs.log(), Beam()).labels
        [0]
    """
    blank = logits_TV.shape[-1] - 1
    log_probs_TV = logits_TV.float().log_softmax(-1)
    count = min(beam.candidates, blank)
    values_TC, labels_TC = log_probs_TV[:, :blank].topk(count, dim=-1)
    blanks = log_probs_TV[:, blank].tolist()
    paths: dict[Prefix, _Path] = {(): _Path(blank=0.0, best=0.0)}
    for frame, (values, labels) in enumerate(zip(values_TC.tolist(), labels_TC.tolist())):
        heard = dict(zip(labels, values))
        now: dict[Prefix, _Path] = {}
        for prefix, path in paths.items():
            stay = _kept(now, prefix, path)
            stay.blank = _add(stay.blank, path.sound + blanks[frame])
            stay.take(path.best + blanks[frame], path.first, path.last, path.confidence)
            for label, value in heard.items():
                again = bool(prefix) and prefix[-1] == label
                if again:
                    stay.label = _add(stay.label, path.label + value)
                    sure = (*path.confidence[:-1], max(path.confidence[-1], math.exp(value)))
                    stay.take(path.best + value, path.first, (*path.last[:-1], frame), sure)
                before = path.blank if again else path.sound
                if before == NEVER:
                    continue
                longer = now.get((*prefix, label))
                if longer is None:
                    added, matched = beam.added(prefix, label, path.matched)
                    longer = now[(*prefix, label)] = _Path(added=path.added + added, matched=matched)
                longer.label = _add(longer.label, before + value)
                sure = (*path.confidence, math.exp(value))
                longer.take(path.best + value, (*path.first, frame), (*path.last, frame), sure)
        paths = dict(sorted(now.items(), key=lambda item: -item[1].total)[: beam.size])
    return _best(paths, beam)


def _kept(now: dict[Prefix, _Path], prefix: Prefix, path: _Path) -> _Path:
    if prefix not in now:
        now[prefix] = _Path(added=path.added, matched=path.matched)
    return now[prefix]


@torch.inference_mode()
def transducer_beam(decoder: TransducerDecoder, hidden_TD: Tensor, beam: Beam, *, max_symbols: int = 3) -> Hypothesis:
    """At each frame every hypothesis may write some labels; those that are equal afterwards are summed."""
    count = min(beam.candidates, decoder.blank)
    paths: dict[Prefix, _Path] = {(): _Path(blank=0.0, best=0.0)}
    for frame, hidden_D in enumerate(hidden_TD):
        done: dict[Prefix, _Path] = {}
        writing = paths
        for _ in range(max_symbols + 1):
            if not writing:
                break
            states = decoder.state(_history(decoder, writing))
            log_probs_PV = decoder.join(hidden_D[None], states).float().log_softmax(-1)
            values_PC, labels_PC = log_probs_PV[:, : decoder.blank].topk(count, dim=-1)
            blanks = log_probs_PV[:, decoder.blank].tolist()
            longer: dict[Prefix, _Path] = {}
            for (prefix, path), end, values, labels in zip(
                writing.items(), blanks, values_PC.tolist(), labels_PC.tolist()
            ):
                kept = _kept(done, prefix, path)
                kept.blank = _add(kept.blank, path.blank + end)
                kept.take(path.best + end, path.first, path.last, path.confidence)
                for label, value in zip(labels, values):
                    added, matched = beam.added(prefix, label, path.matched)
                    new = _Path(path.blank + value, added=path.added + added, matched=matched)
                    sure = (*path.confidence, math.exp(value))
                    new.take(path.best + value, (*path.first, frame), (*path.last, frame), sure)
                    longer[(*prefix, label)] = new
            least = _least(done, beam.size)
            ranked = sorted(longer.items(), key=lambda item: -item[1].total)[: beam.size]
            writing = {prefix: path for prefix, path in ranked if path.total > least}
        paths = dict(sorted(done.items(), key=lambda item: -item[1].total)[: beam.size])
    return _best(paths, beam)


def _least(paths: dict[Prefix, _Path], size: int) -> float:
    """What a hypothesis has to exceed to be kept."""
    totals = sorted((path.total for path in paths.values()), reverse=True)
    return totals[size - 1] if len(totals) >= size else NEVER


def _history(decoder: TransducerDecoder, prefixes: Iterable[Prefix]) -> History:
    padded = [(*(decoder.blank,) * decoder.context, *prefix)[-decoder.context :] for prefix in prefixes]
    return History(torch.tensor(padded, device=decoder.out.weight.device))


def _best(paths: dict[Prefix, _Path], beam: Beam) -> Hypothesis:
    for prefix, path in paths.items():
        path.added += beam.final(prefix, path.matched)
    prefix, path = max(paths.items(), key=lambda item: item[1].total)
    return Hypothesis(list(prefix), list(path.first), list(path.last), list(path.confidence), path.total)


def _add(one: float, other: float) -> float:
    """Logarithm of a sum."""
    if one < other:
        one, other = other, one
    return one if other == NEVER else one + math.log1p(math.exp(other - one))
