"""Beam search over labels: CTC by prefixes, transducers frame by frame, with language models and phrases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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
        durations = model.durations if isinstance(model, TransducerRecognizer) else None
        return [
            transducer_beam(model.decoder, rows[:length], self, max_symbols=model.max_symbols, durations=durations)
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
        paths = _likeliest(now, beam.size)
    return _best(paths, beam)


def _kept(now: dict[Prefix, _Path], prefix: Prefix, path: _Path) -> _Path:
    if prefix not in now:
        now[prefix] = _Path(added=path.added, matched=path.matched)
    return now[prefix]


@torch.inference_mode()
def transducer_beam(
    decoder: TransducerDecoder,
    hidden_TD: Tensor,
    beam: Beam,
    *,
    max_symbols: int = 3,
    durations: Sequence[int] | None = None,
) -> Hypothesis:
    """At each frame every hypothesis may write some labels; those that are equal at a later frame are summed.

    A blank that would go beyond the end reaches it, as in greedy search.

    Args:
        decoder: prediction network and joint.
        hidden_TD: frames of one utterance.
        beam: what is kept.
        max_symbols: most labels at one frame.
        durations: frames that an arc may skip (TDT); None where a blank skips one and a label none (RNN-T).
    """
    reached: list[dict[Prefix, _Path]] = [{} for _ in range(len(hidden_TD) + 1)]  # at each frame, and at the end
    reached[0][()] = _Path(blank=0.0, best=0.0)
    for frame, hidden_D in enumerate(hidden_TD):
        here, *later = reached[frame:]
        writing = _likeliest(here, beam.size)
        for turn in range(max_symbols + 1):
            if not writing:
                break
            states = decoder.state(_history(decoder, writing))
            scores_PV = decoder.join(hidden_D[None], states).float()
            longer: dict[Prefix, _Path] = {}
            for (prefix, path), arcs in zip(writing.items(), _arcs(scores_PV, decoder.blank, beam, durations)):
                for skip, value in arcs.ends:
                    times = path.first, path.last, path.confidence
                    place = later[min(skip, len(later)) - 1]
                    _arrive(place, prefix, path, value, path.added, path.matched, times)
                for label, value in arcs.labels if turn < max_symbols else ():
                    added, matched = beam.added(prefix, label, path.matched)
                    for skip, more in arcs.skips:
                        if skip >= max(len(later), 1):  # the end is reached by a blank
                            continue
                        last = (*path.last, frame + max(skip, 1) - 1)
                        times = (*path.first, frame), last, (*path.confidence, math.exp(value))
                        place = later[skip - 1] if skip else longer
                        _arrive(place, (*prefix, label), path, value + more, path.added + added, matched, times)
            least = _least(later, beam.size)
            writing = {prefix: path for prefix, path in _likeliest(longer, beam.size).items() if path.total > least}
        here.clear()
    return _best(reached[-1], beam)


class _Arcs(NamedTuple):
    """What leaves a state: blanks by the frames they skip, labels, and what a label adds for the frames it skips."""

    ends: list[tuple[int, float]]
    labels: list[tuple[int, float]]
    skips: list[tuple[int, float]]


def _arcs(scores_PV: Tensor, blank: int, beam: Beam, durations: Sequence[int] | None) -> Iterator[_Arcs]:
    """Log-probabilities of the arcs of each hypothesis; without durations a blank skips one frame, a label none."""
    tokens_PV = scores_PV[:, : blank + 1].log_softmax(-1)
    values_PC, labels_PC = tokens_PV[:, :blank].topk(min(beam.candidates, blank), dim=-1)
    skips_PD = scores_PV[:, blank + 1 :].log_softmax(-1).tolist()
    ends, all_values, all_labels = tokens_PV[:, blank].tolist(), values_PC.tolist(), labels_PC.tolist()
    for end, values, labels, skips in zip(ends, all_values, all_labels, skips_PD):
        written = list(zip(labels, values))
        if durations is None:
            yield _Arcs([(1, end)], written, [(0, 0.0)])
        else:
            ways = list(zip(durations, skips))
            yield _Arcs([(skip, end + way) for skip, way in ways if skip], written, ways)


def _arrive(
    place: dict[Prefix, _Path],
    prefix: Prefix,
    path: _Path,
    value: float,
    added: float,
    matched: Matched,
    times: tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]],
) -> None:
    """Add a way to write a prefix to those that are at a place."""
    found = place.setdefault(prefix, _Path(added=added, matched=matched))
    found.blank = _add(found.blank, path.blank + value)
    found.take(path.best + value, *times)


def _likeliest(paths: dict[Prefix, _Path], size: int) -> dict[Prefix, _Path]:
    return dict(sorted(paths.items(), key=lambda item: -item[1].total)[:size])


def _least(places: Sequence[dict[Prefix, _Path]], size: int) -> float:
    """What a hypothesis has to exceed to be kept."""
    totals = sorted((path.total for paths in places for path in paths.values()), reverse=True)
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
