"""What every encoder of speech is: features in, fewer and wider frames out."""

from __future__ import annotations

import abc
from typing import NamedTuple

from nemolet.module import NeuralModule
from nemolet.speech.features import Samples
from nemolet.types import LengthsB, MemoryBSD, SpectrogramBTC


class Encoded(NamedTuple):
    """Hidden states, mostly over fewer frames than went in, and how many of each row are valid."""

    hidden: MemoryBSD
    lengths: LengthsB


class SpeechEncoder(NeuralModule):
    """From features to hidden states (abstract; :class:`ConformerEncoder` and others).

    Args:
        bins: C, features of a frame.
        width: D, size of a hidden state.
        factor: frames of features for one hidden state; T becomes T / factor, rounded up.

    Shape: ``B T C``, lengths_B -> ``B S D``, lengths_B
    """

    def __init__(self, *, bins: int, width: int, factor: int) -> None:
        super().__init__(C=bins, D=width)
        self.bins, self.width, self.factor = bins, width, factor

    @abc.abstractmethod
    def forward(self, spectrogram: SpectrogramBTC, lengths: LengthsB) -> Encoded: ...

    def frames(self, count: Samples) -> Samples:
        """Hidden states of so many frames: of a number, or of each of a tensor."""
        return -(-count // self.factor)
