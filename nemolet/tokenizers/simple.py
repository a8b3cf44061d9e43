"""Tokenizers that need no training to speak of: bytes and characters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from nemolet.errors import TokenizerError
from nemolet.tokenizers.base import TableTokenizer

EOS = "<|endoftext|>"


class ByteTokenizer(TableTokenizer):
    """The 256 bytes of UTF-8, and an end-of-text token (final).

    Example:
        >>> ByteTokenizer().encode("né")
        [110, 195, 169]
    """

    kind: ClassVar[str] = "byte"

    def __init__(self) -> None:
        self.table = [bytes([value]) for value in range(256)] + [EOS.encode()]
        self.vocab_size, self.eos_id = 257, 256
        self.special_tokens = {EOS: 256}

    def files(self) -> dict[str, bytes]:
        return {}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], **settings: Any) -> ByteTokenizer:
        return cls()

    def _encode(self, text: str) -> list[int]:
        return list(text.encode())


class CharTokenizer(TableTokenizer):
    """One id for each character that was seen (final).

    Args:
        characters: the characters, in the order of their ids.
        byte_fallback: write any other character as UTF-8 bytes, with 256 more ids; otherwise it is an error.

    Example:
        >>> tokenizer = CharTokenizer.train(["banana"])
        >>> tokenizer.encode("nab"), tokenizer.vocab_size
        ([2, 0, 1], 3)
    """

    kind: ClassVar[str] = "char"

    def __init__(self, characters: Sequence[str], *, byte_fallback: bool = False) -> None:
        if not characters or any(len(c) != 1 for c in characters) or len(set(characters)) < len(characters):
            raise TokenizerError(
                "the characters are no alphabet",
                where="CharTokenizer.characters",
                expected="single characters, each once",
                found=repr(list(characters))[:60],
            )
        self.characters, self.byte_fallback = list(characters), byte_fallback
        self.table = [c.encode() for c in characters]
        self.ids = {c: index for index, c in enumerate(characters)}
        if byte_fallback:
            self.table += [bytes([value]) for value in range(256)]
        self.vocab_size, self.special_tokens = len(self.table), {}

    @classmethod
    def train(cls, texts: Iterable[str], *, byte_fallback: bool = False) -> CharTokenizer:
        """Collect the characters of texts."""
        seen: set[str] = set()
        for text in texts:
            seen.update(text)
        if not seen:
            raise TokenizerError(
                "there is no text to learn characters from", where="CharTokenizer.train", found="nothing"
            )
        return cls(sorted(seen), byte_fallback=byte_fallback)

    def files(self) -> dict[str, bytes]:
        return {"characters.json": json.dumps(self.characters).encode()}

    def settings(self) -> dict[str, Any]:
        return {"byte_fallback": self.byte_fallback}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], **settings: Any) -> CharTokenizer:
        return cls(json.loads(files["characters.json"]), **settings)

    def _encode(self, text: str) -> list[int]:
        ids = self.ids
        try:
            return [ids[c] for c in text]
        except KeyError as error:
            if not self.byte_fallback:
                missing = str(error.args[0])
                raise TokenizerError(
                    "this character was not in the training text",
                    where=f"character {text.index(missing)}",
                    expected=f"one of {len(ids)} characters",
                    found=repr(missing),
                    fix="train the tokenizer with byte_fallback=true, or choose tokenizer=byte",
                ) from None
        known, first = self.ids.get, len(self.characters)
        tokens: list[int] = []
        for c in text:
            index = known(c)
            tokens.extend([first + value for value in c.encode()] if index is None else [index])
        return tokens
