"""Scores of texts against references: BLEU, chrF, exact match and F1 of words."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nemolet.errors import DataError

_MARKS = (  # the tokenisation "13a" of the machine translation workshops, in which BLEU is reported
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


class Bleu(NamedTuple):
    """BLEU and what it is made of."""

    score: float
    precisions: tuple[float, ...]
    brevity: float  # the penalty for being shorter than the references


def bleu(hypotheses: Sequence[str], references: Sequence[str], *, order: int = 4) -> Bleu:
    """Corpus BLEU with one reference per text, as sacrebleu reports it (Papineni et al., 2002; Post, 2018).

    Words are split as ``13a`` does it; where no n-gram of an order matches, its count is halved again and again.

    Example:
        >>> bleu(["the cat sat on the mat"], ["the cat sat on the mat"]).score
        100.0
    """
    _check(hypotheses, references)
    matches, totals = [0] * order, [0] * order
    ours = theirs = 0
    for hypothesis, reference in zip(hypotheses, references):
        said, real = split_13a(hypothesis), split_13a(reference)
        ours, theirs = ours + len(said), theirs + len(real)
        for n in range(1, order + 1):
            counts, known = Counter(_ngrams(said, n)), Counter(_ngrams(real, n))
            matches[n - 1] += sum((counts & known).values())
            totals[n - 1] += sum(counts.values())
    brevity = 1.0 if ours >= theirs else math.exp(1 - theirs / ours) if ours else 0.0
    precisions: list[float] = []
    smoothing = 1.0
    for match, total in zip(matches, totals):
        smoothing = smoothing * 2 if total and not match else smoothing
        precisions.append(0.0 if not total else 100 * match / total if match else 100 / (smoothing * total))
    if not matches[0] or min(precisions) == 0:
        return Bleu(0.0, tuple(precisions), brevity)
    score = brevity * math.exp(sum(map(math.log, precisions)) / order)
    return Bleu(round(score, 10), tuple(precisions), brevity)


def chrf(hypotheses: Sequence[str], references: Sequence[str], *, order: int = 6, beta: float = 2.0) -> float:
    """Corpus chrF2: F-score of character n-grams, spaces aside (Popovic, 2015).

    Example:
        >>> chrf(["abcdef"], ["abcdef"])
        100.0
    """
    _check(hypotheses, references)
    matches, ours, theirs = [0] * order, [0] * order, [0] * order
    for hypothesis, reference in zip(hypotheses, references):
        said, real = "".join(hypothesis.split()), "".join(reference.split())
        for n in range(1, order + 1):
            counts, known = Counter(_ngrams(said, n)), Counter(_ngrams(real, n))
            matches[n - 1] += sum((counts & known).values())
            ours[n - 1] += sum(counts.values())
            theirs[n - 1] += sum(known.values())
    pairs = [(m / o, m / t) for m, o, t in zip(matches, ours, theirs) if o and t]
    if not pairs:
        return 0.0
    precision, recall = (sum(side) / len(pairs) for side in zip(*pairs))
    weighted = beta**2 * precision + recall
    return 100 * (1 + beta**2) * precision * recall / weighted if weighted else 0.0


def split_13a(text: str) -> list[str]:
    """Words and marks as BLEU counts them.

    Example:
        >>> split_13a("Well, 3.5 isn't 4.")
        ['Well', ',', '3.5', "isn't", '4', '.']
    """
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in _MARKS:
        text = pattern.sub(replacement, text)
    return text.split()


def normalised(text: str) -> str:
    """A short answer without case, marks and articles, as SQuAD compares it.

    Example:
        >>> normalised("The  Saxon Garden!")
        'saxon garden'
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where an answer equals one of several references, else 0.

    Example:
        >>> exact_match("the garden", ["Garden."])
        1.0
    """
    return float(any(normalised(answer) == normalised(reference) for reference in references))


def word_f1(answer: str, references: Sequence[str]) -> float:
    """The best F1 of words against several references.

    Example:
        >>> word_f1("saxon garden", ["the garden", "a park"])
        0.6666666666666666
    """
    return max((_word_f1(normalised(answer).split(), normalised(r).split()) for r in references), default=0.0)


def _word_f1(said: Sequence[str], real: Sequence[str]) -> float:
    if not said or not real:
        return float(list(said) == list(real))
    shared = sum((Counter(said) & Counter(real)).values())
    return 2 * shared / (len(said) + len(real))


def _ngrams(items: Sequence[str], n: int) -> Iterator[object]:
    if isinstance(items, str):
        return (items[i : i + n] for i in range(len(items) - n + 1))
    return (tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references) or not references:
        raise DataError(
            "each text needs one reference",
            where="scores",
            expected="as many references as texts, at least one",
            found=f"{len(hypotheses)} texts, {len(references)} references",
        )
