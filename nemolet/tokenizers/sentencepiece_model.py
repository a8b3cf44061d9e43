"""What a SentencePiece model says beside its ids, read from its file: a protocol buffer of a few fields."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemolet.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces, by their numbers in the file
STEP = 1 / 64  # between scores; see docs/decisions/0118


@dataclass(frozen=True)
class Piece:
    """One id of a model."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """The parts of a model that decide how a text is cut (final).

    Args:
        pieces: by their ids.
        algorithm: 1 for a unigram model, 2 for byte-pair encoding.
        byte_fallback: whether characters without a piece are bytes.
        suffix: whether a space belongs to the word before it.
        charsmap: how characters are normalised; empty for not at all.
        dummy_prefix: whether a space is put before each text.
        trims: whether spaces around a text are left out, and several are one.
        marks_spaces: whether a space is written as ``▁``.
    """

    pieces: list[Piece]
    algorithm: int
    byte_fallback: bool
    suffix: bool
    charsmap: bytes
    dummy_prefix: bool
    trims: bool
    marks_spaces: bool

    @classmethod
    def parse(cls, content: bytes) -> SentencePieceModel:
        """Read a serialized model.

        Raises:
            TokenizerError: for bytes that are none.
        """
        try:
            fields = [*_fields(content)]
            pieces = [_piece(value) for number, value in fields if number == 1]
            trainer, normalizer = (
                {n: v for number, value in fields if number == wanted for n, v in _fields(value)} for wanted in (2, 3)
            )
        except (ValueError, IndexError, KeyError, TypeError, struct.error) as error:
            raise TokenizerError(
                "these bytes are no SentencePiece model",
                where="SentencePieceModel",
                expected="the content of a file that ends in .model",
                found=f"{len(content)} bytes; {error}",
            ) from error
        return cls(  # numbers of fields, and what a missing one means, are those of sentencepiece_model.proto
            pieces=pieces,
            algorithm=int(trainer.get(3, 1)),
            byte_fallback=bool(trainer.get(35, False)),
            suffix=bool(trainer.get(24, False)),
            charsmap=bytes(normalizer.get(2, b"")),
            dummy_prefix=bool(normalizer.get(3, True)),
            trims=bool(normalizer.get(4, True)),
            marks_spaces=bool(normalizer.get(5, True)),
        )


def _piece(message: bytes) -> Piece:
    known = dict(_fields(message))
    [score] = struct.unpack("<f", known.get(2, bytes(4)))
    return Piece(known.get(1, b"").decode(), score, int(known.get(3, NORMAL)))


def with_exact_scores(content: bytes) -> bytes:
    """A model whose scores are multiples of :data:`STEP`: sums of some ten thousand of them are then exact in single
    precision, in any order, so that equally likely splits are equal to every program that reads the model."""
    rounded = bytearray(content)
    for number, piece, start in _places(content):
        for inner, score, offset in _places(piece) if number == 1 else ():
            if inner == 2:
                [value] = struct.unpack("<f", score)
                rounded[start + offset : start + offset + 4] = struct.pack("<f", round(value / STEP) * STEP)
    return bytes(rounded)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message: a whole number, or bytes."""
    return ((number, value) for number, value, _ in _places(message))


def _places(message: bytes) -> Iterator[tuple[int, Any, int]]:
    """The same, and where the value begins."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            start = at
            value, at = _varint(message, at)
            yield tag >> 3, value, start
            continue
        if kind == 2:
            size, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}[kind]
        if at + size > len(message):
            raise ValueError("a field is cut short")
        yield tag >> 3, message[at : at + size], at
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
