"""How well classes, speakers and stretches of speech are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nemolet.errors import DataError


@dataclass(frozen=True, eq=False)
class Confusion:
    """Which classes were taken for which (final).

    Args:
        counts: ``[classes, classes]``; rows are what was right, columns what was predicted.
        names: of the classes.

    Example:
        >>> confusion = Confusion.of([0, 0, 1, 1], [0, 1, 1, 1], names=["no", "yes"])
        >>> confusion.accuracy
        0.75
        >>> print(confusion)
              no  yes  recall
        no     1    1   50.0%
        yes    0    2  100.0%
        precision  100.0%  66.7%
        >>> confusion.worst()
        [('no', 'yes', 1)]
    """

    counts: NDArray[np.int64]
    names: tuple[str, ...]

    @classmethod
    def of(cls, labels: ArrayLike, predictions: ArrayLike, *, names: Sequence[str]) -> Confusion:
        """Count pairs of numbers; a label of -100 does not count."""
        right, given = np.asarray(labels, np.int64).ravel(), np.asarray(predictions, np.int64).ravel()
        kept = right >= 0
        counts = np.zeros((len(names), len(names)), np.int64)
        np.add.at(counts, (right[kept], given[kept]), 1)
        return cls(counts, tuple(names))

    @property
    def accuracy(self) -> float:
        """Share of the samples that are right."""
        return float(np.trace(self.counts) / max(1, self.counts.sum()))

    @property
    def recall(self) -> NDArray[np.float64]:
        """Of each class: share of its samples that were found."""
        return _shares(self.counts, axis=1)

    @property
    def precision(self) -> NDArray[np.float64]:
        """Of each class: share of what was taken for it that is right."""
        return _shares(self.counts, axis=0)

    def worst(self, count: int = 5) -> list[tuple[str, str, int]]:
        """The commonest mistakes: what it was, what it was taken for, how often."""
        mistakes = self.counts - np.diag(np.diag(self.counts))
        order = np.argsort(-mistakes, axis=None, kind="stable")[:count]
        pairs = zip(*np.unravel_index(order, mistakes.shape))
        return [(self.names[i], self.names[j], int(mistakes[i, j])) for i, j in pairs if mistakes[i, j]]

    def __str__(self) -> str:
        wide = max(map(len, self.names))
        cell = max(3, *(len(str(n)) for n in (self.counts.max(), *self.names)))
        lines = [" " * wide + "".join(f"  {name:>{cell}}" for name in self.names) + "  recall"]
        for name, row, recall in zip(self.names, self.counts, self.recall):
            lines.append(f"{name:<{wide}}" + "".join(f"  {n:>{cell}}" for n in row) + f"  {100 * recall:5.1f}%")
        return "\n".join([*lines, "precision  " + "  ".join(f"{100 * p:.1f}%" for p in self.precision)])


def _shares(counts: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
    """What is on the diagonal, by the sums of rows or columns."""
    shares: NDArray[np.float64] = np.diag(counts) / np.maximum(1, counts.sum(axis))
    return shares


class Verification(NamedTuple):
    """How well scores tell pairs of one speaker from pairs of two."""

    equal_error_rate: float
    threshold: float  # at which false acceptances and false rejections are equally frequent
    minimum_cost: float  # the detection cost at its best threshold, 1 for deciding blindly


def verification(
    scores: ArrayLike, same: ArrayLike, *, prior: float = 0.01, miss_cost: float = 1.0, false_cost: float = 1.0
) -> Verification:
    """Equal error rate and minimum detection cost (minDCF, as NIST normalises it).

    Args:
        scores: of each pair; higher means more alike.
        same: whether it is one speaker.
        prior: how probable that is where the system is used.
        miss_cost: of refusing the right speaker.
        false_cost: of accepting a wrong one.

    Raises:
        DataError: for scores that are no numbers, or pairs of one kind only.

    Example:
        >>> verification([0.9, 0.8, 0.3, 0.1], [True, True, False, False]).equal_error_rate
        0.0
    """
    misses, falses, thresholds = detection_curve(scores, same)
    crossing = int(np.argmax(misses >= falses))
    before = max(crossing - 1, 0)
    # Between two thresholds both rates are taken to change evenly.
    gap, next_gap = falses[before] - misses[before], falses[crossing] - misses[crossing]
    share = gap / (gap - next_gap) if gap != next_gap else 0.0
    rate = misses[before] + share * (misses[crossing] - misses[before])
    costs = miss_cost * misses * prior + false_cost * falses * (1 - prior)
    blind = min(miss_cost * prior, false_cost * (1 - prior))
    return Verification(float(rate), float(thresholds[crossing]), float(costs.min() / blind))


def detection_curve(
    scores: ArrayLike, same: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Rates of misses and of false alarms at every threshold, from the lowest to the highest; and the thresholds.

    A pair is accepted where its score is at least the threshold; the last threshold accepts none.
    """
    values, targets = np.asarray(scores, np.float64).ravel(), np.asarray(same, bool).ravel()
    if len(values) != len(targets) or targets.all() or not targets.any() or not np.isfinite(values).all():
        raise DataError(
            "nothing can be said about these scores",
            where="scores",
            expected="one finite score for each pair, and pairs of both kinds",
            found=f"{len(values)} scores, {int(targets.sum())} of {len(targets)} pairs of one speaker",
        )
    order = np.argsort(values, kind="stable")
    values, targets = values[order], targets[order]
    first = np.flatnonzero(np.diff(values, prepend=-np.inf))  # equal scores fall together
    below = np.concatenate(([0], np.cumsum(targets)))[[*first, len(values)]]
    below_others = np.concatenate(([0], np.cumsum(~targets)))[[*first, len(values)]]
    misses = below / targets.sum()
    falses = 1.0 - below_others / (~targets).sum()
    return misses, falses, np.append(values[first], np.inf)


@dataclass(frozen=True)
class DetectionScore:
    """Frames of speech that were found, missed and imagined (final). Scores of several recordings add up by ``+``.

    Example:
        >>> score = DetectionScore.of_frames([1, 1, 1, 0, 0, -100], [1, 1, 0, 0, 1, 1])
        >>> round(score.f1, 3), round(score.error_rate, 3)
        (0.667, 0.667)
    """

    found: int = 0
    missed: int = 0
    false: int = 0
    frames: int = 0

    @classmethod
    def of_frames(cls, labels: ArrayLike, predictions: ArrayLike) -> DetectionScore:
        """Count frames; a label of -100 does not count."""
        right, given = np.asarray(labels).ravel(), np.asarray(predictions).astype(bool).ravel()
        kept = right >= 0
        speech, given = right[kept].astype(bool), given[kept]
        found, missed, false = (int(x.sum()) for x in (speech & given, speech & ~given, ~speech & given))
        return cls(found, missed, false, len(speech))

    @classmethod
    def of_segments(
        cls,
        reference: Sequence[tuple[float, float]],
        hypothesis: Sequence[tuple[float, float]],
        *,
        seconds: float,
        hop: float = 0.01,
    ) -> DetectionScore:
        """Count frames of segments in seconds."""
        return cls.of_frames(*(frames_of(spans, seconds=seconds, hop=hop) for spans in (reference, hypothesis)))

    @property
    def precision(self) -> float:
        """Share of what was found that is speech."""
        return self.found / max(1, self.found + self.false)

    @property
    def recall(self) -> float:
        """Share of the speech that was found."""
        return self.found / max(1, self.found + self.missed)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.found / max(1, 2 * self.found + self.missed + self.false)

    @property
    def error_rate(self) -> float:
        """Missed and imagined speech by speech (detection error rate)."""
        return (self.missed + self.false) / max(1, self.found + self.missed)

    def __add__(self, other: DetectionScore) -> DetectionScore:
        return DetectionScore(
            self.found + other.found,
            self.missed + other.missed,
            self.false + other.false,
            self.frames + other.frames,
        )

    def __str__(self) -> str:
        return (
            f"F1 {100 * self.f1:.2f}%  precision {100 * self.precision:.2f}%  recall {100 * self.recall:.2f}%  "
            f"detection error {100 * self.error_rate:.2f}%  over {self.frames:,} frames"
        )


def frames_of(spans: Sequence[tuple[float, float]], *, seconds: float, hop: float = 0.01) -> NDArray[np.bool_]:
    """Segments as one boolean for each hop; a frame is speech where its start lies in a segment.

    Example:
        >>> frames_of([(0.1, 0.3)], seconds=0.5, hop=0.1).astype(int).tolist()
        [0, 1, 1, 0, 0]
    """
    frames = np.zeros(int(seconds / hop + 1e-6), bool)
    for start, end in spans:
        frames[max(0, int(np.ceil(start / hop - 1e-6))) : max(0, int(np.ceil(end / hop - 1e-6)))] = True
    return frames


def segments_of(frames: ArrayLike, *, hop: float = 0.01) -> list[tuple[float, float]]:
    """Runs of true frames as segments in seconds.

    Example:
        >>> segments_of([0, 1, 1, 0, 1], hop=0.5)
        [(0.5, 1.5), (2.0, 2.5)]
    """
    speech = np.asarray(frames, bool).ravel().astype(int)
    edges = np.flatnonzero(np.diff(speech, prepend=0, append=0))
    return [(float(a * hop), float(b * hop)) for a, b in edges.reshape(-1, 2)]
