"""Word and character error rates, with the alignment they count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from nemolet.errors import DataError

Kind = Literal["hit", "substitution", "deletion", "insertion"]


class Edit(NamedTuple):
    """One step of an alignment; the word that is not there is None."""

    kind: Kind
    reference: str | None
    hypothesis: str | None


@dataclass(frozen=True)
class ErrorRate:
    """Edits that turn references into hypotheses, counted (final). Rates of several add up by ``+``.

    Example:
        >>> rate = word_errors("the cat sat", "the cat sat down") + word_errors("a dog", "a frog")
        >>> rate.errors, rate.total, rate.rate
        (2, 5, 0.4)
        >>> print(rate)
        40.00% (1 substituted, 0 deleted, 1 inserted of 5)
    """

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    total: int = 0

    @property
    def errors(self) -> int:
        """All edits."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Edits per word of the reference; without any word, infinite for any edit."""
        if self.total:
            return self.errors / self.total
        return float("inf") if self.errors else 0.0

    def __add__(self, other: ErrorRate) -> ErrorRate:
        return ErrorRate(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.total + other.total,
        )

    def __str__(self) -> str:
        return (
            f"{100 * self.rate:.2f}% ({self.substitutions:,} substituted, {self.deletions:,} deleted, "
            f"{self.insertions:,} inserted of {self.total:,})"
        )


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Edit]:
    """The fewest edits that turn one sequence into the other (Levenshtein).

    Among equally short ways, words stand beside words rather than beside gaps.

    Example:
        >>> [edit.kind for edit in align("abc", "axce")]
        ['hit', 'substitution', 'hit', 'insertion']
    """
    table = _distances(reference, hypothesis)
    edits: list[Edit] = []
    i, j = len(reference), len(hypothesis)
    while i or j:
        if i and j:
            same = reference[i - 1] == hypothesis[j - 1]
            if table[i, j] == table[i - 1, j - 1] + (not same):
                edits.append(Edit("hit" if same else "substitution", reference[i - 1], hypothesis[j - 1]))
                i, j = i - 1, j - 1
                continue
        if i and table[i, j] == table[i - 1, j] + 1:
            i -= 1
            edits.append(Edit("deletion", reference[i], None))
        else:
            j -= 1
            edits.append(Edit("insertion", None, hypothesis[j]))
    return edits[::-1]


def _distances(reference: Sequence[str], hypothesis: Sequence[str]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Edits between every beginning of the one and every beginning of the other."""
    ids = {word: index for index, word in enumerate(dict.fromkeys((*reference, *hypothesis)))}
    given = np.array([ids[word] for word in hypothesis], np.int64)
    steps = np.arange(len(hypothesis) + 1)
    table = np.empty((len(reference) + 1, len(steps)), np.int64)
    table[0] = steps
    for i, word in enumerate(reference, 1):
        best = table[i - 1] + 1  # deleted
        best[1:] = np.minimum(best[1:], table[i - 1, :-1] + (given != ids[word]))
        # Inserted words cost one each, so the cheapest start of a run of them is a running minimum.
        table[i] = np.minimum.accumulate(best - steps) + steps
    return table


def word_errors(reference: str, hypothesis: str) -> ErrorRate:
    """Errors in words, which are what white space separates."""
    return _counted(reference.split(), hypothesis.split())


def character_errors(reference: str, hypothesis: str) -> ErrorRate:
    """Errors in characters, spaces included.

    Example:
        >>> character_errors("seven", "eleven").errors
        2
    """
    return _counted(reference, hypothesis)


def _counted(reference: Sequence[str], hypothesis: Sequence[str]) -> ErrorRate:
    kinds = [edit.kind for edit in align(reference, hypothesis)]
    return ErrorRate(
        kinds.count("substitution"), kinds.count("deletion"), kinds.count("insertion"), total=len(reference)
    )


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """Word errors of many utterances together."""
    _check(references, hypotheses)
    return sum(map(word_errors, references, hypotheses), ErrorRate())


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """Character errors of many utterances together."""
    _check(references, hypotheses)
    return sum(map(character_errors, references, hypotheses), ErrorRate())


def worst_utterances(
    references: Sequence[str], hypotheses: Sequence[str], *, names: Sequence[str] | None = None, count: int = 10
) -> str:
    """A table of the utterances with most word errors; what differs is in capitals, gaps are stars.

    Args:
        references: what was said.
        hypotheses: what was recognised.
        names: of the utterances; None for their numbers.
        count: rows of the table.

    Example:
        >>> print(worst_utterances(["one two", "three"], ["one two", "tree three"], names=["a", "b"], count=1))
        b  100.00%  1 of 1
           said  ****  three
           heard TREE  three
    """
    _check(references, hypotheses)
    rates = [word_errors(said, heard) for said, heard in zip(references, hypotheses)]
    order = sorted(range(len(rates)), key=lambda index: (-rates[index].rate, -rates[index].errors, index))
    lines = []
    for index in order[:count]:
        if not rates[index].errors:
            break
        name, rate = str(index) if names is None else names[index], rates[index]
        share = f"{100 * rate.rate:.2f}%" if rate.total else "all"
        lines.append(f"{name}  {share}  {rate.errors} of {rate.total}")
        cells = [_cell(edit) for edit in align(references[index].split(), hypotheses[index].split())]
        indent = " " * (len(name) + 2)
        for side, title in enumerate(("said ", "heard")):
            lines.append(f"{indent}{title} " + "  ".join(cell[side] for cell in cells).rstrip())
    return "\n".join(lines) if lines else "no utterance has a word error"


def _cell(edit: Edit) -> tuple[str, str]:
    """Both sides of an edit, equally wide."""
    said, heard = edit.reference or "", edit.hypothesis or ""
    width = max(len(said), len(heard))
    if edit.kind != "hit":
        said, heard = said.upper(), heard.upper()
    return (said or "*" * width).ljust(width), (heard or "*" * width).ljust(width)


def _check(references: Sequence[str], hypotheses: Sequence[str]) -> None:
    if len(references) != len(hypotheses):
        raise DataError(
            "there are not as many hypotheses as references",
            where="hypotheses",
            expected=len(references),
            found=len(hypotheses),
        )
