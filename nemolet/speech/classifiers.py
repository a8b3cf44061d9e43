"""Classifiers of audio: words, speakers, and speech against everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.nn.embedding import Head
from nemolet.nn.linear import Linear
from nemolet.speech.encoder import SpeechEncoder
from nemolet.speech.front_end import FrontEnd
from nemolet.speech.pooling import AttentivePooling, MeanPooling
from nemolet.types import AudioBN, AudioLengthsB, EmbeddingBD, LengthsB, LogitsBTV, LogitsBV


class SpeakerScores(NamedTuple):
    """Cosines with the speakers of training, and the vector of the utterance."""

    logits: LogitsBV
    embedding: EmbeddingBD


class SpeechScores(NamedTuple):
    """For each frame the scores of silence and of speech."""

    logits: LogitsBTV
    lengths: LengthsB


class AudioClassifier(NeuralModule):
    """The class of an utterance (final).

    Args:
        front_end: from audio to features.
        encoder: from features to hidden states.
        classes: how many; in a config they come from the data.
        names: of the classes, in the order of their numbers; kept in archives.
        attentive: whether frames are weighed by what they say, instead of their mean.
        dropout: before the scores, in training.

    Shape: audio_BN, lengths_B -> logits_BV.

    Example:
        >>> import torch
        >>> from nemolet.speech.convolutional import ConvEncoder
        >>> from nemolet.speech.features import LogMel
        >>> model = AudioClassifier(
        ...     front_end=FrontEnd(features=LogMel(sample_rate=8000, bins=8)),
        ...     encoder=ConvEncoder(bins=8, width=8, kernels=[3]), classes=3)
        >>> model(torch.randn(2, 800), torch.tensor([800, 400])).shape
        torch.Size([2, 3])
    """

    CONFIG_RULES: ClassVar = (("classes >= 1", "classes is at least 1; null takes it from the data"),)

    def __init__(
        self,
        *,
        front_end: FrontEnd,
        encoder: SpeechEncoder,
        classes: int,
        names: Sequence[str] | None = None,
        attentive: bool = True,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(V=classes, sample_rate=front_end.features.sample_rate)
        _check_bins(front_end, encoder)
        if names is not None and len(names) != classes:
            raise ShapeError(
                "the names do not fit the classes",
                where="AudioClassifier.names",
                expected=f"{classes} names, sorted",
                found=len(names),
                fix="name every class, or leave names away",
            )
        self.front_end, self.encoder, self.dropout = front_end, encoder, dropout
        self.names = tuple(names or map(str, range(classes)))
        self.pooling = AttentivePooling(encoder.width) if attentive else MeanPooling(encoder.width)
        self.head = Linear("D", "V", self.pooling.out_width, classes, bias=True)

    def forward(self, audio: AudioBN, audio_lengths: AudioLengthsB) -> LogitsBV:
        hidden_BTD, lengths_B = self.encoder(*self.front_end(audio, audio_lengths))
        pooled_BD = self.pooling(hidden_BTD, lengths_B)
        return self.head(F.dropout(pooled_BD, self.dropout, self.training))  # type: ignore[no-any-return]

    @property
    def sample_rate(self) -> int:
        """Of the audio it reads, in hertz."""
        return self.front_end.features.sample_rate


class SpeakerVerifier(NeuralModule):
    """A vector for each utterance; those of one speaker are alike (final).

    Trained to tell the speakers of the training data apart, it is used on other ones: the cosine of two vectors says
    whether one person speaks.

    Args:
        front_end: from audio to features.
        encoder: from features to hidden states.
        classes: speakers of the training data; in a config they come from there.
        embedding: D of the vector.

    Shape: audio_BN, lengths_B -> cosines ``B V``, vectors ``B D``.
    """

    def __init__(self, *, front_end: FrontEnd, encoder: SpeechEncoder, classes: int, embedding: int = 192) -> None:
        super().__init__(V=classes, D=embedding, sample_rate=front_end.features.sample_rate)
        _check_bins(front_end, encoder)
        self.front_end, self.encoder = front_end, encoder
        self.pooling = AttentivePooling(encoder.width)
        self.embed = Linear("D", "D", self.pooling.out_width, embedding, bias=True)
        self.speakers = Head("D", "V", embedding, classes, init_std=embedding**-0.5)

    def forward(self, audio: AudioBN, audio_lengths: AudioLengthsB) -> SpeakerScores:
        vector_BD = self.vectors(audio, audio_lengths)
        cosine_BV = F.linear(vector_BD, F.normalize(self.speakers.weight, dim=-1))
        return SpeakerScores(cosine_BV, vector_BD)

    def vectors(self, audio_BN: Tensor, lengths_B: Tensor) -> Tensor:
        """Vectors of length 1, ``[B, D]``."""
        hidden_BTD, frames_B = self.encoder(*self.front_end(audio_BN, lengths_B))
        return F.normalize(self.embed(self.pooling(hidden_BTD, frames_B)), dim=-1)


class SpeechDetector(NeuralModule):
    """Whether somebody speaks, frame by frame (final).

    Args:
        front_end: from audio to features.
        encoder: from features to hidden states.

    Shape: audio_BN, lengths_B -> logits ``B T V=2``, lengths_B; T counts frames of the encoder.
    """

    def __init__(self, *, front_end: FrontEnd, encoder: SpeechEncoder) -> None:
        super().__init__(V=2, sample_rate=front_end.features.sample_rate)
        _check_bins(front_end, encoder)
        self.front_end, self.encoder = front_end, encoder
        self.head = Head("D", "V", encoder.width, 2)

    def forward(self, audio: AudioBN, audio_lengths: AudioLengthsB) -> SpeechScores:
        hidden_BTD, lengths_B = self.encoder(*self.front_end(audio, audio_lengths))
        return SpeechScores(self.head(hidden_BTD), lengths_B)

    @property
    def seconds_per_frame(self) -> float:
        """Seconds from one frame to the next."""
        features = self.front_end.features
        return features.framing.hop * self.encoder.factor / features.sample_rate


def _check_bins(front_end: FrontEnd, encoder: SpeechEncoder) -> None:
    if front_end.features.width != encoder.bins:
        raise ShapeError(
            "the encoder reads other features",
            where="encoder.bins",
            expected=front_end.features.width,
            found=encoder.bins,
            fix=f"set encoder.bins={front_end.features.width}",
        )
