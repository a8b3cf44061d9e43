"""The letters that a recognizer came with."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from nemolet.errors import TokenizerError
from nemolet.tokenizers.base import TableTokenizer


class LetterTokenizer(TableTokenizer):
    """One id for each letter of a fixed vocabulary, in which one of them stands for the space (final).

    Args:
        letters: what each id stands for; no text is spelled with those of several characters.
        space: the letter that stands for a space.
        special: letters that are not shown, such as ``<s>``.
        small: the vocabulary has capitals, but texts are shown in small letters.

    Example:
        >>> tokenizer = LetterTokenizer(["<s>", "|", "A", "B"], special=["<s>"])
        >>> tokenizer.encode("A B"), tokenizer.decode([0, 3, 1, 2])
        ([2, 1, 3], 'B A')
    """

    kind: ClassVar[str] = "letters"
    lossless = False

    def __init__(
        self, letters: Sequence[str], *, space: str = "|", special: Collection[str] = (), small: bool = False
    ) -> None:
        self.letters, self.space, self.special, self.small = list(letters), space, sorted(special), small
        self.ids = {letter: index for index, letter in enumerate(letters)}
        if not letters or len(self.ids) < len(letters) or not all(letters) or not self.ids.keys() >= set(special):
            raise TokenizerError(
                "the letters are no alphabet",
                where="LetterTokenizer.letters",
                expected="letters, each once, special ones among them",
                found=repr(list(letters))[:60],
            )
        self.vocab_size, self.special_tokens = len(letters), {letter: self.ids[letter] for letter in self.special}
        shown = ["" if letter == space else letter.lower() if small else letter for letter in letters]
        self.table = [(text or " ").encode() for text in shown]

    def files(self) -> dict[str, bytes]:
        return {"letters.json": json.dumps(self.letters).encode()}

    def settings(self) -> dict[str, Any]:
        return {"space": self.space, "special": self.special, "small": self.small}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], **settings: Any) -> LetterTokenizer:
        return cls(json.loads(files["letters.json"]), **settings)

    def _encode(self, text: str) -> list[int]:
        written = [self._spelled(character) for character in text]
        missing = next((place for place, letters in enumerate(written) if not self.ids.keys() >= set(letters)), None)
        if missing is not None:
            raise TokenizerError(
                "this letter is not in the model's vocabulary",
                where=f"character {missing}",
                expected=" ".join(letter for letter in self.letters if letter not in self.special_tokens),
                found=repr(text[missing]),
                fix="spell texts as the vocabulary does (mind capitals), or choose task=recognize and tokenizer=char",
            )
        return [self.ids[letter] for letters in written for letter in letters]

    def _spelled(self, character: str) -> str:
        """The letters of one character of a text: several where its capital is, such as that of ß."""
        return self.space if character == " " else character.upper() if self.small else character
