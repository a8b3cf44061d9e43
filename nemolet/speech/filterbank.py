"""The fixed matrices of a front end: mel filters in two conventions, the cosine transform, windows."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

WindowName = Literal["hann", "povey", "hamming", "rectangular"]


def slaney_mel_filters(
    *, sample_rate: int, fft_size: int, bins: int, low: float = 0.0, high: float | None = None
) -> Tensor:
    """Triangles of equal area, linear in hertz below 1 kHz and logarithmic above, as librosa and NeMo have them.

    Args:
        sample_rate: in hertz.
        fft_size: points of the Fourier transform.
        bins: C, number of filters.
        low: lower edge of the first filter.
        high: upper edge of the last one; None for half the sample rate.

    Shape: ``[fft_size // 2 + 1, C]``

    Example:
        >>> slaney_mel_filters(sample_rate=16000, fft_size=512, bins=80).shape
        torch.Size([257, 80])
    """
    edges_hertz = _slaney_hertz(
        torch.linspace(_slaney_mel(low), _slaney_mel(high or sample_rate / 2), bins + 2, dtype=torch.float64)
    )
    hertz = torch.linspace(0, sample_rate / 2, fft_size // 2 + 1, dtype=torch.float64)
    triangles = _triangles(hertz, edges_hertz)
    return (triangles * (2.0 / (edges_hertz[2:] - edges_hertz[:-2]))).float()


def kaldi_mel_filters(
    *, sample_rate: int, fft_size: int, bins: int, low: float = 20.0, high: float | None = None
) -> Tensor:
    """Triangles of height one on the scale 1127 ln(1 + f / 700), straight on that scale, as Kaldi has them.

    Args and shape are those of :func:`slaney_mel_filters`; the highest frequency has weight 0.
    """
    edges_mel = torch.linspace(_kaldi_mel(low), _kaldi_mel(high or sample_rate / 2), bins + 2, dtype=torch.float64)
    hertz = torch.arange(fft_size // 2 + 1, dtype=torch.float64) * (sample_rate / fft_size)
    filters = _triangles(1127.0 * torch.log1p(hertz / 700.0), edges_mel)
    filters[-1] = 0.0
    return filters.float()


def _triangles(points: Tensor, edges: Tensor) -> Tensor:
    """Rise from one edge to the next and fall to the one after; [points, edges - 2]."""
    rise = (points[:, None] - edges[None, :-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[None, 2:] - points[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rise, fall).clamp_min(0.0)


def _kaldi_mel(hertz: float) -> float:
    return 1127.0 * math.log1p(hertz / 700.0)


_LINEAR = 200.0 / 3.0  # hertz per mel below one kilohertz
_BREAK = 1000.0 / _LINEAR  # the mel of one kilohertz
_STEP = math.log(6.4) / 27.0  # growth per mel above


def _slaney_mel(hertz: float) -> float:
    return hertz / _LINEAR if hertz < 1000.0 else _BREAK + math.log(hertz / 1000.0) / _STEP


def _slaney_hertz(mel: Tensor) -> Tensor:
    return torch.where(mel < _BREAK, mel * _LINEAR, 1000.0 * torch.exp(_STEP * (mel - _BREAK)))


def window_function(name: WindowName, size: int) -> Tensor:
    """A symmetric window.

    Args:
        name: ``"povey"`` is Kaldi's, a Hann window to the power of 0.85.
        size: number of samples.

    Example:
        >>> window_function("hann", 3)
        tensor([0., 1., 0.])
    """
    if name == "rectangular":
        return torch.ones(size)
    cosine = torch.cos(2 * math.pi / (size - 1) * torch.arange(size, dtype=torch.float64))
    if name == "hamming":
        return (0.54 - 0.46 * cosine).float()
    hann = (0.5 - 0.5 * cosine).clamp_min(0.0)
    return (hann**0.85 if name == "povey" else hann).float()


def cosine_transform(*, bins: int, coefficients: int, lifter: float = 0.0) -> Tensor:
    """The orthonormal cosine transform (type 2) of log filter energies, with Kaldi's cepstral lifter.

    Args:
        bins: number of filters.
        coefficients: how many cepstral coefficients are kept.
        lifter: Q of the weights ``1 + Q / 2 sin(pi n / Q)``; 0 for none.

    Shape: ``[bins, coefficients]``
    """
    n = torch.arange(coefficients, dtype=torch.float64)
    k = torch.arange(bins, dtype=torch.float64)[:, None]
    matrix = torch.cos(math.pi / bins * (k + 0.5) * n) * math.sqrt(2.0 / bins)
    matrix[:, 0] = math.sqrt(1.0 / bins)
    if lifter:
        matrix = matrix * (1.0 + 0.5 * lifter * torch.sin(math.pi * n / lifter))
    return matrix.float()
