"""Faster and slower audio: resampling by a fraction, and another tempo at the same pitch."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

ZEROS = 6  # zero crossings of the interpolating sinc on either side
ROLLOFF = 0.95  # of half the lower rate, from where on the filter falls


def resampled(audio_BN: Tensor, ratio: Fraction) -> Tensor:
    """Samples at another rate, by a windowed sinc.

    Args:
        audio_BN: any number of samples.
        ratio: new rate over old rate; the smaller its terms, the faster.

    Shape: ``B N -> B ceil(N * ratio)``

    Example:
        >>> resampled(torch.zeros(1, 100), Fraction(10, 11)).shape
        torch.Size([1, 91])
    """
    if ratio == 1:
        return audio_BN
    new, old = ratio.numerator, ratio.denominator
    kernels = _kernels(old, new).to(audio_BN)
    reach = (kernels.shape[1] - old) // 2
    padded = F.pad(audio_BN[:, None], (reach, reach + old))
    phases = F.conv1d(padded, kernels[:, None], stride=old)  # one channel for each place between two samples
    return phases.transpose(1, 2).flatten(1)[:, : math.ceil(audio_BN.shape[1] * ratio)]


@functools.lru_cache(maxsize=64)
def _kernels(old: int, new: int) -> Tensor:
    """What each of the ``new`` outputs takes from ``old`` inputs and their neighbours."""
    cutoff = min(old, new) * ROLLOFF
    reach = math.ceil(ZEROS * old / cutoff)
    inputs = torch.arange(-reach, reach + old, dtype=torch.float64) / old
    outputs = torch.arange(new, dtype=torch.float64)[:, None] / new
    times = ((inputs - outputs) * cutoff).clamp(-ZEROS, ZEROS)
    return torch.sinc(times) * torch.cos(math.pi / 2 / ZEROS * times).square() * (cutoff / old)


def stretched(audio_BN: Tensor, tempo: float, *, window: int) -> Tensor:
    """Another tempo at the same pitch, by a phase vocoder (Flanagan and Golden, 1966).

    Args:
        audio_BN: any number of samples.
        tempo: above 1 is faster.
        window: samples in a frame; about 0.05 seconds.

    Shape: ``B N -> B round(N / tempo)``

    Example:
        >>> stretched(torch.zeros(1, 1000), 1.25, window=64).shape
        torch.Size([1, 800])
    """
    hop, wanted = window // 4, round(audio_BN.shape[1] / tempo)
    shape = torch.hann_window(window, device=audio_BN.device, dtype=audio_BN.dtype)
    padded = F.pad(audio_BN, (0, 2 * window))
    frames_BFT = torch.stft(padded, window, hop, window=shape, center=True, pad_mode="constant", return_complex=True)
    count = min(frames_BFT.shape[2] - 1, math.ceil((wanted / hop + 4) * tempo))
    times_T = torch.arange(0, count - 1, tempo, device=audio_BN.device)
    before_T = times_T.floor().long()
    share_T = (times_T - before_T).to(audio_BN.dtype)
    magnitudes, angles = frames_BFT.abs(), frames_BFT.angle()
    sizes_BFT = magnitudes[:, :, before_T] * (1 - share_T) + magnitudes[:, :, before_T + 1] * share_T
    # How far each bin turns in one hop: what a sine in its middle does, and the rest to the nearest full turn.
    turn_F1 = 2 * math.pi * hop / window * torch.arange(window // 2 + 1, device=audio_BN.device)[:, None]
    excess = angles[:, :, before_T + 1] - angles[:, :, before_T] - turn_F1
    turns_BFT = turn_F1 + excess - 2 * math.pi * torch.round(excess / (2 * math.pi))
    phases_BFT = angles[:, :, :1] + F.pad(turns_BFT[:, :, :-1], (1, 0)).cumsum(2)
    spectrum = torch.polar(sizes_BFT, phases_BFT.to(sizes_BFT.dtype))
    result = torch.istft(spectrum, window, hop, window=shape, center=True)
    return F.pad(result, (0, max(0, wanted - result.shape[1])))[:, :wanted]
