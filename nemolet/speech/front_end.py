"""From a waveform to what an encoder reads: features, their normalisation, and augmentation in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.speech.features import Features, FrameFeatures, masked
from nemolet.types import AudioBN, AudioLengthsB, LengthsB, SpectrogramBTC


class Normalize(NeuralModule):
    """Bring features to mean 0 and standard deviation 1 (final).

    Padding counts for nothing and stays 0.

    Args:
        over: ``"feature"`` takes the statistics of each feature over an utterance, as NeMo's ``per_feature``;
            ``"utterance"`` one mean and deviation for all features of an utterance; ``"fixed"`` the given ones,
            which also serve audio that is still arriving.
        mean: of each feature, or one number; for ``"fixed"``.
        std: of each feature, or one number; for ``"fixed"``.
        guard: added to a standard deviation.

    Shape: ``B T C``, lengths_B -> ``B T C``

    Example:
        >>> out = Normalize()(torch.randn(1, 50, 4) * 3 + 2, torch.tensor([50]))
        >>> out.mean().abs() < 1e-5, out.std(1).mean().sub(1).abs() < 1e-4
        (tensor(True), tensor(True))
    """

    def __init__(
        self,
        *,
        over: Literal["feature", "utterance", "fixed"] = "feature",
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        guard: float = 1e-5,
    ) -> None:
        super().__init__()
        if (over == "fixed") != (mean is not None and std is not None):
            raise ShapeError(
                "the statistics are missing" if over == "fixed" else "the statistics would not be used",
                where="Normalize.mean, Normalize.std",
                expected="both with over=fixed, none otherwise",
                found=f"over={over}, mean={mean}, std={std}",
                fix="see nemolet.speech.front_end.statistics",
            )
        self.over, self.guard = over, guard
        self.mean: Tensor | None
        self.std: Tensor | None
        self.register_buffer("mean", None if mean is None else torch.tensor(mean), persistent=False)
        self.register_buffer("std", None if std is None else torch.tensor(std), persistent=False)

    def forward(self, spectrogram: SpectrogramBTC, lengths: LengthsB) -> SpectrogramBTC:
        if self.mean is not None and self.std is not None:
            return masked((spectrogram - self.mean) / (self.std + self.guard), lengths)
        axes = (1,) if self.over == "feature" else (1, 2)
        terms_B11 = lengths[:, None, None].to(spectrogram.dtype)
        if self.over == "utterance":
            terms_B11 = terms_B11 * spectrogram.shape[2]
        valid_BT1 = (torch.arange(spectrogram.shape[1], device=lengths.device) < lengths[:, None])[..., None]
        spectrogram = torch.where(valid_BT1, spectrogram, 0.0)
        mean = spectrogram.sum(axes, keepdim=True) / terms_B11.clamp_min(1)
        centred = (spectrogram - mean) * valid_BT1
        variance = centred.square().sum(axes, keepdim=True) / (terms_B11 - 1).clamp_min(1)
        return centred / (variance.clamp_min(1e-20).sqrt() + self.guard)


def statistics(spectrogram_BTC: Tensor, lengths_B: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each feature over all valid frames, for ``Normalize(over="fixed")``.

    Example:
        >>> mean, std = statistics(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([2]))
        >>> mean, std
        ([2.0], [1.0])
    """
    valid = torch.arange(spectrogram_BTC.shape[1], device=lengths_B.device) < lengths_B[:, None]
    frames = spectrogram_BTC[valid]
    return frames.mean(0).tolist(), frames.std(0, correction=0).tolist()


def levelled(audio_BN: Tensor, lengths_B: Tensor, level: float) -> Tensor:
    """Each row as loud as ``level`` in decibels of full scale, padding apart; silence stays silent.

    Example:
        >>> levelled(torch.tensor([[0.5, -0.5, 9.0]]), torch.tensor([2]), -20.0)
        tensor([[ 0.1000, -0.1000,  0.0000]])
    """
    audio_BN = masked(audio_BN, lengths_B)
    power_B1 = audio_BN.square().sum(1, keepdim=True) / lengths_B.clamp_min(1)[:, None]
    return audio_BN * (10 ** (level / 20) / power_B1.sqrt().clamp_min(1e-6))


class FrontEnd(NeuralModule):
    """Features, normalised; in training also augmented (final).

    Args:
        features: from audio to a spectrogram.
        normalize: of the spectrogram; None for none.
        level: decibels below full scale to which each recording is brought first, as the root of its mean square;
            so quiet speakers are not nearer to the features' floor than loud ones. None leaves audio as it is.
        audio_augment: what happens to audio in training, in order.
        augment: what happens to the spectrogram in training, in order.

    Shape: audio_BN, lengths_B -> ``B T C``, lengths_B

    Example:
        >>> from nemolet.speech.features import LogMel
        >>> front_end = FrontEnd(features=LogMel(sample_rate=8000, bins=40), normalize=Normalize())
        >>> front_end(torch.randn(1, 8000), torch.tensor([8000])).spectrogram.shape
        torch.Size([1, 100, 40])
    """

    def __init__(
        self,
        *,
        features: FrameFeatures,
        normalize: Normalize | None = None,
        level: float | None = None,
        audio_augment: Sequence[NeuralModule] = (),
        augment: Sequence[NeuralModule] = (),
    ) -> None:
        super().__init__(**features.bindings)
        self.features, self.normalize, self.level = features, normalize, level
        self.audio_augment, self.augment = nn.ModuleList(audio_augment), nn.ModuleList(augment)

    @property
    def needs_whole(self) -> bool:
        """Whether features depend on how a recording ends, so that they cannot be computed while it arrives."""
        fixed = self.normalize is None or self.normalize.over == "fixed"
        return self.level is not None or self.features.needs_whole or not fixed

    def forward(self, audio: AudioBN, audio_lengths: AudioLengthsB) -> Features:
        if self.level is not None:
            audio = levelled(audio, audio_lengths, self.level)
        if self.training:
            for change in self.audio_augment:
                audio, audio_lengths = change(audio, audio_lengths)
        spectrogram_BTC, lengths_B = self.features(audio, audio_lengths)
        if self.normalize is not None:
            spectrogram_BTC = self.normalize(spectrogram_BTC, lengths_B)
        if self.training:
            for change in self.augment:
                spectrogram_BTC = change(spectrogram_BTC, lengths_B)
        return Features(spectrogram_BTC, lengths_B)
