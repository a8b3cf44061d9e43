"""Which documents of a token file are for training and which for validation, and what opens each of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemolet.data.indexed import IndexedTokens
from nemolet.tokenizers import Tokenizer

_BLOCK, _BLOCKS = 1 << 16, 64  # ids that are looked at together, and how many such blocks


@dataclass(frozen=True)
class Split:
    """Documents of a token file that belong to training or to validation; ``led`` are those that nothing opens."""

    tokens: NDArray[np.generic]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    led: NDArray[np.bool_]

    @property
    def digest(self) -> str:
        """Sixteen digits that tell documents apart: where they begin, and the ids of the file.

        Of a large file blocks spread evenly over it are looked at.
        """
        made = hashlib.sha256()
        for places in (self.starts, self.lengths, self.led):
            made.update(np.ascontiguousarray(places).tobytes())
        for begin in range(0, len(self.tokens), max(_BLOCK, len(self.tokens) // _BLOCKS)):
            made.update(np.ascontiguousarray(self.tokens[begin : begin + _BLOCK]).tobytes())
        return made.hexdigest()[:16]


def whole(tokens: IndexedTokens, tokenizer: Tokenizer) -> Split:
    """All documents of a file."""
    return _of(tokens, tokenizer, tokens.starts, tokens.lengths)


def set_aside(tokens: IndexedTokens, fraction: float, tokenizer: Tokenizer) -> tuple[Split, Split]:
    """Set whole documents aside where there are many, else the end of the text."""
    starts, lengths = tokens.starts, tokens.lengths
    if len(lengths) * min(fraction, 1 - fraction) >= 3:
        # Every so many-th document: neighbours are alike, so both sides see everything.
        aside = np.floor((np.arange(len(lengths)) + 1) * fraction) > np.floor(np.arange(len(lengths)) * fraction)
        return (
            _of(tokens, tokenizer, starts[~aside], lengths[~aside]),
            _of(tokens, tokenizer, starts[aside], lengths[aside]),
        )
    total = int(lengths.sum())
    border = total - max(2, int(total * fraction))
    before = np.minimum(np.maximum(border - starts, 0), lengths)
    kept, left = before > 0, lengths > before
    return (
        _of(tokens, tokenizer, starts[kept], before[kept]),
        _of(tokens, tokenizer, (starts + before)[left], (lengths - before)[left], rest=bool(before[left][:1].any())),
    )


def _of(
    tokens: IndexedTokens,
    tokenizer: Tokenizer,
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    rest: bool = False,
) -> Split:
    """Documents of a file; every one is opened as a prompt is, by a mark in the file or one that is put before it.

    Args:
        tokens: the file.
        tokenizer: knows the marks.
        starts: of the documents.
        lengths: of the documents.
        rest: whether the first one is the rest of a document.
    """
    led = np.zeros(len(starts), bool)
    first = int(tokens.lengths[np.flatnonzero(tokens.lengths)[0]])  # of the first document that is not empty
    if tokenizer.bos_id is not None:
        led[:] = int(tokens.tokens[0]) != tokenizer.bos_id
    elif tokenizer.eos_id is not None:
        led[:] = int(tokens.tokens[first - 1]) != tokenizer.eos_id  # otherwise each opens the next one
        led[:1] = True
    led[:1] &= not rest
    return Split(tokens.tokens, starts, lengths, led)
