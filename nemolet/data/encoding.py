"""Texts and words as the ids a model reads, the same in training and in use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from nemolet.errors import ConfigError, DataError
from nemolet.tokenizers import Tokenizer

TooLong = Literal["error", "truncate", "skip"]  # examples
LongText = Literal["error", "truncate", "window"]  # texts that a model is used on
Empty = Literal["error", "skip"]
_WORD = re.compile(r"\w+|[^\w\s]")


class Words(NamedTuple):
    """Ids of a text that was read word by word."""

    ids: list[int]
    firsts: list[int]  # where the first id of each word stands
    numbers: list[int]  # which words these are: one without an id is not among them
    stop: int  # the first word that was not read any more

    def word_of(self, place: int) -> int:
        """The word that an id belongs to; -1 before the first.

        Example:
            >>> Words([5, 6, 7], [0, 2], [0, 1], 2).word_of(1)
            0
        """
        return sum(first <= place for first in self.firsts) - 1


class Span(NamedTuple):
    """A word and where it stands in its text."""

    text: str
    start: int
    end: int


def as_text(value: Any, where: str) -> str:
    """A value that has to be a text.

    Raises:
        DataError: where it is none.
    """
    if isinstance(value, str):
        return value
    raise DataError("this is no text", where=where, expected="a string", found=f"{type(value).__name__} {value!r:.60}")


def as_list(values: Any, where: str) -> Sequence[Any]:
    """A value that has to be a list; a text, whose items would be its letters, is none.

    Raises:
        DataError: where it is none.
    """
    if isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
        return values
    raise DataError("this is no list", where=where, expected="a list", found=f"{type(values).__name__} {values!r:.60}")


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
        too_long: stop, cut the end off, leave the text out, or read it in windows where a model can be used so.
        empty: stop, or leave the text out.
        changed: is told what was left out or cut, and why, by the place of each text.

    Example:
        >>> from nemolet.tokenizers import ByteTokenizer
        >>> TextEncoding(ByteTokenizer(), context=4, too_long="truncate").text("hello", "line 1")
        [104, 101, 108, 256]
    """

    tokenizer: Tokenizer
    context: int = 512
    too_long: TooLong | LongText = "error"
    empty: Empty = "error"
    changed: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.room < 1:
            raise ConfigError(
                "the context leaves no room for a text",
                where="context",
                expected=f"more than the {self.context - self.room} tokens that mark a beginning and an end",
                found=self.context,
            )

    @property
    def room(self) -> int:
        """Most ids beside the marks."""
        begin, end = self.tokenizer.marks
        return self.context - len(begin) - len(end)

    def text(self, text: str, where: str) -> list[int] | None:
        """Ids of a text, or None where it is left out.

        Raises:
            DataError: for an empty or a long text, unless the policies say otherwise.
        """
        ids = self._read(text, where)
        return None if ids is None else self._marked(ids[: self.room])

    def parts(self, text: str, where: str, *, overlap: bool = True) -> list[list[int]]:
        """Ids of a text in as many windows as its policy gives it: several only for ``window``, none if it is left out.

        Args:
            text: to be read.
            where: for errors.
            overlap: whether windows overlap by half, so that each word has neighbours in one of them.

        Raises:
            DataError: as :meth:`text`.
        """
        ids = self._read(text, where)
        if ids is None:
            return []
        starts: Iterable[int] = [0]
        if self.too_long == "window":
            last, step = max(0, len(ids) - self.room), max(1, self.room // 2)
            starts = [*range(0, last, step), last] if overlap else range(0, len(ids), self.room)
        return [self._marked(ids[start : start + self.room]) for start in starts]

    def words(
        self, words: Sequence[str], where: str, *, spaced: Sequence[bool] | None = None, start: int = 0
    ) -> Words | None:
        """Ids of words, and where each word begins; words beyond the context are cut off where texts are.

        A word without a token, such as a control character, is passed over; of one that is longer than the context its
        beginning is read.

        Args:
            words: one after the other.
            where: for errors.
            spaced: whether a space stands before each word; None for all but the first.
            start: the first word to read.

        Raises:
            DataError: as :meth:`text`.
        """
        begin, end = self.tokenizer.marks
        words = [as_text(word, where) for word in as_list(words, where)]
        read = Words(list(begin), [], [], len(words))
        for number in range(start, len(words)):
            before = number > start if spaced is None else spaced[number]
            piece = self.tokenizer.encode(f" {words[number]}" if before else words[number])
            piece = piece if words[number].strip() else []
            room = self.context - len(read.ids) - len(end)
            if len(piece) > room:
                if not self.fits(self.context + 1, where):
                    return None
                if read.firsts:
                    read = read._replace(stop=number)
                    break
                piece = piece[:room]
            if piece:
                read.firsts.append(len(read.ids))
                read.numbers.append(number)
                read.ids.extend(piece)
        if not read.firsts and start == 0 and self.leaves_out(" ".join(words), where, tokens=0):
            return None
        return read._replace(ids=read.ids + end)

    def word_parts(self, words: Sequence[str], where: str) -> list[Words]:
        """Words in as many windows as their policy gives them, which overlap by half.

        Raises:
            DataError: as :meth:`text`.
        """
        read, start = self.words(words, where), 0
        made = [] if read is None else [read]
        while read is not None and self.too_long == "window" and read.stop < len(words):
            start = max(start + 1, (start + read.stop) // 2)
            read = self.words(words, where, start=start)
            made += [read] if read is not None and read.firsts else []
        return made

    def _read(self, text: str, where: str) -> list[int] | None:
        """Ids of a text without marks, or None where it is left out."""
        ids = self.tokenizer.encode(text) if as_text(text, where).strip() else []
        if not ids and self.leaves_out(text, where, tokens=0):
            return None
        return ids if self.fits(self.context - self.room + len(ids), where) else None

    def _marked(self, ids: list[int]) -> list[int]:
        begin, end = self.tokenizer.marks
        return [*begin, *ids, *end]

    def leaves_out(self, text: str, where: str, *, tokens: int = 1) -> bool:
        """Whether a text is left out because it is empty, or has no tokens."""
        if text.strip() and tokens:
            return False
        if self.empty == "skip":
            self.changed[where] = "left out (empty)"
            return True
        raise DataError(
            "the text is empty",
            where=where,
            expected="words that the tokenizer has tokens for",
            found=f"{text[:60]!a}",
            fix="remove it, or set data.empty=skip",
        )

    def fits(self, length: int, where: str) -> bool:
        """Whether a text is read, if only its beginning."""
        if length <= self.context or self.too_long == "window":
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
            fix="set too_long: truncate reads its beginning, skip leaves an example out (data), window reads all of it "
            "in parts (a model in use); or a larger context",
        )
