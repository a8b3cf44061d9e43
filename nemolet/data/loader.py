"""Batches for training and validation, sharded over ranks and resumable at any step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from nemolet.data.packing import Sampler
from nemolet.data.prepared import Batch, DummyBatch
from nemolet.errors import DataError


class TokenLoader:
    """An endless stream of batches whose whole state is how many samples it has given out (final).

    Rank r of R takes samples r*b to (r+1)*b of each global batch of R*b. The state counts samples of all
    ranks, so a run may resume with another number of ranks or another batch size.

    Args:
        sampler: the samples.
        batch_size: sequences per rank and step, b.
        rank: of this process among the data-parallel ranks, r.
        ranks: number of data-parallel ranks, R.

    Shape: each entry is ``[B, T]``: tokens, labels, and segments, positions where documents are told apart.
    """

    def __init__(self, sampler: Sampler, *, batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        if batch_size < 1 or not 0 <= rank < ranks:
            raise DataError(
                "the batch is impossible",
                where="data.batch_size",
                expected="at least 1, and rank below ranks",
                found=f"batch_size={batch_size}, rank={rank}, ranks={ranks}",
            )
        self.samples, self.batch_size, self.rank, self.ranks = sampler, batch_size, rank, ranks
        self.consumed = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            first = self.consumed + self.rank * self.batch_size
            batch = collate(self.samples, range(first, first + self.batch_size))
            # Counted before the batch is handed out: whoever saves while using it has used it.
            self.consumed += self.batch_size * self.ranks
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader stood."""
        self.consumed = int(state["consumed"])


class ValidationLoader:
    """Each sample once, in order, sharded over ranks, which take the same number of steps (final).

    Args:
        sampler: the samples.
        batch_size: sequences per rank and step.
        rank: of this process.
        ranks: number of processes.
        max_batches: stop after so many steps; None for one whole pass.
    """

    def __init__(
        self, sampler: Sampler, *, batch_size: int, rank: int = 0, ranks: int = 1, max_batches: int | None = None
    ) -> None:
        self.samples, self.batch_size, self.rank, self.ranks = sampler, batch_size, rank, ranks
        steps = -(-sampler.size // (batch_size * ranks))
        self.steps = steps if max_batches is None else min(steps, max_batches)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.steps):
            first = (step * self.ranks + self.rank) * self.batch_size
            numbers = range(min(first, self.samples.size - 1), min(first + self.batch_size, self.samples.size))
            batch = collate(self.samples, numbers)
            yield batch if first < self.samples.size else DummyBatch(batch)


def collate(sampler: Sampler, numbers: range) -> Batch:
    """Stack samples; documents are told apart where any sample of the batch has several."""
    samples = [sampler.sample(number) for number in numbers]
    batch = {
        "tokens": torch.from_numpy(np.stack([s.tokens for s in samples])),
        "labels": torch.from_numpy(np.stack([s.labels for s in samples])),
    }
    if any(s.segments is not None for s in samples):
        length = len(samples[0].tokens)
        ones, count = np.ones(length, np.int64), np.arange(length)
        batch["segments"] = torch.from_numpy(np.stack([ones if s.segments is None else s.segments for s in samples]))
        batch["positions"] = torch.from_numpy(
            np.stack([count if s.positions is None else s.positions for s in samples])
        )
    return batch
