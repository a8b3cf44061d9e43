"""Phrases that a text has to contain, and phrases that it may not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from nemolet.errors import GenerationError

Phrase = tuple[int, ...]


@dataclass(frozen=True)
class Constraints:
    """Phrases of tokens that beam search has to write, and phrases that it never writes.

    Args:
        forced: each of them is somewhere in the text; they may overlap.
        forbidden: none of them is anywhere in the text.

    Raises:
        GenerationError: for an empty phrase, or a forced one that holds a forbidden one.

    Example:
        >>> constraints = Constraints(forced=((3, 4), (5,)), forbidden=((4, 5),))
        >>> constraints.met([7, 5, 3]), constraints.complete([3, 4, 1, 5])
        (2, True)
        >>> sorted(constraints.advancing([7, 5, 3])), constraints.ruled_out([3, 4])
        ([3, 4], {5})
    """

    forced: tuple[Phrase, ...] = ()
    forbidden: tuple[Phrase, ...] = ()

    def __post_init__(self) -> None:
        if not all((*self.forced, *self.forbidden)):
            raise GenerationError("a phrase is empty", where="constraints", expected="at least one token in each")
        for phrase in self.forced:
            inside = [bad for bad in self.forbidden if _contains(phrase, bad)]
            if inside:
                raise GenerationError(
                    "a forced phrase holds a forbidden one",
                    where="constraints",
                    found=f"{list(phrase)} with {list(inside[0])}",
                )

    def __bool__(self) -> bool:
        return bool(self.forced or self.forbidden)

    def complete(self, written: Sequence[int]) -> bool:
        """Whether all forced phrases are there."""
        return not self._open(written)

    def met(self, written: Sequence[int]) -> int:
        """How many tokens of forced phrases are there: whole phrases, and the beginning of one more at the end."""
        still = self._open(written)
        whole = sum(len(phrase) for phrase in self.forced if phrase not in still)
        return whole + max((_begun(written, phrase) for phrase in still), default=0)

    def advancing(self, written: Sequence[int]) -> set[int]:
        """Tokens that begin a forced phrase which is not there yet, or go on with it."""
        still = self._open(written)
        return {phrase[0] for phrase in still} | {phrase[_begun(written, phrase)] for phrase in still}

    def ruled_out(self, written: Sequence[int]) -> set[int]:
        """Tokens that would end a forbidden phrase."""
        return {bad[-1] for bad in self.forbidden if tuple(written[len(written) - len(bad) + 1 :]) == bad[:-1]}

    def shared_out(self, candidates: Sequence[tuple[float, int, Sequence[int]]]) -> list[tuple[float, int]]:
        """An order in which texts that have met more, and texts that are more probable, take turns.

        A beam that is filled in this order always keeps the best text that is furthest, so that phrases come to be
        written, and the best texts that have met less, so that each phrase finds its place (Post and Vilar, 2018).

        Args:
            candidates: score, number, and text of each.

        Returns:
            Score and number of each, in turns: the best of those that met most, the best of those that met one less...
        """
        banks: dict[int, list[tuple[float, int]]] = {}
        for score, number, text in sorted(candidates, key=lambda candidate: -candidate[0]):
            banks.setdefault(self.met(text), []).append((score, number))
        turns = zip_longest(*(banks[met] for met in sorted(banks, reverse=True)))
        return [candidate for candidate in chain.from_iterable(turns) if candidate is not None]

    def _open(self, written: Sequence[int]) -> list[Phrase]:
        return [phrase for phrase in self.forced if not _contains(written, phrase)]


def _contains(text: Sequence[int], phrase: Phrase) -> bool:
    return any(tuple(text[at : at + len(phrase)]) == phrase for at in range(len(text) - len(phrase) + 1))


def _begun(written: Sequence[int], phrase: Phrase) -> int:
    """The longest beginning of a phrase with which a text ends; less than all of it."""
    longest = min(len(phrase) - 1, len(written))
    return next((n for n in range(longest, 0, -1) if tuple(written[-n:]) == phrase[:n]), 0)
