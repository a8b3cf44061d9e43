"""Changes of audio and spectrograms in training; in evaluation nothing is changed.

Random choices are made row by row with torch's generator, so a seed decides them, and a checkpoint carries them.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemolet.data.audio import load_audio
from nemolet.data.manifest import Problem, read_audio
from nemolet.errors import DataError, ShapeError
from nemolet.module import NeuralModule
from nemolet.speech.features import masked
from nemolet.speech.time_scale import resampled, stretched
from nemolet.types import AudioBN, AudioLengthsB, LengthsB, SpectrogramBTC


class Waveforms(NamedTuple):
    """Audio and how many samples of each row are valid."""

    audio: AudioBN
    audio_lengths: AudioLengthsB


class AudioAugment(NeuralModule):
    """A random change of audio (abstract: what follows below).

    Args:
        probability: share of the rows that are changed.

    Shape: audio_BN, lengths_B -> audio_BN, lengths_B, where N may change; beyond its length a row is zero.
    """

    def __init__(self, *, probability: float = 1.0) -> None:
        super().__init__()
        if not 0.0 <= probability <= 1.0:
            raise ShapeError("this is no probability", where=f"{self.label}.probability", found=probability)
        self.probability = probability

    def forward(self, audio: AudioBN, audio_lengths: AudioLengthsB) -> Waveforms:
        if not self.training:
            return Waveforms(audio, audio_lengths)
        audio_BN = masked(audio, audio_lengths)
        changed = self.change(audio_BN, audio_lengths)
        chosen_B = torch.rand(len(audio_BN), device=audio_BN.device) < self.probability
        size = max(audio_BN.shape[1], changed.audio.shape[1])
        before_BN, after_BN = (F.pad(x, (0, size - x.shape[1])) for x in (audio_BN, changed.audio))
        lengths_B = torch.where(chosen_B, changed.audio_lengths, audio_lengths)
        mixed_BN = masked(torch.where(chosen_B[:, None], after_BN, before_BN), lengths_B)
        return Waveforms(mixed_BN[:, : max(1, int(lengths_B.max()))], lengths_B)

    @abc.abstractmethod
    def change(self, audio_BN: Tensor, lengths_B: Tensor) -> Waveforms:
        """Every row changed; what lies beyond a row's length is ignored."""


class SpeedPerturbation(AudioAugment):
    """Faster or slower audio, pitch included, by one of a few factors (Ko et al., 2015; final).

    Args:
        factors: among which each row chooses; above 1 is faster. Hundredths at most.
        probability: share of the rows that are changed.

    Example:
        >>> faster = SpeedPerturbation(factors=[1.25])
        >>> faster(torch.randn(1, 1000), torch.tensor([1000])).audio_lengths.tolist()
        [800]
    """

    def __init__(self, *, factors: Sequence[float] = (0.9, 1.0, 1.1), probability: float = 1.0) -> None:
        super().__init__(probability=probability)
        self.factors = _checked(factors, f"{self.label}.factors")

    def change(self, audio_BN: Tensor, lengths_B: Tensor) -> Waveforms:
        """Resampled by the factor of each row."""
        return _by_factor(audio_BN, lengths_B, self.factors, _at_speed)


class TempoPerturbation(AudioAugment):
    """Faster or slower audio at the same pitch, by one of a few factors (final).

    Args:
        factors: among which each row chooses; above 1 is faster.
        window: samples in a frame of the phase vocoder; about 0.05 seconds.
        probability: share of the rows that are changed.
    """

    def __init__(
        self, *, factors: Sequence[float] = (0.9, 1.0, 1.1), window: int = 512, probability: float = 1.0
    ) -> None:
        super().__init__(probability=probability)
        self.factors, self.window = _checked(factors, f"{self.label}.factors"), window

    def change(self, audio_BN: Tensor, lengths_B: Tensor) -> Waveforms:
        """Stretched by the factor of each row."""
        return _by_factor(audio_BN, lengths_B, self.factors, functools.partial(_at_tempo, window=self.window))


class Gain(AudioAugment):
    """Louder or softer audio (final).

    Args:
        low: least gain in decibels.
        high: most gain in decibels.
        probability: share of the rows that are changed.
    """

    def __init__(self, *, low: float = -10.0, high: float = 10.0, probability: float = 1.0) -> None:
        super().__init__(probability=probability)
        self.low, self.high = low, high

    def change(self, audio_BN: Tensor, lengths_B: Tensor) -> Waveforms:
        """Multiplied by one factor for each row."""
        return Waveforms(audio_BN * 10 ** (_between(audio_BN, self.low, self.high) / 20), lengths_B)


class Shift(AudioAugment):
    """Audio moved in time; what leaves at one end is lost, and zeros follow at the other (final).

    Labels of single frames do not move with it.

    Args:
        most: samples by which a row is moved at most, to either side.
        probability: share of the rows that are changed.
    """

    def __init__(self, *, most: int, probability: float = 1.0) -> None:
        super().__init__(probability=probability)
        self.most = most

    def change(self, audio_BN: Tensor, lengths_B: Tensor) -> Waveforms:
        """Moved by a number of samples for each row."""
        moved_B1 = torch.randint(-self.most, self.most + 1, (len(audio_BN), 1), device=audio_BN.device)
        source_BN = torch.arange(audio_BN.shape[1], device=audio_BN.device) - moved_B1
        inside_BN = (source_BN >= 0) & (source_BN < lengths_B[:, None])
        return Waveforms(audio_BN.gather(1, source_BN.clamp(0, audio_BN.shape[1] - 1)) * inside_BN, lengths_B)


class WhiteNoise(AudioAugment):
    """White noise of a level below full scale (final).

    Args:
        low: least level in decibels below full scale.
        high: most level.
        probability: share of the rows that are changed.
    """

    def __init__(self, *, low: float = -90.0, high: float = -46.0, probability: float = 1.0) -> None:
        super().__init__(probability=probability)
        self.low, self.high = low, high

    def change(self, audio_BN: Tensor, lengths_B: Tensor) -> Waveforms:
        """Normal noise of one level for each row."""
        level_B1 = 10 ** (_between(audio_BN, self.low, self.high) / 20)
        return Waveforms(audio_BN + level_B1 * torch.randn_like(audio_BN), lengths_B)


class AddNoise(AudioAugment):
    """Recorded noise at a ratio of signal to noise (final). Recordings are read when they are first needed.

    Args:
        path: a manifest or a folder of noises.
        sample_rate: of the audio.
        low: least ratio in decibels.
        high: most ratio.
        probability: share of the rows that are changed.
    """

    def __init__(
        self, *, path: str, sample_rate: int, low: float = 0.0, high: float = 30.0, probability: float = 1.0
    ) -> None:
        super().__init__(probability=probability)
        self.path, self.sample_rate, self.low, self.high = path, sample_rate, low, high

    def change(self, audio_BN: Tensor, lengths_B: Tensor) -> Waveforms:
        """A noise for each row, from a place of it, repeated where it is short, and scaled."""
        bank = _recordings(self.path, self.sample_rate)
        rows = []
        for choice, place in torch.rand(len(audio_BN), 2).tolist():
            noise = bank[int(choice * len(bank))]
            start = int(place * len(noise))
            repeats = -(-(start + audio_BN.shape[1]) // len(noise))
            rows.append(noise.repeat(repeats)[start : start + audio_BN.shape[1]])
        noise_BN = masked(torch.stack(rows).to(audio_BN), lengths_B)
        ratio_B1 = 10 ** (_between(audio_BN, self.low, self.high) / 10)
        power = audio_BN.square().sum(1, keepdim=True) / noise_BN.square().sum(1, keepdim=True).clamp_min(1e-12)
        return Waveforms(audio_BN + noise_BN * (power / ratio_B1).sqrt(), lengths_B)


class RoomImpulse(AudioAugment):
    """Audio as it sounds in a room, by recorded impulse responses (final). They are read when first needed.

    The direct sound stays where it was, and the power of a row too.

    Args:
        path: a manifest or a folder of impulse responses.
        sample_rate: of the audio.
        probability: share of the rows that are changed.
    """

    def __init__(self, *, path: str, sample_rate: int, probability: float = 1.0) -> None:
        super().__init__(probability=probability)
        self.path, self.sample_rate = path, sample_rate

    def change(self, audio_BN: Tensor, lengths_B: Tensor) -> Waveforms:
        """Convolved with one response for each row."""
        bank = _recordings(self.path, self.sample_rate)
        chosen = [bank[int(choice * len(bank))] for choice in torch.rand(len(audio_BN)).tolist()]
        direct_B = torch.tensor([int(response.abs().argmax()) for response in chosen])
        longest = max(map(len, chosen))
        responses_BN = torch.stack([F.pad(r, (0, longest - len(r))) for r in chosen]).to(audio_BN)
        size = audio_BN.shape[1] + longest
        spectrum = torch.fft.rfft(audio_BN, n=size) * torch.fft.rfft(responses_BN, n=size)
        heard_BN = torch.fft.irfft(spectrum, n=size)
        places_BN = torch.arange(audio_BN.shape[1]) + direct_B[:, None]
        heard_BN = masked(heard_BN.gather(1, places_BN.to(audio_BN.device)), lengths_B)
        power = audio_BN.square().sum(1, keepdim=True) / heard_BN.square().sum(1, keepdim=True).clamp_min(1e-12)
        return Waveforms(heard_BN * power.sqrt(), lengths_B)


class SpecAugment(NeuralModule):
    """Hide stretches of time and bands of features (Park et al., 2019; final).

    Args:
        time_masks: how many stretches.
        time_share: longest stretch, as a share of a row's frames.
        feature_masks: how many bands.
        feature_width: widest band.

    Shape: ``B T C``, lengths_B -> ``B T C``; what is hidden is zero, the mean of normalised features.

    Example:
        >>> hidden = SpecAugment()(torch.ones(4, 200, 80), torch.full((4,), 200))
        >>> 0.3 < hidden.mean() < 1.0
        tensor(True)
    """

    def __init__(
        self, *, time_masks: int = 2, time_share: float = 0.05, feature_masks: int = 2, feature_width: int = 27
    ) -> None:
        super().__init__()
        self.time_masks, self.time_share = time_masks, time_share
        self.feature_masks, self.feature_width = feature_masks, feature_width

    def forward(self, spectrogram: SpectrogramBTC, lengths: LengthsB) -> SpectrogramBTC:
        if not self.training:
            return spectrogram
        batch, frames, width = spectrogram.shape
        sizes_B = torch.full_like(lengths, width)
        stretches_BT = _bands(frames, lengths, lengths * self.time_share, self.time_masks)
        bands_BC = _bands(width, sizes_B, torch.full((batch,), min(self.feature_width, width)), self.feature_masks)
        return spectrogram.masked_fill(stretches_BT[:, :, None] | bands_BC[:, None, :], 0.0)


class FrequencyWarp(NeuralModule):
    """Move features along the frequency axis, as a longer or shorter vocal tract does (Jaitly and Hinton, 2013; final).

    Unlike speed it leaves the time alone, so that both together give voices that neither gives.

    Args:
        most: largest change, as a share of the frequency; each row takes one between its negative and it.

    Shape: ``B T C``, lengths_B -> ``B T C``

    Example:
        >>> warped = FrequencyWarp(most=0.1)(torch.ones(2, 9, 8), torch.tensor([9, 9]))
        >>> warped.allclose(torch.ones(2, 9, 8))  # between equal features nothing can be told
        True
    """

    def __init__(self, *, most: float = 0.1) -> None:
        super().__init__()
        if not 0.0 <= most < 0.5:
            raise ShapeError("this is no share", where="FrequencyWarp.most", expected="0 <= value < 0.5", found=most)
        self.most = most

    def forward(self, spectrogram: SpectrogramBTC, lengths: LengthsB) -> SpectrogramBTC:
        if not self.training:
            return spectrogram
        places_C = torch.arange(spectrogram.shape[2], device=spectrogram.device, dtype=spectrogram.dtype)
        factor_B1 = 1 + self.most * (2 * torch.rand(len(spectrogram), 1, device=spectrogram.device) - 1)
        source_BC = (places_C * factor_B1).clamp_max(spectrogram.shape[2] - 1)
        weights_BCC = (1 - (places_C[:, None] - source_BC[:, None, :]).abs()).clamp_min(0)  # between two neighbours
        return spectrogram @ weights_BCC.to(spectrogram.dtype)


class FilterAugment(NeuralModule):
    """Raise and lower bands of features smoothly, as another microphone or room does (Nam et al., 2022; final).

    Args:
        most: largest change at a corner, in units of the features: standard deviations, once they are normalised.
        corners: along the frequency axis, between which the change is linear.

    Shape: ``B T C``, lengths_B -> ``B T C``; the change of a row is the same at all of its frames.

    Example:
        >>> changed = FilterAugment(most=0.5)(torch.zeros(2, 9, 8), torch.tensor([9, 9]))
        >>> changed.abs().max() <= 0.5, torch.equal(changed[:, 0], changed[:, 5])
        (tensor(True), True)
    """

    def __init__(self, *, most: float = 0.5, corners: int = 5) -> None:
        super().__init__()
        if corners < 2 or most < 0:
            raise ShapeError(
                "this is no filter",
                where="FilterAugment.most, FilterAugment.corners",
                expected="most of at least 0, and at least 2 corners",
                found=f"{most}, {corners}",
            )
        self.most, self.corners = most, corners

    def forward(self, spectrogram: SpectrogramBTC, lengths: LengthsB) -> SpectrogramBTC:
        if not self.training:
            return spectrogram
        batch, _, width = spectrogram.shape
        corner_B1X = self.most * (2 * torch.rand(batch, 1, self.corners, device=spectrogram.device) - 1)
        change_B1C = F.interpolate(corner_B1X, size=width, mode="linear", align_corners=True)
        return masked(spectrogram + change_B1C.to(spectrogram.dtype), lengths)


def _bands(size: int, lengths_B: Tensor, widest_B: Tensor, count: int) -> Tensor:
    """Where one of ``count`` bands of random width and place lies, [B, size]."""
    random = torch.rand(2, len(lengths_B), count, 1, device=lengths_B.device)
    width = (random[0] * (widest_B.to(lengths_B.device)[:, None, None] + 1)).floor()
    start = (random[1] * (lengths_B[:, None, None] - width + 1)).floor()
    places = torch.arange(size, device=lengths_B.device)
    return ((places >= start) & (places < start + width)).any(1)


def _between(audio_BN: Tensor, low: float, high: float) -> Tensor:
    """A random number for each row, [B, 1]."""
    return low + (high - low) * torch.rand(len(audio_BN), 1, device=audio_BN.device)


def _checked(factors: Sequence[float], where: str) -> tuple[float, ...]:
    if not factors or not all(0.25 <= factor <= 4.0 for factor in factors):
        raise ShapeError("these are no factors of speed", where=where, expected="0.25 to 4", found=list(factors))
    return tuple(factors)


def _at_speed(audio_BN: Tensor, factor: float) -> Tensor:
    return resampled(audio_BN, 1 / Fraction(factor).limit_denominator(100))


def _at_tempo(audio_BN: Tensor, factor: float, *, window: int) -> Tensor:
    return stretched(audio_BN, factor, window=window) if factor != 1.0 else audio_BN


def _by_factor(
    audio_BN: Tensor, lengths_B: Tensor, factors: Sequence[float], change: Callable[[Tensor, float], Tensor]
) -> Waveforms:
    """Each row by a factor that it chooses; rows of one factor are changed together."""
    choice_B = torch.randint(len(factors), (len(audio_BN),), device=audio_BN.device)
    scale_B = torch.tensor(factors, dtype=torch.float64, device=audio_BN.device)[choice_B]
    new_B = (lengths_B / scale_B).round().long().clamp_min(1)
    changed_BN = audio_BN.new_zeros(len(audio_BN), int(new_B.max()))
    for index, factor in enumerate(factors):
        rows = (choice_B == index).nonzero()[:, 0]
        if len(rows):
            part = change(audio_BN[rows], factor)[:, : changed_BN.shape[1]]
            changed_BN[rows, : part.shape[1]] = part
    return Waveforms(changed_BN, new_B)


@functools.lru_cache(maxsize=8)
def _recordings(path: str, sample_rate: int) -> tuple[Tensor, ...]:
    """All recordings of a path, decoded."""
    entries = read_audio(path)
    bad = next((entry for entry in entries if isinstance(entry, Problem)), None)
    if bad is not None:
        raise DataError(bad.what, where=bad.where, found=bad.found)
    waves = (load_audio(e.recording, sample_rate=sample_rate)[0] for e in entries if not isinstance(e, Problem))
    return tuple(torch.from_numpy(wave) for wave in waves if len(wave) and math.isfinite(wave.sum()))
