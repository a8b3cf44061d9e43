"""Batches of audio, sharded over ranks and resumable at any step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch

from nemolet.data.audio import Channels, Samples, resample
from nemolet.data.buckets import BatchPlan, Row, recordings_in, shared_evenly
from nemolet.data.inspection import Usable
from nemolet.data.manifest import Problem
from nemolet.data.prepared import Batch
from nemolet.data.targets import Target
from nemolet.errors import DataError

_log = logging.getLogger("nemolet")


class AudioStore:
    """Decoded utterances, kept in memory up to a limit (final).

    Args:
        usable: the utterances.
        sample_rate: what they are resampled to.
        channels: what becomes of several channels.
        memory_mb: how much is kept; the rest is decoded anew whenever it is needed.

    Attributes:
        broken: what could not be read although it had been examined; a neighbour took its place.
    """

    def __init__(
        self, usable: Sequence[Usable], *, sample_rate: int, channels: Channels = "mix", memory_mb: float = 1024
    ) -> None:
        self.usable, self.sample_rate, self.channels = usable, sample_rate, channels
        self.room = int(memory_mb * 2**20)
        self.kept: dict[int, Samples] = {}
        self.broken: dict[int, Problem] = {}

    def samples(self, number: int) -> Samples:
        """The samples of an utterance, one channel."""
        if number in self.kept:
            return self.kept[number]
        samples = self._decoded(self.usable[number])
        if samples.nbytes <= self.room:
            self.kept[number] = samples
            self.room -= samples.nbytes
        return samples

    def readable(self, number: int) -> int:
        """The utterance itself, or its next neighbour that can be read; a run does not end for one bad file.

        Raises:
            DataError: when nothing can be read any more.
        """
        for step in range(len(self.usable)):
            candidate = (number + step) % len(self.usable)
            if candidate in self.broken:
                continue
            try:
                self.samples(candidate)
                return candidate
            except (DataError, OSError) as error:
                found = error.what if isinstance(error, DataError) else str(error)
                self.broken[candidate] = Problem(self.usable[candidate].utterance.where, found)
                _log.warning("%s; a neighbour takes its place", self.broken[candidate])
        raise DataError("no recording can be read any more", where="data.path", found=f"{len(self.broken)} are broken")

    def _decoded(self, usable: Usable) -> Samples:
        recording = usable.utterance.recording
        samples, rate = recording.read(usable.start, usable.stop)
        if usable.facts.peak is None and not np.isfinite(samples).all():  # nobody has looked at the samples yet
            raise DataError("samples that are no numbers", where=recording.name)
        mono = samples[:, 0] if samples.shape[1] == 1 or self.channels == "first" else samples.mean(1)
        return resample(np.ascontiguousarray(mono), rate, self.sample_rate)


class MakesBatches(Protocol):
    """Makes tensors of rows."""

    def batch(self, rows: Sequence[Row]) -> Batch:
        """One batch."""


class Batcher:
    """Makes tensors of rows: audio with its lengths, and what is to be predicted (final).

    Args:
        store: the samples.
        target: the labels; None for audio alone.

    Shape: ``audio [B, N]`` and ``audio_lengths [B]``, and ``labels`` as the target makes them.
    """

    def __init__(self, store: AudioStore, target: Target | None) -> None:
        self.store, self.target = store, target

    def batch(self, rows: Sequence[Row]) -> Batch:
        """One batch; rows are padded with zeros."""
        readable = [Row(tuple(map(self.store.readable, row.utterances)), row.pauses) for row in rows]
        waves = [self._joined(row) for row in readable]
        audio_BN = torch.zeros(len(waves), max(map(len, waves)))
        for index, wave in enumerate(waves):
            audio_BN[index, : len(wave)] = torch.from_numpy(wave)
        batch = {"audio": audio_BN, "audio_lengths": torch.tensor([len(wave) for wave in waves])}
        if self.target is not None:
            batch["labels"] = self.target.labels(readable, batch["audio_lengths"].tolist())
        return batch

    def _joined(self, row: Row) -> Samples:
        parts = [self.store.samples(number) for number in row.utterances]
        if len(parts) == 1:
            return parts[0]
        silences = [np.zeros(round(pause * self.store.sample_rate), np.float32) for pause in row.pauses]
        return np.concatenate([part for pair in zip(parts, [*silences, parts[0][:0]]) for part in pair])


class AudioLoader:
    """An endless stream of batches whose whole state is how many utterances it has given out (final).

    The batches of all epochs follow each other in one sequence, which depends on the plan alone. At each step
    R ranks take the next R batches. So a run may resume with another number of ranks; with other sizes of batches
    it goes on with the batch in which the last utterance was.

    Args:
        batcher: makes the tensors.
        plan: says which utterances go together.
        rank: of this process among the data-parallel ranks.
        ranks: their number.
    """

    def __init__(self, batcher: MakesBatches, plan: BatchPlan, *, rank: int = 0, ranks: int = 1) -> None:
        self.batcher, self.plan, self.rank, self.ranks = batcher, plan, rank, ranks
        self.consumed = 0

    def __iter__(self) -> Iterator[Batch]:
        stream = self._from(self.consumed)
        while step := list(islice(stream, self.ranks)):
            batch = self.batcher.batch(step[self.rank][1])
            # Counted before the batch is handed out: whoever saves while using it has used it.
            self.consumed = step[-1][0]
            yield batch

    def _from(self, consumed: int) -> Iterator[tuple[int, list[Row]]]:
        """The batches that follow so many utterances, each with what is consumed after it."""
        size = len(self.plan.seconds)
        number, inside = divmod(consumed, size)
        while True:
            batches = self.plan.epoch(number)
            ends = np.cumsum([recordings_in(batch) for batch in batches])
            for index in range(int(np.searchsorted(ends, inside, side="right")), len(batches)):
                yield number * size + int(ends[index]), batches[index]
            number, inside = number + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader stood."""
        self.consumed = int(state["consumed"])


class AudioValidationLoader:
    """Each utterance once, the same number of batches on every rank (final).

    Args:
        batcher: makes the tensors.
        plan: says which utterances go together; its first epoch is taken.
        rank: of this process.
        ranks: number of processes.
        max_batches: stop after so many steps; None for one whole pass.
    """

    def __init__(
        self, batcher: MakesBatches, plan: BatchPlan, *, rank: int = 0, ranks: int = 1, max_batches: int | None = None
    ) -> None:
        batches = shared_evenly(plan.epoch(0), ranks)[: None if max_batches is None else max_batches * ranks]
        self.batcher, self.rows = batcher, batches[rank::ranks]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batcher.batch, self.rows)
