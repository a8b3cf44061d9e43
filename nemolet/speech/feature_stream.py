"""Features of audio that is still arriving."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemolet.errors import ShapeError
from nemolet.speech.features import FrameFeatures


class FeatureStream:
    """Features of audio that arrives in chunks, equal to those of the whole (final).

    Args:
        features: computes them; in evaluation, since noise would differ.
        batch: rows of the chunks.

    Example:
        >>> from nemolet.speech.features import LogMel
        >>> features, audio = LogMel(sample_rate=16000).eval(), torch.randn(1, 1600)
        >>> stream = FeatureStream(features)
        >>> parts = [stream.push(audio[:, :700]), stream.push(audio[:, 700:]), stream.flush()]
        >>> whole = features(audio, torch.tensor([1600])).spectrogram
        >>> torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
        True
    """

    def __init__(self, features: FrameFeatures, *, batch: int = 1) -> None:
        if features.training and features.dither:
            raise ShapeError("features in training add noise", where=features.label, fix="call features.eval() first")
        self.features, self.samples, self.frames = features, 0, 0
        self.held_BN = torch.zeros(batch, features.framing.lead)
        self.before_B1 = torch.zeros(batch, 1)

    def push(self, audio_BN: Tensor) -> Tensor:
        """Take samples of all rows; returns the frames that are now complete, ``B T C`` with T from 0."""
        if not audio_BN.shape[1]:
            return self._complete(self.held_BN, 0)
        self.samples += audio_BN.shape[1]
        signal_BN = torch.cat((self.before_B1.to(audio_BN.device), audio_BN.float()), 1)
        self.before_B1 = signal_BN[:, -1:]
        signal_BN = self.features.emphasised(signal_BN)
        self.held_BN = torch.cat((self.held_BN.to(signal_BN), signal_BN), 1)
        framing = self.features.framing
        ready = max(0, (self.held_BN.shape[1] - framing.window) // framing.hop + 1)
        counted = framing.count(self.samples) - self.frames  # no frame the whole would not have
        return self._complete(self.held_BN, min(ready, counted))

    def flush(self) -> Tensor:
        """The frames that reach over the end, which is filled with zeros."""
        framing = self.features.framing
        left = max(0, framing.count(self.samples) - self.frames)
        return self._complete(F.pad(self.held_BN, (0, max(0, framing.span(left) - self.held_BN.shape[1]))), left)

    def _complete(self, signal_BN: Tensor, frames: int) -> Tensor:
        framing = self.features.framing
        if not frames:
            return signal_BN.new_zeros(len(signal_BN), 0, self.features.width)
        cut_BTN = signal_BN[:, : framing.span(frames)].unfold(1, framing.window, framing.hop)
        self.frames, self.held_BN = self.frames + frames, signal_BN[:, frames * framing.hop :]
        return self.features.of_frames(cut_BTN)
