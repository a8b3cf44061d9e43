"""Where a classifier is wrong: a table by class, a picture of what is confused, and whether it knows how sure to be."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nemolet.errors import DataError
from nemolet.language.classification import TextClassifier
from nemolet.language.saliency import explain
from nemolet.tokenizers import Tokenizer


@dataclass(frozen=True)
class ClassScore:
    """How one class fares."""

    label: str
    count: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Confusion:
    """How often each class was taken for each other (final).

    Args:
        labels: the classes.
        counts: for each pair of real and predicted class.

    Example:
        >>> confusion = Confusion.of(["a", "b", "a"], ["a", "a", "a"])
        >>> confusion.worst(1)
        [('b', 'a', 1)]
    """

    labels: tuple[str, ...]
    counts: Counter[tuple[str, str]]

    @classmethod
    def of(cls, real: Sequence[str], predicted: Sequence[str]) -> Confusion:
        """Count pairs.

        Raises:
            DataError: for lists of different lengths.
        """
        if len(real) != len(predicted) or not real:
            raise DataError("each text needs a real and a predicted class", found=f"{len(real)} and {len(predicted)}")
        return cls(tuple(sorted({*real, *predicted})), Counter(zip(real, predicted)))

    def scores(self) -> list[ClassScore]:
        """Precision, recall and F1 of each class, the worst first."""
        made = []
        for label in self.labels:
            right = self.counts[label, label]
            there = sum(n for (real, _), n in self.counts.items() if real == label)
            said = sum(n for (_, predicted), n in self.counts.items() if predicted == label)
            precision, recall = right / said if said else 0.0, right / there if there else 0.0
            made.append(ClassScore(label, there, precision, recall, 2 * right / (said + there)))
        return sorted(made, key=lambda score: score.f1)

    def worst(self, most: int = 10) -> list[tuple[str, str, int]]:
        """The pairs that are confused most often."""
        wrong = Counter({pair: n for pair, n in self.counts.items() if pair[0] != pair[1]})
        return [(real, predicted, n) for (real, predicted), n in wrong.most_common(most)]

    def table(self, most: int = 20) -> str:
        """The worst classes as text."""
        width = max(map(len, self.labels))
        rows = [f"{'class':<{width}}  count  precision  recall     f1"]
        for s in self.scores()[:most]:
            rows.append(f"{s.label:<{width}}  {s.count:>5}  {s.precision:>9.3f}  {s.recall:>6.3f}  {s.f1:>5.3f}")
        return "\n".join(rows)

    def svg(self, *, cell: int = 14) -> str:
        """A picture: a row for each real class, a column for each predicted one, darker where it is more."""
        left, size = 8 * max(map(len, self.labels)), cell * len(self.labels)
        largest = {r: max(1, sum(self.counts[r, p] for p in self.labels)) for r in self.labels}
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + size + 4}" height="{size + 4}" '
            f'font-family="sans-serif" font-size="{cell * 0.7:.0f}">'
        ]
        for y, real in enumerate(self.labels):
            parts.append(
                f'<text x="{left - 4}" y="{y * cell + cell * 0.8:.1f}" text-anchor="end">{html.escape(real)}</text>'
            )
            for x, predicted in enumerate(self.labels):
                count = self.counts[real, predicted]
                if count:
                    colour = "#2ea043" if real == predicted else "#da3633"
                    parts.append(
                        f'<rect x="{left + x * cell}" y="{y * cell}" width="{cell}" height="{cell}" fill="{colour}" '
                        f'fill-opacity="{0.15 + 0.85 * count / largest[real]:.2f}"><title>'
                        f"{html.escape(real)} taken for {html.escape(predicted)}: {count}</title></rect>"
                    )
        return "\n".join([*parts, "</svg>\n"])


@dataclass(frozen=True)
class CalibrationBin:
    """Answers about as sure as each other: how sure, how often right, and how many."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """Whether a model is right as often as it says (final)."""

    bins: tuple[CalibrationBin, ...]

    @classmethod
    def of(cls, confidences: Sequence[float], right: Sequence[bool], *, bins: int = 10) -> Calibration:
        """Group answers by confidence, in steps of equal width.

        Example:
            >>> Calibration.of([0.95, 0.95, 0.55], [True, False, True], bins=10).error
            0.45
        """
        groups: dict[int, list[tuple[float, bool]]] = {}
        for confidence, hit in zip(confidences, right, strict=True):
            groups.setdefault(min(bins - 1, int(confidence * bins)), []).append((confidence, hit))
        made = []
        for _, group in sorted(groups.items()):
            count = len(group)
            made.append(CalibrationBin(sum(c for c, _ in group) / count, sum(h for _, h in group) / count, count))
        return cls(tuple(made))

    @property
    def error(self) -> float:
        """Expected calibration error: how far confidence is from accuracy, on average (Naeini et al., 2015)."""
        total = sum(b.count for b in self.bins)
        return round(sum(b.count * abs(b.confidence - b.accuracy) for b in self.bins) / total, 12)

    def svg(self, *, size: int = 240) -> str:
        """A picture: accuracy over confidence; a model that knows itself lies on the diagonal."""
        most = max(b.count for b in self.bins)
        points = "".join(
            f'<circle cx="{b.confidence * size:.1f}" cy="{(1 - b.accuracy) * size:.1f}" '
            f'r="{3 + 5 * (b.count / most) ** 0.5:.1f}" fill="#1f6feb"><title>{b.count} answers</title></circle>'
            for b in self.bins
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 -8 {size + 16} {size + 16}" width="{size + 16}">'
            f'<rect width="{size}" height="{size}" fill="none" stroke="#999"/>'
            f'<line x1="0" y1="{size}" x2="{size}" y2="0" stroke="#999" stroke-dasharray="4"/>{points}</svg>\n'
        )


def report(
    model: TextClassifier,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    real: Sequence[str],
    *,
    most: int = 10,
    note: str = "",
) -> str:
    """An HTML page: how each class fares, what is taken for what, whether the model knows how sure to be, and what its
    surest mistakes depended on.

    Args:
        model: a classifier with one label for a text.
        tokenizer: the one it was trained with.
        texts: to be classified.
        real: their labels.
        most: how many mistakes are explained.
        note: what is to be said of the texts, such as how many are not among them.

    Raises:
        DataError: for lists of different lengths.
    """
    found = model.classify(tokenizer, texts)
    confusion = Confusion.of(real, [each.label for each in found])
    sure = [each.scores[each.label] for each in found]
    right = [each.label == label for each, label in zip(found, real)]
    calibration = Calibration.of(sure, right)
    wrong = sorted((i for i, hit in enumerate(right) if not hit), key=lambda i: -sure[i])[:most]
    explained = "\n".join(
        f"<p>{html.escape(real[i])} taken for</p>{explain(model, tokenizer, texts[i], label=found[i].label).html()}"
        for i in wrong
    )
    return f"""<!doctype html><html><head><meta charset="utf-8"><title>mistakes</title></head>
<body style="font-family:sans-serif;max-width:60em;margin:2em auto">
<p>{sum(right):,} of {len(right):,} right{html.escape(f"; {note}" if note else "")}</p>
<h3>Classes, the worst first</h3><pre>{html.escape(confusion.table(len(confusion.labels)))}</pre>
<h3>A row for each real class, a column for each predicted one</h3>{confusion.svg()}
<h3>Accuracy over confidence; expected calibration error {calibration.error:.3f}</h3>{calibration.svg()}
<h3>The surest mistakes, and what they depended on</h3>{explained or "<p>none</p>"}
</body></html>
"""
