"""Which samples go together into which batch, as a pure function of a seed and the number of an epoch.

Two plans: batches of as many samples as asked (:func:`pooled`; texts), or of as many seconds (:class:`BatchPlan`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemolet.errors import DataError
from nemolet.rules import Checked

Seconds = NDArray[np.float64]


class Row(NamedTuple):
    """What one row of a batch is made of: utterances by number, and the seconds of silence between them."""

    utterances: tuple[int, ...]
    pauses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Joining(Checked):
    """Utterances of one group are joined into longer ones, newly in every epoch (final).

    Args:
        least: fewest utterances in one.
        most: most utterances in one; what is left over at the end of a group may have fewer than ``least``.
        least_pause: shortest silence between two, in seconds.
        most_pause: longest silence.
    """

    least: int
    most: int
    least_pause: float = 0.0
    most_pause: float = 0.0

    CONFIG_RULES = (
        ("least >= 1 and least <= most", "a joined utterance has at least 1 part, and least <= most"),
        ("least_pause >= 0 and least_pause <= most_pause", "pauses are at least 0, and least_pause <= most_pause"),
    )

    def rows(self, groups: NDArray[np.int64], random: np.random.Generator) -> list[Row]:
        """Each utterance once, joined with others of its group."""
        rows = []
        for group in np.unique(groups):
            members = random.permutation(np.flatnonzero(groups == group)).tolist()
            while members:
                count = int(random.integers(self.least, self.most + 1))
                taken, members = members[:count], members[count:]
                pauses = random.uniform(self.least_pause, self.most_pause, len(taken) - 1)
                rows.append(Row(tuple(taken), tuple(pauses.tolist())))
        return rows


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The batches of every epoch, made without reading any audio (final).

    Utterances are sorted by length, with some noise, and cut into batches; so a batch holds utterances of
    similar length, and other ones in every epoch. Each utterance is in exactly one batch of an epoch.

    Args:
        seconds: length of each utterance.
        batch_seconds: most seconds in a batch, padding included; a longer utterance is a batch of its own.
        batch_size: most rows in a batch.
        seed: of the order.
        shuffle: whether epochs differ; otherwise all are as the first one.
        spread: how much noise: lengths are multiplied by up to ``exp(spread)`` before they are sorted.
        groups: of each utterance, for joining; None for one group.
        joining: None for utterances as they are.

    Example:
        >>> plan = BatchPlan(np.array([1.0, 3.0, 1.0, 1.0]), batch_seconds=3.0, batch_size=8)
        >>> sorted(tuple(sorted(row.utterances[0] for row in batch)) for batch in plan.epoch(0))
        [(0, 2, 3), (1,)]
    """

    seconds: Seconds
    batch_seconds: float
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    spread: float = 0.2
    groups: NDArray[np.int64] | None = None
    joining: Joining | None = None

    def __post_init__(self) -> None:
        if not len(self.seconds):
            raise DataError("there is no utterance to learn from", where="data.path", expected="at least one")

    def epoch(self, number: int) -> list[list[Row]]:
        """All batches of an epoch, in their order."""
        random = np.random.default_rng([self.seed, number if self.shuffle else 0])
        if self.joining is None:
            rows, lengths = [Row((index,)) for index in range(len(self.seconds))], self.seconds
        else:
            groups = np.zeros(len(self.seconds), np.int64) if self.groups is None else self.groups
            rows = self.joining.rows(groups, random)
            lengths = np.array([self.seconds[list(row.utterances)].sum() + sum(row.pauses) for row in rows])
        noise = random.uniform(0.0, self.spread, len(rows)) if self.shuffle else np.zeros(len(rows))
        order = np.argsort(np.log(np.maximum(lengths, 1e-6)) + noise, kind="stable")
        batches = self._cut([rows[index] for index in order], lengths[order].tolist())
        return [batches[index] for index in random.permutation(len(batches))]

    def _cut(self, rows: Sequence[Row], lengths: Sequence[float]) -> list[list[Row]]:
        batches: list[list[Row]] = []
        longest = math.inf
        for row, length in zip(rows, lengths):
            longest = max(longest, length)
            if (
                not batches
                or longest * (len(batches[-1]) + 1) > self.batch_seconds + 1e-9
                or (len(batches[-1]) == self.batch_size)
            ):
                batches.append([])
                longest = length
            batches[-1].append(row)
        return batches


def pooled(
    lengths: NDArray[np.int64], batch_size: int, random: np.random.Generator, *, pool: int = 50
) -> list[NDArray[np.int64]]:
    """Samples by number in batches of one size, those of a batch about as long as each other, in a random order.

    Args:
        lengths: of the samples.
        batch_size: samples of every batch; the last is filled up with samples of other ones.
        random: of this epoch.
        pool: how many batches are sorted by length together.

    Example:
        >>> batches = pooled(np.array([1, 9, 1, 9]), 2, np.random.default_rng(0))
        >>> sorted(tuple(sorted(batch.tolist())) for batch in batches)
        [(0, 2), (1, 3)]
    """
    count = len(lengths)
    order = np.resize(random.permutation(count), -(-count // batch_size) * batch_size)
    batches: list[NDArray[np.int64]] = []
    for part in np.split(order, range(pool * batch_size, len(order), pool * batch_size)):
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += np.split(part, len(part) // batch_size)
    return [batches[index] for index in random.permutation(len(batches))]


def recordings_in(batch: Sequence[Row]) -> int:
    """How many utterances the rows of a batch are made of."""
    return sum(len(row.utterances) for row in batch)


def shared_evenly(batches: Sequence[list[Row]], ranks: int) -> list[list[Row]]:
    """Split the largest batches until every rank has the same number of them; or join the smallest.

    Raises:
        DataError: for fewer utterances than ranks.

    Example:
        >>> rows = [Row((i,)) for i in range(3)]
        >>> [len(batch) for batch in shared_evenly([rows], 2)]
        [2, 1]
        >>> [len(batch) for batch in shared_evenly([[row] for row in rows], 2)]
        [2, 1]
    """
    shared, total = [list(batch) for batch in batches], sum(map(len, batches))
    if total < ranks:
        raise DataError(
            "there are fewer utterances for validation than processes",
            where="data.valid_path",
            expected=f"at least {ranks}",
            found=total,
        )
    wanted = -(-len(shared) // ranks) * ranks
    wanted = wanted if wanted <= total else wanted - ranks
    while len(shared) != wanted:
        shared.sort(key=len, reverse=True)
        if len(shared) < wanted:
            largest = shared.pop(0)
            half = -(-len(largest) // 2)
            shared += [largest[:half], largest[half:]]
        else:
            shared.append(shared.pop() + shared.pop())
    return sorted(shared, key=len, reverse=True) if len(shared) != len(batches) else shared
