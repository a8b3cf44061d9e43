"""Texts and words as the ids a model reads, the same in training and in use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from nemolet.errors import DataError
from nemolet.tokenizers import Tokenizer

TooLong = Literal["error", "truncate", "skip"]
Empty = Literal["error", "skip"]
_WORD = re.compile(r"\w+|[^\w\s]")


class Words(NamedTuple):
    """Ids of a text that was read word by word."""

    ids: list[int]
    firsts: list[int]  # where the first id of each word stands

    def word_of(self, place: int) -> int:
        """The word that an id belongs to; -1 before the first.

        Example:
            >>> Words([5, 6, 7], [0, 2]).word_of(1)
            0
        """
        return sum(first <= place for first in self.firsts) - 1


class Span(NamedTuple):
    """A word and where it stands in its text."""

    text: str
    start: int
    end: int


def split_words(text: str) -> list[Span]:
    """Words and single marks of a text, with the characters they take.

    Example:
        >>> split_words("Is it? ")
        [Span(text='Is', start=0, end=2), Span(text='it', start=3, end=5), Span(text='?', start=5, end=6)]
    """
    return [Span(match[0], match.start(), match.end()) for match in _WORD.finditer(text)]


@dataclass(frozen=True)
class TextEncoding:
    """How a text becomes ids: with the marks that the tokenizer has, and no longer than the model can read (final).

    Args:
        tokenizer: makes the ids; a beginning and an end are marked as it says.
        context: most ids of a text.
        too_long: stop, cut the end off, or leave the text out.
        empty: stop, or leave the text out.
        changed: is told what was left out or cut, and why, by the place of each text.

    Example:
        >>> from nemolet.tokenizers import ByteTokenizer
        >>> TextEncoding(ByteTokenizer(), context=4, too_long="truncate").text("hello", "line 1")
        [104, 101, 108, 256]
    """

    tokenizer: Tokenizer
    context: int = 512
    too_long: TooLong = "error"
    empty: Empty = "error"
    changed: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def text(self, text: str, where: str) -> list[int] | None:
        """Ids of a text, or None where it is left out.

        Raises:
            DataError: for an empty or a long text, unless the policies say otherwise.
        """
        if self.leaves_out(text, where):
            return None
        begin, end = self.tokenizer.marks
        ids = self.tokenizer.encode(text)
        if not self.fits(len(begin) + len(ids) + len(end), where):
            return None
        return begin + ids[: self.context - len(begin) - len(end)] + end

    def words(self, words: Sequence[str], where: str, *, spaced: Sequence[bool] | None = None) -> Words | None:
        """Ids of words, and where each word begins; words beyond the context are cut off where texts are.

        Args:
            words: one after the other.
            where: for errors.
            spaced: whether a space stands before each word; None for all but the first.
        """
        if self.leaves_out(" ".join(words), where):
            return None
        begin, end = self.tokenizer.marks
        ids, firsts = list(begin), []
        for index, word in enumerate(words):
            before = index > 0 if spaced is None else spaced[index]
            piece = self.tokenizer.encode(f" {word}" if before else word)
            if len(ids) + len(piece) + len(end) > self.context:
                if not self.fits(self.context + 1, where):
                    return None
                break
            firsts.append(len(ids))
            ids += piece
        return Words(ids + end, firsts)

    def leaves_out(self, text: str, where: str) -> bool:
        """Whether a text is left out because it is empty."""
        if text.strip():
            return False
        if self.empty == "skip":
            self.changed[where] = "left out (empty)"
            return True
        raise DataError(
            "the text is empty",
            where=where,
            expected="words",
            found=repr(text),
            fix="remove it, or set data.empty=skip",
        )

    def fits(self, length: int, where: str) -> bool:
        """Whether a text is read, if only its beginning."""
        if length <= self.context:
            return True
        if self.too_long == "truncate":
            self.changed.setdefault(where, f"cut after {self.context} tokens")
            return True
        if self.too_long == "skip":
            self.changed[where] = f"left out (longer than {self.context} tokens)"
            return False
        raise DataError(
            "the text is longer than the context",
            where=where,
            expected=f"at most {self.context} tokens",
            found=f"{length} or more",
            fix="set data.too_long=truncate or skip, or a larger data.context",
        )
