"""Tokenizers whose ids are whole words, or what words sound like."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from nemolet.errors import TokenizerError, nearest
from nemolet.tokenizers.base import StreamDecoder, Tokenizer, WindowStream

NOISE = "SPN"  # a spoken noise: what a word that nobody can pronounce is written as
_DICTIONARY = "dictionary.txt"


class WordTokenizer(Tokenizer):
    """One id for each word that was seen, for small vocabularies such as digits and commands (final).

    Words are what stands between white space; decoding puts one space between them.

    Args:
        words: the words, in the order of their ids.

    Example:
        >>> tokenizer = WordTokenizer.train(["two one", "one"])
        >>> tokenizer.encode("one two one"), tokenizer.decode([1, 0])
        ([0, 1, 0], 'two one')
    """

    kind: ClassVar[str] = "word"
    lossless = False

    def __init__(self, words: Sequence[str]) -> None:
        if not words or any(word.split() != [word] for word in words) or len(set(words)) < len(words):
            raise TokenizerError(
                "the words are no vocabulary",
                where="WordTokenizer.words",
                expected="words without spaces, each once",
                found=repr(list(words))[:60],
            )
        self.words, self.ids = list(words), {word: index for index, word in enumerate(words)}
        self.vocab_size, self.special_tokens = len(self.words), {}

    @classmethod
    def train(cls, texts: Iterable[str]) -> WordTokenizer:
        """Collect the words of texts."""
        seen = {word for text in texts for word in text.split()}
        if not seen:
            raise TokenizerError("there is no text to learn words from", where="WordTokenizer.train", found="nothing")
        return cls(sorted(seen))

    def stream(self) -> StreamDecoder:
        return WindowStream(self)

    def files(self) -> dict[str, bytes]:
        return {"words.json": json.dumps(self.words).encode()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], **settings: Any) -> WordTokenizer:
        return cls(json.loads(files["words.json"]), **settings)

    def _encode(self, text: str) -> list[int]:
        words = text.split()
        missing = next((word for word in words if word not in self.ids), None)
        if missing is not None:
            close = nearest(missing, self.ids)
            raise TokenizerError(
                "this word was not in the training text",
                where=f"word {words.index(missing)}",
                expected=f"one of {len(self.ids)} words",
                found=repr(missing),
                fix=(f"did you mean {close!r}? " if close else "") + "Choose tokenizer=char for texts of any words",
            )
        return [self.ids[word] for word in words]

    def _decode(self, tokens: list[int], special: bool) -> str:
        return " ".join(self.words[token] for token in tokens)


class PhoneTokenizer(Tokenizer):
    """The phones of words by a pronouncing dictionary, such as the CMU's (final).

    A word is looked up as it is, else in small letters; the first pronunciation counts. Decoding gives phones with
    spaces between them, so an error rate of words is then one of phones.

    Args:
        pronunciations: the phones of each word.
        stress: whether vowels keep the digit of their stress (``AH0``), as in the dictionary.
        unknown: what a word is that the dictionary lacks: an ``"error"``, or one phone ``SPN`` (``"noise"``).

    Example:
        >>> tokenizer = PhoneTokenizer({"one": ["W", "AH1", "N"], "two": ["T", "UW1"]})
        >>> tokenizer.encode("Two one"), tokenizer.decode(tokenizer.encode("one two"))
        ([2, 3, 4, 0, 1], 'W AH N T UW')
    """

    kind: ClassVar[str] = "phone"
    lossless = False

    def __init__(
        self,
        pronunciations: Mapping[str, Sequence[str]],
        *,
        stress: bool = False,
        unknown: Literal["error", "noise"] = "error",
    ) -> None:
        if not pronunciations or not all(pronunciations.values()):
            empty = next((word for word, phones in pronunciations.items() if not phones), None)
            raise TokenizerError(
                "the dictionary pronounces nothing",
                where="PhoneTokenizer.pronunciations",
                expected="words with at least one phone",
                found="no word" if empty is None else f"nothing for {empty!r}",
            )
        self.pronunciations, self.stress, self.unknown = dict(pronunciations), stress, unknown
        named = {self._plain(phone) for phones in pronunciations.values() for phone in phones}
        self.phones = sorted(named) + ([NOISE] if unknown == "noise" else [])
        self.ids = {phone: index for index, phone in enumerate(self.phones)}
        self.vocab_size, self.special_tokens = len(self.phones), {}

    @classmethod
    def read(
        cls, path: str | Path, *, stress: bool = False, unknown: Literal["error", "noise"] = "error"
    ) -> PhoneTokenizer:
        """Read a dictionary: a word and its phones in each line, packed by gzip or not.

        Further pronunciations (``read(2)``), comments after ``#`` and lines that begin with ``;;;`` are left out.

        Raises:
            TokenizerError: for a file that is missing or a line without phones, naming it.
        """
        path = Path(path)
        if not path.is_file():
            raise TokenizerError(
                "there is no pronouncing dictionary", where=str(path), fix="set tokenizer.path to a file as CMUdict's"
            )
        content = path.read_bytes()
        try:
            text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise TokenizerError("this is no pronouncing dictionary", where=str(path), found=str(error)) from error
        return cls(_pronunciations(text, str(path)), stress=stress, unknown=unknown)

    def stream(self) -> StreamDecoder:
        return WindowStream(self)

    def files(self) -> dict[str, bytes]:
        lines = (f"{word} {' '.join(phones)}\n" for word, phones in self.pronunciations.items())
        return {_DICTIONARY: "".join(lines).encode()}

    def settings(self) -> dict[str, Any]:
        return {"stress": self.stress, "unknown": self.unknown}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], **settings: Any) -> PhoneTokenizer:
        return cls(_pronunciations(files[_DICTIONARY].decode(), _DICTIONARY), **settings)

    def _plain(self, phone: str) -> str:
        return phone if self.stress else phone.rstrip("0123456789")

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, word in enumerate(text.split()):
            phones = self.pronunciations.get(word) or self.pronunciations.get(word.lower())
            if phones is not None:
                ids.extend(self.ids[self._plain(phone)] for phone in phones)
            elif self.unknown == "noise":
                ids.append(self.ids[NOISE])
            else:
                raise TokenizerError(
                    "nobody knows how this word sounds",
                    where=f"word {index}",
                    expected=f"one of the {len(self.pronunciations):,} words of the dictionary",
                    found=repr(word),
                    fix="add it to the dictionary, or set tokenizer.unknown=noise",
                )
        return ids

    def _decode(self, tokens: list[int], special: bool) -> str:
        return " ".join(self.phones[token] for token in tokens)


def _pronunciations(text: str, where: str) -> dict[str, list[str]]:
    """The first pronunciation of each word."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        word, *phones = re.split(r"\s#", line)[0].split() or [""]
        if not word or line.startswith(";;;"):
            continue
        if not phones:
            raise TokenizerError(
                "this word has no phones", where=f"{where}, line {number}", expected="a word and its phones", found=line
            )
        if not re.search(r"\(\d+\)$", word):
            found.setdefault(word, phones)
    return found
