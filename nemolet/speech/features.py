"""Features of audio as typed modules: log-mel as NeMo and librosa have it, Kaldi's filterbank, cepstra.

All of them cut a waveform into frames, transform each frame and weigh its power by mel filters. Nothing
depends on what else is in a batch: audio beyond an utterance's length is set to zero before anything is
computed, and frames beyond its end are zero.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.speech.filterbank import (
    WindowName,
    cosine_transform,
    kaldi_mel_filters,
    slaney_mel_filters,
    window_function,
)
from nemolet.types import AudioBN, AudioLengthsB, LengthsB, SpectrogramBTC

Samples = TypeVar("Samples", int, Tensor)
BLOCK = 512  # frames computed together on a CPU, so that they stay in its cache


class Features(NamedTuple):
    """Features over frames, and how many frames of each row are valid."""

    spectrogram: SpectrogramBTC
    lengths: LengthsB


@dataclass(frozen=True)
class Framing:
    """How a waveform is cut into frames, in samples.

    Args:
        window: samples in a frame.
        hop: samples from the start of one frame to the next.
        lead: how far before the first sample the first frame starts; zeros stand there, and after the end.
        whole: only frames that lie inside the audio count; otherwise one frame for each whole hop.

    Example:
        >>> Framing(400, 160, lead=200).count(torch.tensor([16000, 159])).tolist()
        [100, 0]
        >>> Framing(400, 160, whole=True).count(torch.tensor([16000, 399])).tolist()
        [98, 0]
    """

    window: int
    hop: int
    lead: int = 0
    whole: bool = False

    def count(self, samples: Samples) -> Samples:
        """Frames of so many samples: of a number, or of each of a tensor."""
        frames = (samples - self.window) // self.hop + 1 if self.whole else samples // self.hop
        return frames.clamp_min(0) if isinstance(frames, Tensor) else max(0, frames)

    def span(self, frames: int) -> int:
        """Samples, with the lead, that so many frames reach over."""
        return (frames - 1) * self.hop + self.window if frames else 0


SAMPLES = Framing(1, 1)  # each sample is a frame


class FrameFeatures(NeuralModule):
    """What computes features frame by frame (abstract: :class:`LogMel`, :class:`KaldiFbank`, :class:`MFCC`).

    Args:
        sample_rate: in hertz; audio of another rate is refused by its type.
        width: C, numbers per frame.
        framing: how audio is cut.
        pre_emphasis: how much of the sample before is subtracted from each, over the whole waveform.
        dither: standard deviation of noise that is added in training.

    Shape: audio_BN, lengths_B -> ``B T C``, lengths_B; T is the count of the longest row, and at least 1.

    Attributes:
        needs_whole: whether features depend on how a recording ends.
    """

    needs_whole = False

    def __init__(
        self, *, sample_rate: int, width: int, framing: Framing, pre_emphasis: float = 0.0, dither: float = 0.0
    ) -> None:
        super().__init__(sample_rate=sample_rate, C=width, hop=framing.hop / sample_rate)
        if framing.hop < 1 or (framing.window < 2 and framing != SAMPLES):
            raise ShapeError(
                "frames this short hold nothing",
                where=f"{self.label}.window, {self.label}.hop",
                expected="a window of at least 2 samples and a hop of at least 1",
                found=f"{framing.window} and {framing.hop} samples at {sample_rate} Hz",
            )
        self.sample_rate, self.width, self.framing = sample_rate, width, framing
        self.pre_emphasis, self.dither = pre_emphasis, dither

    def forward(self, audio: AudioBN, audio_lengths: AudioLengthsB) -> Features:
        with torch.autocast(audio.device.type, enabled=False):  # logarithms of small powers need all their digits
            framing, signal_BN = self.framing, audio.float()
            if self.training and self.dither:
                signal_BN = signal_BN + self.dither * torch.randn_like(signal_BN)
            lengths_B, frames = framing.count(audio_lengths), max(1, framing.count(audio.shape[1]))
            missing = max(1, framing.span(frames) - framing.lead - audio.shape[1])
            signal_BN = self.emphasised(F.pad(signal_BN, (framing.lead + 1, missing)))
            signal_BN = silenced(signal_BN, audio_lengths + framing.lead, framing.window)
            frames_BTN = signal_BN[:, : framing.span(frames)].unfold(1, framing.window, framing.hop)
            return Features(masked(self.of_frames(frames_BTN), lengths_B), lengths_B)

    def emphasised(self, signal_BN: Tensor) -> Tensor:
        """Subtract from each sample, but the first, its share of the one before; the first is left out."""
        if not self.pre_emphasis:
            return signal_BN[:, 1:]
        return signal_BN[:, 1:].sub(signal_BN[:, :-1], alpha=self.pre_emphasis)

    def of_frames(self, frames_BTN: Tensor) -> Tensor:
        """Features of frames that are already cut, ``B T window -> B T C``."""
        if frames_BTN.device.type != "cpu" or torch.compiler.is_compiling():
            return self.of_block(frames_BTN)
        blocks = frames_BTN.split(max(1, BLOCK // max(1, len(frames_BTN))), dim=1)
        return torch.cat([self.of_block(block) for block in blocks], 1)

    @abc.abstractmethod
    def of_block(self, frames_BTN: Tensor) -> Tensor:
        """Features of a block of frames."""


class LogMel(FrameFeatures):
    """Logarithms of mel energies, as NeMo's and librosa's (final).

    Frames are centred on multiples of the hop, the edges are filled with zeros, and the filters are Slaney's.
    A row of N samples has N // hop frames.

    Args:
        sample_rate: in hertz.
        bins: C, number of mel filters.
        window: length of a frame in seconds.
        hop: seconds between frames.
        fft_size: points of the Fourier transform; None for the next power of two.
        low: lower edge of the filters in hertz.
        high: upper edge; None for half the sample rate.
        pre_emphasis: how much of the sample before is subtracted.
        dither: standard deviation of noise added in training.
        guard: added to energies before their logarithm is taken.
        window_name: shape of the window.

    Example:
        >>> features = LogMel(sample_rate=16000)
        >>> out = features(torch.randn(2, 16000), torch.tensor([16000, 8000]))
        >>> out.spectrogram.shape, out.lengths.tolist()
        (torch.Size([2, 100, 80]), [100, 50])
    """

    def __init__(
        self,
        *,
        sample_rate: int,
        bins: int = 80,
        window: float = 0.025,
        hop: float = 0.01,
        fft_size: int | None = None,
        low: float = 0.0,
        high: float | None = None,
        pre_emphasis: float = 0.97,
        dither: float = 1e-5,
        guard: float = 2**-24,
        window_name: WindowName = "hann",
    ) -> None:
        size = round(window * sample_rate)
        points = fft_size or power_of_two(size)
        framing = Framing(size, round(hop * sample_rate), lead=points // 2 - (points - size) // 2)
        super().__init__(sample_rate=sample_rate, width=bins, framing=framing, pre_emphasis=pre_emphasis, dither=dither)
        check_band(self.label, sample_rate, low, high)
        self.fft_size, self.guard = points, guard
        filters = slaney_mel_filters(sample_rate=sample_rate, fft_size=points, bins=bins, low=low, high=high)
        self.window: Tensor
        self.filters: Tensor
        self.register_buffer("window", window_function(window_name, size), persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def of_block(self, frames_BTN: Tensor) -> Tensor:
        """Windowed power, weighed and in logarithms."""
        power_BTF = power_spectrum(frames_BTN * self.window, self.fft_size)
        return (power_BTF @ self.filters).add_(self.guard).log_()


class KaldiFbank(FrameFeatures):
    """Kaldi's log filterbank energies (final).

    Only frames that lie wholly inside the audio exist (Kaldi's ``snip-edges``). From each frame its mean is
    removed; then come pre-emphasis and the window. Samples are scaled to 16 bit, as Kaldi reads them.

    Args:
        sample_rate: in hertz.
        bins: C, number of mel filters.
        window: length of a frame in seconds.
        hop: seconds between frames.
        low: lower edge of the filters in hertz.
        high: upper edge; None for half the sample rate.
        pre_emphasis: how much of the sample before is subtracted, within a frame.
        dither: standard deviation of noise added in training, of samples in [-1, 1].
        window_name: shape of the window.
        scale: what samples in [-1, 1] are multiplied by.

    Example:
        >>> features = KaldiFbank(sample_rate=16000)
        >>> features(torch.randn(1, 16000), torch.tensor([16000])).spectrogram.shape
        torch.Size([1, 98, 80])
    """

    FLOOR: ClassVar[float] = torch.finfo(torch.float32).eps  # of energies, as in Kaldi

    def __init__(
        self,
        *,
        sample_rate: int,
        bins: int = 80,
        window: float = 0.025,
        hop: float = 0.01,
        low: float = 20.0,
        high: float | None = None,
        pre_emphasis: float = 0.97,
        dither: float = 0.0,
        window_name: WindowName = "povey",
        scale: float = 32768.0,
    ) -> None:
        size = round(window * sample_rate)
        framing = Framing(size, round(hop * sample_rate), whole=True)
        super().__init__(sample_rate=sample_rate, width=bins, framing=framing, dither=dither)
        check_band(self.label, sample_rate, low, high)
        self.fft_size, self.emphasis = power_of_two(size), pre_emphasis
        filters = kaldi_mel_filters(sample_rate=sample_rate, fft_size=self.fft_size, bins=bins, low=low, high=high)
        self.window: Tensor
        self.filters: Tensor
        self.register_buffer("window", window_function(window_name, size), persistent=False)
        self.register_buffer("filters", filters * scale**2, persistent=False)

    def of_block(self, frames_BTN: Tensor) -> Tensor:
        """Mean removed, emphasised and windowed; power, weighed and in logarithms."""
        frames_BTN = frames_BTN - frames_BTN.mean(-1, keepdim=True)
        before_BTN = torch.cat((frames_BTN[..., :1], frames_BTN[..., :-1]), -1)
        frames_BTN = frames_BTN.sub(before_BTN, alpha=self.emphasis).mul_(self.window)
        power_BTF = power_spectrum(frames_BTN, self.fft_size)
        return (power_BTF @ self.filters).clamp_min_(self.FLOOR).log_()


class MFCC(FrameFeatures):
    """Mel-frequency cepstral coefficients, as Kaldi's without energy (final).

    Args:
        sample_rate: in hertz.
        coefficients: C, how many are kept, the zeroth included.
        bins: number of mel filters.
        window: length of a frame in seconds.
        hop: seconds between frames.
        low: lower edge of the filters in hertz.
        high: upper edge; None for half the sample rate.
        lifter: raises higher coefficients; 0 for none.
        dither: standard deviation of noise added in training.

    Example:
        >>> MFCC(sample_rate=16000)(torch.randn(1, 16000), torch.tensor([16000])).spectrogram.shape
        torch.Size([1, 98, 13])
    """

    def __init__(
        self,
        *,
        sample_rate: int,
        coefficients: int = 13,
        bins: int = 23,
        window: float = 0.025,
        hop: float = 0.01,
        low: float = 20.0,
        high: float | None = None,
        lifter: float = 22.0,
        dither: float = 0.0,
    ) -> None:
        fbank = KaldiFbank(sample_rate=sample_rate, bins=bins, window=window, hop=hop, low=low, high=high)
        super().__init__(sample_rate=sample_rate, width=coefficients, framing=fbank.framing, dither=dither)
        if coefficients > bins:
            raise ShapeError("more coefficients than filters", where="MFCC.coefficients", expected=f"<= {bins}")
        self.fbank = fbank
        self.transform: Tensor
        matrix = cosine_transform(bins=bins, coefficients=coefficients, lifter=lifter)
        self.register_buffer("transform", matrix, persistent=False)

    def of_block(self, frames_BTN: Tensor) -> Tensor:
        """The cosine transform of log filterbank energies."""
        return self.fbank.of_block(frames_BTN) @ self.transform


def masked(values: Tensor, lengths_B: Tensor) -> Tensor:
    """Set entries along the second axis at and beyond each row's length to zero.

    Example:
        >>> masked(torch.ones(2, 3), torch.tensor([1, 3])).tolist()
        [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    beyond = torch.arange(values.shape[1], device=values.device) >= lengths_B[:, None]
    return torch.where(beyond.reshape(*beyond.shape, *[1] * (values.dim() - 2)), 0.0, values)


def silenced(signal_BN: Tensor, ends_B: Tensor, size: int) -> Tensor:
    """Set the next ``size`` samples after the end of each row to zero, in place; the last column is one of them.

    No frame that counts reaches further, so this saves a pass over everything.
    """
    places = ends_B[:, None] + torch.arange(size, device=signal_BN.device)
    return signal_BN.scatter_(1, places.clamp_max(signal_BN.shape[1] - 1), 0.0)


def power_spectrum(frames: Tensor, fft_size: int) -> Tensor:
    """Squared magnitudes of the Fourier transform of windowed frames, ``... window -> ... fft_size // 2 + 1``."""
    spectrum = torch.fft.rfft(frames, n=fft_size)
    power: Tensor = spectrum.real.square() + spectrum.imag.square()
    return power


def power_of_two(size: int) -> int:
    """The next power of two.

    Example:
        >>> power_of_two(400), power_of_two(512)
        (512, 512)
    """
    return 1 << (size - 1).bit_length()


def check_band(where: str, sample_rate: int, low: float, high: float | None) -> None:
    """Refuse filters that reach beyond half the sample rate."""
    if not 0 <= low < (high or sample_rate / 2) <= sample_rate / 2:
        raise ShapeError(
            "the filters reach beyond the audio",
            where=f"{where}.low, {where}.high",
            expected=f"0 <= low < high <= {sample_rate / 2:g}",
            found=f"{low:g} and {high:g}" if high else f"{low:g}",
        )
