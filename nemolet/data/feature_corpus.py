"""Features that were computed elsewhere: arrays of frames with their texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nemolet.data.audio_loader import AudioLoader, AudioValidationLoader
from nemolet.data.buckets import BatchPlan, Row
from nemolet.data.corpus import TokenizerSpec
from nemolet.data.prepared import Batch, Progress, Unit, digest, lasting
from nemolet.data.targets import TextTarget
from nemolet.errors import DataError
from nemolet.rules import Checked
from nemolet.tokenizers import Tokenizer


class FeatureEntry(NamedTuple):
    """The frames of an utterance, ``[T, C]``, and what is said in it."""

    frames: NDArray[np.float32]
    text: str
    speaker: str


@dataclass(frozen=True)
class FeatureCorpus(Checked):
    """Arrays of features for training a recognizer (final).

    Args:
        path: a manifest of JSON lines with ``utt`` (the name of an array), ``text`` and ``speaker``.
        arrays: a ``.npz`` file with an array ``[T, C]`` for each utterance.
        valid_speakers: how many speakers, the last in the manifest, are set aside for validation.
        frame: seconds from one frame to the next.
        batch_seconds: most seconds in a batch of one rank, padding included.
        batch_size: most utterances in it.
        seed: of the order; None for 0, or for the seed of a run.

    Raises:
        DataError: for an entry without its array, naming file and line.
    """

    path: str
    arrays: str
    valid_speakers: int = 1
    frame: float = 0.01
    batch_seconds: float = 120.0
    batch_size: int = 32
    seed: int | None = None

    __buildable__ = True
    FREE = ("path", "arrays")
    CONFIG_RULES = (
        ("valid_speakers >= 1", "valid_speakers is at least 1"),
        ("frame > 0 and batch_seconds > 0 and batch_size >= 1", "frame and batch_seconds are above 0, batch_size too"),
    )

    @property
    def typical(self) -> dict[str, int]:
        """Sizes of a batch of utterances of three seconds."""
        return {"B": self.batch_size, "T": int(3.0 / self.frame), "C": 1, "U": 30}

    def prepare(
        self, tokenizer: TokenizerSpec | Tokenizer | None = None, *, progress: Progress | None = None
    ) -> PreparedFeatures:
        """Read everything, and set speakers aside."""
        entries = self._entries()
        speakers = list(dict.fromkeys(entry.speaker for entry in entries))
        if len(speakers) <= self.valid_speakers:
            raise DataError(
                "no speaker is left for training",
                where="data.valid_speakers",
                expected=f"below {len(speakers)}",
                found=self.valid_speakers,
            )
        aside = set(speakers[-self.valid_speakers :])
        if tokenizer is None:
            raise DataError("texts need a tokenizer", where="tokenizer", fix="choose tokenizer=char")
        chosen = (
            tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.make_of_texts(entry.text for entry in entries)
        )
        train = tuple(entry for entry in entries if entry.speaker not in aside)
        return PreparedFeatures(self, chosen, train, tuple(entry for entry in entries if entry.speaker in aside))

    def _entries(self) -> list[FeatureEntry]:
        for name, place in (("path", self.path), ("arrays", self.arrays)):
            if not Path(place).is_file():
                raise DataError("there is no such file", where=f"data.{name}", found=place)
        entries = []
        with np.load(self.arrays, allow_pickle=False) as arrays:
            for number, line in enumerate(Path(self.path).read_text(encoding="utf-8").splitlines(), 1):
                where = f"{self.path}:{number}"
                try:
                    fields = json.loads(line)
                    name, text = str(fields["utt"]), str(fields["text"])
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        "the entry lacks something", where=where, expected="utt and text", found=str(error)
                    ) from error
                if name not in arrays:
                    raise DataError("there is no array of this name", where=where, found=name)
                frames = np.asarray(arrays[name], np.float32)
                if frames.ndim != 2 or not len(frames) or not np.isfinite(frames).all():
                    raise DataError("these are no features", where=where, expected="finite [T, C]", found=frames.shape)
                entries.append(FeatureEntry(frames, text, str(fields.get("speaker", ""))))
        return entries


@dataclass(frozen=True)
class PreparedFeatures:
    """Features that are ready to be learned from."""

    corpus: FeatureCorpus
    tokenizer: Tokenizer
    train: tuple[FeatureEntry, ...]
    valid: tuple[FeatureEntry, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The entries of a batch."""
        return ("spectrogram", "lengths", "labels")

    @property
    def unit(self) -> Unit:
        """Progress is counted in seconds, padding included."""
        return Unit("seconds", self.train[0].frames.shape[1] / self.corpus.frame)

    @property
    def sizes(self) -> dict[str, int]:
        """What a model has to know."""
        return {"vocab_size": self.tokenizer.vocab_size}

    @property
    def summary(self) -> str:
        """For a card."""
        return f"{self.corpus.path} ({len(self.train):,} utterances; {len(self.valid):,} for validation)"

    @property
    def identity(self) -> dict[str, Any]:
        """Settings, and what is said how long, from the least to the largest number."""
        parts = {"train": self.train, "valid": self.valid}
        digests = {
            name: digest([(e.text, e.frames.shape, float(e.frames.min()), float(e.frames.max())) for e in entries])
            for name, entries in parts.items()
        }
        return {**lasting(self.corpus), **digests}

    def derived(self, valid_loss: float) -> dict[str, float]:
        """A loss of features has no other names."""
        return {}

    def train_loader(self, *, rank: int = 0, ranks: int = 1) -> AudioLoader:
        """Batches without end."""
        return AudioLoader(self._batcher(self.train), self._plan(self.train), rank=rank, ranks=ranks)

    def valid_loader(self, *, rank: int = 0, ranks: int = 1, max_batches: int | None = None) -> AudioValidationLoader:
        """Every utterance for validation once."""
        plan = replace(self._plan(self.valid), shuffle=False)
        return AudioValidationLoader(self._batcher(self.valid), plan, rank=rank, ranks=ranks, max_batches=max_batches)

    def _batcher(self, entries: Sequence[FeatureEntry]) -> FeatureBatcher:
        return FeatureBatcher(entries, self.tokenizer)

    def _plan(self, entries: Sequence[FeatureEntry]) -> BatchPlan:
        seconds = np.array([len(entry.frames) * self.corpus.frame for entry in entries])
        return BatchPlan(
            seconds,
            batch_seconds=self.corpus.batch_seconds,
            batch_size=self.corpus.batch_size,
            seed=self.corpus.seed or 0,
        )


class FeatureBatcher:
    """Makes tensors of rows: features with their lengths, and what is to be written (final).

    Shape: ``spectrogram [B, T, C]``, ``lengths [B]`` and ``labels [B, U]``.
    """

    def __init__(self, entries: Sequence[FeatureEntry], tokenizer: Tokenizer) -> None:
        self.entries = entries
        self.target = TextTarget([entry.text for entry in entries], tokenizer)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """One batch; rows are padded with zeros."""
        arrays = [self.entries[row.utterances[0]].frames for row in rows]
        lengths = [len(array) for array in arrays]
        spectrogram_BTC = torch.zeros(len(arrays), max(lengths), arrays[0].shape[1])
        for index, array in enumerate(arrays):
            spectrogram_BTC[index, : len(array)] = torch.from_numpy(array)
        return {
            "spectrogram": spectrogram_BTC,
            "lengths": torch.tensor(lengths),
            "labels": self.target.labels(rows, lengths),
        }
