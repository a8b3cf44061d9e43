"""What is to be predicted of an utterance: its text, its class, or where somebody speaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nemolet.data.buckets import Row
from nemolet.data.manifest import Spans
from nemolet.tokenizers import Tokenizer
from nemolet.types import IGNORED


class Target(Protocol):
    """Makes labels of the rows of a batch."""

    def labels(self, rows: Sequence[Row], audio_lengths: Sequence[int]) -> Tensor:
        """The labels; whatever is padding is -100."""


class TextTarget:
    """The tokens of what is said, ``[B, U]``; texts of joined utterances are joined by a space (final).

    Args:
        texts: of each utterance.
        tokenizer: turns them into ids.

    Example:
        >>> from nemolet.tokenizers import CharTokenizer
        >>> target = TextTarget(["ab", "b"], CharTokenizer(["a", "b"]))
        >>> target.labels([Row((0,)), Row((1,))], [9, 9]).tolist()
        [[0, 1], [1, -100]]
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        self.texts, self.tokenizer = texts, tokenizer

    def labels(self, rows: Sequence[Row], audio_lengths: Sequence[int]) -> Tensor:
        """Ids of each row, followed by -100."""
        ids = [self.tokenizer.encode(" ".join(self.texts[number] for number in row.utterances)) for row in rows]
        labels_BU = torch.full((len(ids), max(1, *map(len, ids))), IGNORED)
        for index, tokens in enumerate(ids):
            labels_BU[index, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        return labels_BU


class ClassTarget:
    """The class of an utterance, ``[B]``; that of the first where several are joined (final).

    Args:
        names: of each utterance.
        classes: number of each name.
    """

    def __init__(self, names: Sequence[str], classes: Mapping[str, int]) -> None:
        self.ids = [classes[name] for name in names]

    def labels(self, rows: Sequence[Row], audio_lengths: Sequence[int]) -> Tensor:
        """One number for each row."""
        return torch.tensor([self.ids[row.utterances[0]] for row in rows])


class SpeechTarget:
    """Whether somebody speaks, frame by frame, ``[B, T]`` with one frame for each whole hop (final).

    A frame is speech where its time, a multiple of the hop, lies in a segment.

    Args:
        spans: seconds of speech of each utterance, counted from its own start.
        seconds: length of each utterance.
        sample_rate: of the audio in a batch.
        hop: samples from one frame to the next.

    Example:
        >>> target = SpeechTarget([((0.1, 0.3),)], [0.5], sample_rate=1000, hop=100)
        >>> target.labels([Row((0,))], [500]).tolist()
        [[0, 1, 1, 0, 0]]
    """

    def __init__(self, spans: Sequence[Spans], seconds: Sequence[float], *, sample_rate: int, hop: int) -> None:
        self.spans, self.seconds, self.sample_rate, self.hop = spans, seconds, sample_rate, hop

    def labels(self, rows: Sequence[Row], audio_lengths: Sequence[int]) -> Tensor:
        """Zeros and ones for each row, followed by -100."""
        counts = [length // self.hop for length in audio_lengths]
        labels_BT = torch.full((len(rows), max(1, *counts)), IGNORED)
        for index, (row, count) in enumerate(zip(rows, counts)):
            labels_BT[index, :count] = 0
            begin = 0.0
            for number, pause in zip(row.utterances, (*row.pauses, 0.0)):
                for start, end in self.spans[number]:
                    first, last = (-(-round((begin + at) * self.sample_rate) // self.hop) for at in (start, end))
                    labels_BT[index, first : min(last, count)] = 1
                begin += self.seconds[number] + pause
        return labels_BT
