"""Fixed-length training sequences out of documents, as a pure function of a sample's number.

A sampler is infinite and has no state: ``sample(n)`` is always the same. So shuffling, blending, sharding
over ranks and resuming are arithmetic on ``n``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nemolet.errors import DataError
from nemolet.rules import check_choices
from nemolet.types import IGNORED


class Sample(NamedTuple):
    """One sequence; each field has length T. ``segments`` and ``positions`` are None where no document ends inside."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    segments: NDArray[np.int64] | None
    positions: NDArray[np.int64] | None


class Sampler(Protocol):
    """An infinite sequence of samples."""

    size: int  # samples in one pass

    def sample(self, number: int) -> Sample: ...


class PackedTokens:
    """Documents packed one after the other and cut into sequences (final).

    Args:
        tokens: all ids.
        starts: where each document begins.
        lengths: how long it is.
        sequence_length: T.
        order: ``"shuffled"`` is another permutation in every pass; ``"sequential"`` is not shuffled;
            ``"random"`` cuts at random places, with replacement.
        seed: of the order.
        opener: the id from which the first token of a document is predicted: what ends every document and so opens
            the next one (GPT-2, 2019); None where documents begin with a token of their own, or without one.
        led: whether the opener is put before each document, since no other document or token of the file opens it;
            None for none.
        respect_documents: number the documents in each sequence, so that attention stays inside; otherwise
            sequences run over document ends as over any other token.
        tail: also give what is left of the text after the last whole sequence, filled up with positions that do not
            count; for models that look back only.

    Raises:
        DataError: for fewer tokens than one sequence needs.

    Example:
        >>> packed = PackedTokens(np.arange(9), [0, 4], [4, 5], sequence_length=4, order="sequential")
        >>> packed.sample(0).tokens.tolist(), packed.sample(0).labels.tolist()
        ([0, 1, 2, 3], [1, 2, 3, -100])
    """

    def __init__(
        self,
        tokens: NDArray[np.generic],
        starts: Sequence[int] | NDArray[np.int64],
        lengths: Sequence[int] | NDArray[np.int64],
        *,
        sequence_length: int,
        order: Literal["shuffled", "sequential", "random"] = "shuffled",
        seed: int = 0,
        opener: int | None = None,
        led: Sequence[bool] | NDArray[np.bool_] | None = None,
        respect_documents: bool = True,
        tail: bool = False,
    ) -> None:
        check_choices(type(self).__init__, type(self).__name__, {"order": order})
        self.tokens = tokens
        self.starts, self.lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
        nothing = led is None or opener is None
        self.led = np.zeros(len(self.lengths), bool) if nothing else np.asarray(led, bool)
        self.lengths = self.lengths + self.led  # an opener counts as a token of its document
        self.offsets = np.concatenate(([0], np.cumsum(self.lengths)))
        self.length, self.order, self.seed, self.opener = sequence_length, order, seed, opener
        self.total = int(self.offsets[-1])
        self.size = (self.total - 1 + (sequence_length - 1 if tail else 0)) // sequence_length
        self.numbered = respect_documents and len(self.lengths) > 1
        if self.size < 1:
            raise DataError(
                "the text is shorter than one sequence",
                where="data.sequence_length",
                found=f"{self.total} tokens",
                expected=f"at least {2 if tail else sequence_length + 1} tokens",
                fix="use more text" + (f", or set data.sequence_length={self.total - 1}" if self.total > 1 else ""),
            )
        self._epoch, self._permutation = -1, np.zeros(0, np.int64)

    def sample(self, number: int) -> Sample:
        """Sequence ``number``."""
        window, boundaries, opened = self._window(self._start(number))
        missing = self.length + 1 - len(window)  # only at the end of the text
        window = np.pad(window, (0, missing)) if missing else window
        tokens, labels = window[:-1], window[1:].copy()
        labels[self.length - missing :] = IGNORED
        if not self.numbered:
            return Sample(tokens, labels, None, None)
        opened = opened & (tokens[boundaries - 1] == (-1 if self.opener is None else self.opener))
        labels[boundaries[~opened] - 1] = IGNORED  # it cannot be known from the document before
        boundaries = np.unique(boundaries - opened)
        boundaries = boundaries[boundaries > 0]
        inner = boundaries[boundaries < self.length]
        if not len(inner):
            return Sample(tokens, labels, None, None)
        segments = np.zeros(self.length, np.int64)
        segments[inner] = 1
        segments = np.cumsum(segments) + 1
        first = np.concatenate(([0], inner))
        positions = np.arange(self.length) - first[segments - 1]
        return Sample(tokens, labels, segments, positions)

    def _start(self, number: int) -> int:
        if self.order == "random":
            return scattered(number, self.seed) % (self.total - self.length)
        epoch, index = divmod(number, self.size)
        if self.order == "sequential":
            return index * self.length
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.size)
        return int(self._permutation[index]) * self.length

    def _window(self, start: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """T + 1 ids from a place on, where in them documents begin, and whether what ends one opens the next."""
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        inside = start - int(self.offsets[first]) - int(self.led[first])
        if inside >= 0 and inside + self.length < self.lengths[first] - self.led[first]:  # usual in long documents
            at = int(self.starts[first]) + inside
            none = np.zeros(0, np.int64)
            return self.tokens[at : at + self.length + 1].astype(np.int64), none, none.astype(bool)
        last = int(np.searchsorted(self.offsets[:-1], start + self.length, side="right")) - 1
        begins = self.starts[first : last + 1].copy()
        ends = begins + self.lengths[first : last + 1] - self.led[first : last + 1]
        led = self.led[first : last + 1].copy()
        begins[0] += max(0, inside)
        led[0] &= inside < 0
        parts: list[NDArray[Any]] = []
        for begin, end, opens in zip(begins.tolist(), ends.tolist(), led.tolist()):
            parts += [np.array([self.opener])] if opens else []
            parts.append(self.tokens[begin : min(end, begin + self.length + 1)])
        boundaries = self.offsets[first + 1 : last + 1] - start
        # An empty document begins where the next one does.
        boundaries, places = np.unique(boundaries[::-1], return_index=True)
        opened = ~self.led[first + 1 : last + 1][::-1][places]
        kept = (boundaries > 0) & (boundaries <= self.length)
        return np.concatenate(parts)[: self.length + 1].astype(np.int64), boundaries[kept], opened[kept]


def scattered(number: int, seed: int) -> int:
    """64 bits that look random, from a number and a seed alone (SplitMix64; Steele et al., 2014).

    Example:
        >>> scattered(0, 0) != scattered(1, 0)
        True
    """
    mask = (1 << 64) - 1
    bits = ((seed + 1) * 0xD1342543DE82EF95 + number * 0x9E3779B97F4A7C15) & mask
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
    return bits ^ (bits >> 31)


class Chain:
    """Samplers one after the other (final).

    Example:
        >>> one, two = (PackedTokens(np.full(9, i), [0], [9], sequence_length=4) for i in (1, 2))
        >>> [int(Chain([one, two]).sample(n).tokens[0]) for n in range(4)]
        [1, 1, 2, 2]
    """

    def __init__(self, parts: Sequence[Sampler]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([part.size for part in parts])
        self.size = int(self.ends[-1])

    def sample(self, number: int) -> Sample:
        """Sample ``number``."""
        rounds, place = divmod(number, self.size)
        part = int(np.searchsorted(self.ends, place, side="right"))
        before = int(self.ends[part]) - self.parts[part].size
        return self.parts[part].sample(rounds * self.parts[part].size + place - before)


PERIOD = 1000  # samples of a blend that together hold each part's share


def shares(weights: Sequence[float]) -> list[int]:
    """How many of every thousand samples each part of a blend has.

    Raises:
        DataError: for weights that are not positive, or a share below a thousandth.

    Example:
        >>> shares([3, 1]), shares([1, 1, 1])
        ([750, 250], [334, 333, 333])
    """
    if not weights or not all(weight > 0 and np.isfinite(weight) for weight in weights):
        raise DataError(
            "the weights of the blend are impossible",
            where="data.path",
            found=list(weights),
            expected="a number above 0 for each part",
            fix="leave out what is not to be read",
        )
    exact = np.asarray(weights, float) / sum(weights) * PERIOD
    counts = np.floor(exact + 1e-9).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: PERIOD - counts.sum()]:
        counts[index] += 1
    if not counts.all():
        raise DataError(
            "a part of the blend is too small",
            where="data.path",
            found=list(weights),
            expected=f"a share of at least 1/{PERIOD}",
            fix="raise its weight or remove it",
        )
    return [int(count) for count in counts]


class Blend:
    """Samplers mixed by weight (final).

    Every thousand consecutive samples hold the same share of each part, spread evenly; so which part a sample
    comes from, and which of its samples it is, is arithmetic.

    Args:
        parts: the samplers.
        weights: their shares, in any unit.

    Raises:
        DataError: for weights that are not positive, or a share below a thousandth.

    Example:
        >>> one, two = (PackedTokens(np.full(9, i), [0], [9], sequence_length=4) for i in (1, 2))
        >>> blend = Blend([one, two], [3, 1])
        >>> [int(blend.sample(n).tokens[0]) for n in range(8)]
        [1, 1, 2, 1, 1, 1, 2, 1]
    """

    def __init__(self, parts: Sequence[Sampler], weights: Sequence[float]) -> None:
        if len(parts) != len(weights):
            raise DataError(
                "the weights of the blend are impossible",
                where="data.path",
                found=list(weights),
                expected=f"one for each of {len(parts)} parts",
            )
        self.parts, self.counts = list(parts), shares(weights)
        # Sample j of part k belongs at (j + 1/2) / count; sorting by that spreads every part evenly.
        places = [((j + 0.5) / count, k, j) for k, count in enumerate(self.counts) for j in range(count)]
        self.pattern = [(k, j) for _, k, j in sorted(places)]
        self.size = int(max(part.size * sum(weights) / weight for part, weight in zip(parts, weights)))

    def sample(self, number: int) -> Sample:
        """Sample ``number``."""
        period, place = divmod(number, PERIOD)
        part, index = self.pattern[place]
        return self.parts[part].sample(period * self.counts[part] + index)
