"""What every tokenizer does: text to ids, ids to text, whole or as a stream."""

from __future__ import annotations

import abc
import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from nemolet.errors import TokenizerError


class StreamDecoder(Protocol):
    """Turns ids into text one by one; never emits half a character."""

    def push(self, token: int) -> str:
        """Text that is certain once this id has come."""

    def flush(self) -> str:
        """What is left; an unfinished character becomes U+FFFD."""


class Tokenizer(abc.ABC):
    """Text <-> ids (abstract: :class:`ByteTokenizer` and others fill in the pieces).

    A tokenizer is a few settings (:meth:`settings`) and a few files (:meth:`files`); both travel in archives
    and identify it (:attr:`fingerprint`). Special tokens are never made from ordinary text, unless a caller
    asks for it by ``special=True``, and are never shown by :meth:`decode`, unless asked for.

    Attributes:
        kind: the name by which configs and archives choose the class.
        lossless: whether any Unicode text comes back exactly.
        vocab_size: number of ids.
        special_tokens: id of each special token by its text.
        bos_id: begins a document, or None.
        eos_id: ends a document, or None.
    """

    kind: ClassVar[str]
    lossless: bool = True
    vocab_size: int
    special_tokens: Mapping[str, int]
    bos_id: int | None = None
    eos_id: int | None = None

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """Turn text into ids.

        Args:
            text: any Unicode text.
            bos: begin with the beginning-of-text token.
            eos: end with the end-of-text token.
            special: read special tokens that are written in the text, instead of spelling them.

        Raises:
            TokenizerError: for a lone surrogate (which is no text), a character that cannot be written, or a
                token that this tokenizer lacks.
        """
        _check_text(text)
        ids: list[int] = [self._marker("bos")] if bos else []
        ids += self._encode_special(text) if special and self.special_tokens else self._encode(text)
        if eos:
            ids.append(self._marker("eos"))
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Turn ids into text; special tokens are left out unless ``special``.

        Raises:
            TokenizerError: for an id outside the vocabulary.
        """
        tokens = list(ids)
        if tokens and not (min(tokens) >= 0 and max(tokens) < self.vocab_size):
            bad = next(t for t in tokens if not 0 <= t < self.vocab_size)
            raise TokenizerError(
                "an id is outside the vocabulary",
                where=f"{self.kind} tokenizer",
                expected=f"ids from 0 to {self.vocab_size - 1}",
                found=bad,
                fix="decode with the tokenizer that the model was trained with",
            )
        return self._decode(tokens, special)

    @property
    def opener(self) -> int | None:
        """What stands before the first token of every document and of every prompt: its own mark, or what ends the
        document before; None where there is neither."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @property
    def marks(self) -> tuple[list[int], list[int]]:
        """What stands before and after a text that is read as a whole, as by an encoder."""
        return [] if self.bos_id is None else [self.bos_id], [] if self.eos_id is None else [self.eos_id]

    @property
    def between(self) -> list[int]:
        """What stands between two texts that are read together, as a question and a text with its answer."""
        return self.marks[1]

    def encode_prompt(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text that begins a document: after the opener, unless the text writes that itself.

        Args:
            text: what a model goes on from.
            special: read special tokens that are written in the text.
        """
        ids = self.encode(text, special=special)
        return ids if self.opener is None or ids[:1] == [self.opener] else [self.opener, *ids]

    def count_bytes(self, ids: Sequence[int]) -> int:
        """UTF-8 bytes of the text that ids stand for; exact for any part of a text where every id has its own."""
        return len(self.decode(ids).encode())

    @abc.abstractmethod
    def stream(self) -> StreamDecoder:
        """A new decoder for one stream of ids."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """The files from which it is rebuilt, by name."""

    @classmethod
    @abc.abstractmethod
    def from_files(cls, files: Mapping[str, bytes], **settings: Any) -> Tokenizer:
        """Rebuild it from what :meth:`files` and :meth:`settings` returned."""

    def settings(self) -> dict[str, Any]:
        """What it knows beyond its files, as plain data."""
        return {}

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that tell two tokenizers apart."""
        digest = hashlib.sha256(json.dumps([self.kind, self.settings()], sort_keys=True).encode())
        for name, content in sorted(self.files().items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()[:16]

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    def _encode_special(self, text: str) -> list[int]:
        """The same, with special tokens that are written in the text."""
        ids: list[int] = []
        for part in re.split(self._special_pattern(), text):
            known = self.special_tokens.get(part)
            ids.extend(self._encode(part) if known is None else [known])
        return ids

    @abc.abstractmethod
    def _decode(self, tokens: list[int], special: bool) -> str: ...

    def _marker(self, which: str) -> int:
        token = self.bos_id if which == "bos" else self.eos_id
        if token is None:
            raise TokenizerError(
                f"this tokenizer has no {which} token",
                where=f"{self.kind} tokenizer",
                fix=f"encode without {which}=True",
            )
        return token

    def _special_pattern(self) -> str:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return "(" + "|".join(map(re.escape, longest_first)) + ")"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.files(), self.settings())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


def _rebuild(cls: type[Tokenizer], files: dict[str, bytes], settings: dict[str, Any]) -> Tokenizer:
    return cls.from_files(files, **settings)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            "a lone surrogate is not text",
            where=f"character {error.start}",
            found=ascii(text[error.start]),
            fix='read the file with errors="replace", or clean the text',
        ) from None


class TableTokenizer(Tokenizer):
    """A tokenizer whose every id stands for fixed bytes (abstract).

    Decoding is then one lookup per id, and streaming is an incremental UTF-8 decoder.
    """

    table: Sequence[bytes]  # id -> bytes; special tokens hold their own text

    def stream(self) -> StreamDecoder:
        return _ByteStream(self.table, frozenset(self.special_tokens.values()))

    def count_bytes(self, ids: Sequence[int]) -> int:
        hidden = frozenset(self.special_tokens.values())
        return sum(len(self.table[i]) for i in ids if i not in hidden)

    def _decode(self, tokens: list[int], special: bool) -> str:
        hidden = () if special else frozenset(self.special_tokens.values())
        return b"".join(self.table[t] for t in tokens if t not in hidden).decode("utf-8", "replace")


class _ByteStream:
    """Streams ids that stand for fixed bytes."""

    def __init__(self, table: Sequence[bytes], hidden: frozenset[int]) -> None:
        self.table, self.hidden = table, hidden
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return "" if token in self.hidden else self.decoder.decode(self.table[token])

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


class WindowStream:
    """Decodes a short window again with each id: a decoder may treat the first id of a text in its own way."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.window: list[int] = []
        self.shown = ""  # the text of the window that was already given out

    def push(self, token: int) -> str:
        self.window.append(token)
        text = self.tokenizer.decode(self.window)
        if text.endswith("\ufffd"):
            return ""  # perhaps half a character
        new = text[len(self.shown) :]
        self.shown = text
        if len(self.window) > 16:
            self.window = self.window[-4:]
            self.shown = self.tokenizer.decode(self.window)
        return new

    def flush(self) -> str:
        text = self.tokenizer.decode(self.window) if self.window else ""
        new, self.window, self.shown = text[len(self.shown) :], [], ""
        return new
