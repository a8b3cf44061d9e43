"""Scores of texts against references: BLEU, chrF, exact match and F1 of words."""

from __future__ import annotations

import functools
import math
import operator
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nemolet.errors import DataError

Reference = str | Sequence[str]  # one text, or several that are as good

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


def bleu(hypotheses: Sequence[str], references: Sequence[Reference], *, order: int = 4) -> Bleu:
    """Corpus BLEU, as sacrebleu reports it (Papineni et al., 2002; Post, 2018).

    Words are split as ``13a`` does it; where no n-gram of an order matches, its count is halved again and again.

    Args:
        hypotheses: one text for each line.
        references: for each of them one text, or several, of which each n-gram may come from any.
        order: longest n-grams.

    Raises:
        DataError: where a hypothesis has no reference.

    Example:
        >>> bleu(["the cat sat on the mat"], [["the cat sat there", "the cat sat on the mat"]]).score
        100.0
    """
    matches, totals = [0] * order, [0] * order
    ours = theirs = 0
    for hypothesis, known in _pairs(hypotheses, references):
        said, real = split_13a(hypothesis), [split_13a(reference) for reference in known]
        ours += len(said)
        theirs += min((len(words) for words in real), key=lambda length: (abs(length - len(said)), length))
        for n in range(1, order + 1):
            counts = Counter(_ngrams(said, n))
            allowed = functools.reduce(operator.or_, (Counter(_ngrams(words, n)) for words in real))
            matches[n - 1] += (counts & allowed).total()
            totals[n - 1] += counts.total()
    brevity = 1.0 if ours >= theirs else math.exp(1 - theirs / ours) if ours else 0.0
    if not any(matches):
        return Bleu(0.0, (0.0,) * order, brevity)
    precisions: list[float] = []
    smoothing = 1.0
    for match, total in zip(matches, totals):
        smoothing = smoothing * 2 if total and not match else smoothing
        precisions.append(0.0 if not total else 100 * match / total if match else 100 / (smoothing * total))
    score = brevity * math.exp(sum(map(math.log, precisions)) / order) if min(precisions) else 0.0
    return Bleu(round(score, 10), tuple(precisions), brevity)


def chrf(
    hypotheses: Sequence[str],
    references: Sequence[Reference],
    *,
    order: int = 6,
    word_order: int = 0,
    beta: float = 2.0,
    whitespace: bool = False,
) -> float:
    """Corpus chrF, the F-score of character n-grams, as sacrebleu reports it (Popovic, 2015).

    Precision and recall are means over the orders that both sides have.

    Args:
        hypotheses: one text for each line.
        references: for each of them one text, or several, of which the one with the highest score counts.
        order: longest n-grams of characters.
        word_order: longest n-grams of words beside them; 2 for chrF++ (Popovic, 2017).
        beta: how many times as much recall counts.
        whitespace: whether spaces are characters.

    Raises:
        DataError: where a hypothesis has no reference.

    Example:
        >>> chrf(["abcdef"], [["abcdef", "x"]])
        100.0
    """
    totals = [NgramCounts(0, 0, 0)] * (order + word_order)
    for hypothesis, known in _pairs(hypotheses, references):
        said = _chrf_ngrams(hypothesis, order, word_order, whitespace)
        candidates = [
            [_counted(mine, theirs) for mine, theirs in zip(said, _chrf_ngrams(text, order, word_order, whitespace))]
            for text in known
        ]
        best = max(candidates, key=lambda counts: _f_score(counts, beta))  # of several alike the first
        totals = [NgramCounts(*map(sum, zip(total, count))) for total, count in zip(totals, best)]
    return 100 * _f_score(totals, beta)


class NgramCounts(NamedTuple):
    """N-grams of one order: how many match, and how many the two sides have."""

    matches: int
    ours: int
    theirs: int


def _chrf_ngrams(text: str, order: int, word_order: int, whitespace: bool) -> list[Counter[object]]:
    characters = text if whitespace else "".join(text.split())
    words = [part for word in text.split() for part in _without_mark(word)]
    return [Counter(_ngrams(characters, n)) for n in range(1, order + 1)] + [
        Counter(_ngrams(words, n)) for n in range(1, word_order + 1)
    ]


def _without_mark(word: str) -> tuple[str, ...]:
    """A word and the mark at its end, or else at its beginning."""
    if len(word) > 1 and word[-1] in string.punctuation:
        return word[:-1], word[-1]
    return (word[0], word[1:]) if len(word) > 1 and word[0] in string.punctuation else (word,)


def _counted(ours: Counter[object], theirs: Counter[object]) -> NgramCounts:
    """Of an order that a reference is too short for, nothing is counted."""
    return NgramCounts((ours & theirs).total(), ours.total() if theirs else 0, theirs.total())


def _f_score(counts: Sequence[NgramCounts], beta: float) -> float:
    shares = [(c.matches / c.ours, c.matches / c.theirs) for c in counts if c.ours and c.theirs]
    if not shares:
        return 0.0
    precision, recall = (sum(side) / len(shares) for side in zip(*shares))
    weighted = beta**2 * precision + recall
    return (1 + beta**2) * precision * recall / weighted if weighted else 0.0


def split_13a(text: str) -> list[str]:
    """Words and marks as BLEU counts them.

    Example:
        >>> split_13a("Well, 3.5 isn't 4.")
        ['Well', ',', '3.5', "isn't", '4', '.']
    """
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
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


def _pairs(hypotheses: Sequence[str], references: Sequence[Reference]) -> Iterator[tuple[str, Sequence[str]]]:
    """Each hypothesis with its references."""
    known = [[reference] if isinstance(reference, str) else list(reference) for reference in references]
    if len(hypotheses) != len(known) or not known or not all(known):
        lacking = [str(number) for number, texts in enumerate(known) if not texts]
        raise DataError(
            "each text needs at least one reference",
            where="scores",
            expected="as many references as texts, at least one",
            found=f"{len(hypotheses)} texts, {len(known)} references"
            + (f"; none at {', '.join(lacking[:5])}" if lacking else ""),
        )
    return zip(hypotheses, known)
