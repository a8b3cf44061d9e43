"""Recognizers of speech: a front end, an encoder, and one or two ways to write labels."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from nemolet.data.ports import LabelsBU
from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.nn.embedding import Head
from nemolet.speech.decoding import Hypothesis, greedy_ctc, greedy_transducer
from nemolet.speech.encoder import Encoded, SpeechEncoder
from nemolet.speech.front_end import FrontEnd
from nemolet.speech.guards import refuse_misfits
from nemolet.speech.prediction import TransducerDecoder
from nemolet.types import AudioBN, AudioLengthsB, LengthsB, LogitsBTSV, LogitsBTV


class FrameScores(NamedTuple):
    """Scores of labels at each frame; the last is that of the blank."""

    logits: LogitsBTV
    lengths: LengthsB


class LatticeScores(NamedTuple):
    """Scores of labels at each frame after each number of labels; the last is that of the blank."""

    logits: LogitsBTSV
    lengths: LengthsB


class HybridScores(NamedTuple):
    """Scores of a transducer and of CTC on the same frames."""

    logits: LogitsBTSV
    frame_logits: LogitsBTV
    lengths: LengthsB


class Recognizer(NeuralModule):
    """From audio to text (abstract: :class:`CTCRecognizer` and others).

    Args:
        front_end: from audio to features.
        encoder: from features to hidden states.
        vocab_size: labels, without the blank.
        columns: scores of a frame.
    """

    CONFIG_RULES: ClassVar[tuple[tuple[str, str], ...]] = (
        ("vocab_size >= 1", "vocab_size is at least 1; null takes it from the tokenizer"),
    )

    def __init__(self, *, front_end: FrontEnd, encoder: SpeechEncoder, vocab_size: int, columns: int) -> None:
        super().__init__(V=columns, sample_rate=front_end.features.sample_rate)
        if front_end.features.width != encoder.bins:
            raise ShapeError(
                "the encoder reads other features",
                where="encoder.bins",
                expected=front_end.features.width,
                found=encoder.bins,
                fix=f"set encoder.bins={front_end.features.width}",
            )
        self.front_end, self.encoder, self.vocab_size = front_end, encoder, vocab_size

    @property
    def sample_rate(self) -> int:
        """Of the audio it reads, in hertz."""
        return self.front_end.features.sample_rate

    @property
    def samples_per_frame(self) -> int:
        """Samples from one frame of scores to the next."""
        return self.front_end.features.framing.hop * self.encoder.factor

    def encode(self, audio_BN: Tensor, lengths_B: Tensor) -> Encoded:
        """Hidden states of audio."""
        spectrogram, frames = self.front_end(audio_BN, lengths_B)
        encoded: Encoded = self.encoder(spectrogram, frames)
        return encoded

    @abc.abstractmethod
    def greedy(self, encoded: Encoded) -> list[Hypothesis]:
        """The most likely label at each frame, one hypothesis for each row."""


class CTCRecognizer(Recognizer):
    """A recognizer that scores each frame by itself (Graves et al., 2006; final).

    Args:
        front_end: from audio to features.
        encoder: from features to hidden states.
        vocab_size: labels, without the blank; in a config it comes from the tokenizer.
        bias: whether each label has a bias.

    Shape: audio_BN, lengths_B -> logits_BTV with V = vocab_size + 1, lengths_B.

    Example:
        >>> import torch
        >>> from nemolet.speech.conformer import ConformerEncoder
        >>> from nemolet.speech.features import LogMel
        >>> encoder = ConformerEncoder(bins=8, layers=1, width=8, heads=2, kernel=3)
        >>> model = CTCRecognizer(
        ...     front_end=FrontEnd(features=LogMel(sample_rate=8000, bins=8)), encoder=encoder, vocab_size=5)
        >>> model(torch.randn(1, 8000), torch.tensor([8000])).logits.shape
        torch.Size([1, 25, 6])
    """

    def __init__(self, *, front_end: FrontEnd, encoder: SpeechEncoder, vocab_size: int, bias: bool = False) -> None:
        super().__init__(front_end=front_end, encoder=encoder, vocab_size=vocab_size, columns=vocab_size + 1)
        self.head = Head("D", "V", encoder.width, vocab_size + 1, bias=bias)

    def forward(self, audio: AudioBN, audio_lengths: AudioLengthsB) -> FrameScores:
        hidden_BTD, lengths_B = self.encode(audio, audio_lengths)
        return FrameScores(self.head(hidden_BTD), lengths_B)

    def check_data(self, data: Any) -> None:
        """Refuse utterances with more labels than frames, before training."""
        refuse_misfits(self, data)

    def frame_logits(self, hidden_BTD: Tensor) -> Tensor:
        """Scores of each frame."""
        logits: Tensor = self.head(hidden_BTD)
        return logits

    def greedy(self, encoded: Encoded) -> list[Hypothesis]:
        """The most likely label at each frame, repetitions and blanks removed."""
        return greedy_ctc(self.frame_logits(encoded.hidden), encoded.lengths)


class TransducerRecognizer(Recognizer):
    """A recognizer whose next label depends on the last ones: RNN-T, or TDT with durations (final).

    Args:
        front_end: from audio to features.
        encoder: from features to hidden states.
        vocab_size: labels, without the blank; in a config it comes from the tokenizer.
        joint: width of the prediction network and the joint.
        context: labels that the prediction network sees.
        durations: for TDT the numbers of frames an arc may skip, as in its loss; None for RNN-T.
        max_symbols: most labels written at one frame when decoding.
        dropout: of the prediction network, in training.
        label_dropout: probability that it does not see a label, in training; against lost repetitions.

    Shape: audio_BN, lengths_B, labels_BU -> logits_BTSV, lengths_B.
    """

    decode_by_ctc: ClassVar[bool] = False

    def __init__(
        self,
        *,
        front_end: FrontEnd,
        encoder: SpeechEncoder,
        vocab_size: int,
        joint: int = 256,
        context: int = 2,
        durations: Sequence[int] | None = None,
        max_symbols: int = 10,
        dropout: float = 0.1,
        label_dropout: float = 0.0,
    ) -> None:
        columns = vocab_size + 1 + len(durations or ())
        super().__init__(front_end=front_end, encoder=encoder, vocab_size=vocab_size, columns=columns)
        self.durations, self.max_symbols = None if durations is None else tuple(durations), max_symbols
        self.decoder = TransducerDecoder(
            width=encoder.width,
            vocab_size=vocab_size,
            hidden=joint,
            context=context,
            durations=len(durations or ()),
            dropout=dropout,
            label_dropout=label_dropout,
        )

    def forward(self, audio: AudioBN, audio_lengths: AudioLengthsB, labels: LabelsBU) -> LatticeScores:
        hidden_BTD, lengths_B = self.encode(audio, audio_lengths)
        return LatticeScores(self.decoder(hidden_BTD, labels), lengths_B)

    def greedy(self, encoded: Encoded) -> list[Hypothesis]:
        """The most likely label at each state, all rows at once."""
        return greedy_transducer(
            self.decoder, encoded.hidden, encoded.lengths, durations=self.durations, max_symbols=self.max_symbols
        )


class HybridRecognizer(Recognizer):
    """A transducer and CTC on one encoder, trained together (final). CTC steadies training; either may decode.

    Args:
        front_end: from audio to features.
        encoder: from features to hidden states.
        vocab_size: labels, without the blank; in a config it comes from the tokenizer.
        joint: width of the prediction network and the joint.
        context: labels that the prediction network sees.
        max_symbols: most labels written at one frame when decoding.
        dropout: of the prediction network, in training.
        decode_by_ctc: whether decoding uses CTC's scores, which is faster, instead of the transducer's.

    Shape: audio_BN, lengths_B, labels_BU -> logits_BTSV, frame_logits_BTV, lengths_B.
    """

    def __init__(
        self,
        *,
        front_end: FrontEnd,
        encoder: SpeechEncoder,
        vocab_size: int,
        joint: int = 256,
        context: int = 2,
        max_symbols: int = 10,
        dropout: float = 0.1,
        decode_by_ctc: bool = False,
    ) -> None:
        super().__init__(front_end=front_end, encoder=encoder, vocab_size=vocab_size, columns=vocab_size + 1)
        self.max_symbols, self.decode_by_ctc = max_symbols, decode_by_ctc
        self.head = Head("D", "V", encoder.width, vocab_size + 1)
        self.decoder = TransducerDecoder(
            width=encoder.width, vocab_size=vocab_size, hidden=joint, context=context, dropout=dropout
        )

    def forward(self, audio: AudioBN, audio_lengths: AudioLengthsB, labels: LabelsBU) -> HybridScores:
        hidden_BTD, lengths_B = self.encode(audio, audio_lengths)
        return HybridScores(self.decoder(hidden_BTD, labels), self.head(hidden_BTD), lengths_B)

    def check_data(self, data: Any) -> None:
        """Refuse utterances with more labels than frames, before training."""
        refuse_misfits(self, data)

    def frame_logits(self, hidden_BTD: Tensor) -> Tensor:
        """CTC's scores of each frame."""
        logits: Tensor = self.head(hidden_BTD)
        return logits

    def greedy(self, encoded: Encoded) -> list[Hypothesis]:
        """By the transducer, or by CTC where that is chosen."""
        if self.decode_by_ctc:
            return greedy_ctc(self.frame_logits(encoded.hidden), encoded.lengths)
        return greedy_transducer(self.decoder, encoded.hidden, encoded.lengths, max_symbols=self.max_symbols)
