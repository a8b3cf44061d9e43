"""Encoders that read a waveform without features of their own: Wav2Vec 2.0, HuBERT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.nn.conv import Conv1d
from nemolet.nn.feed_forward import ACTIVATIONS, ActivationName
from nemolet.nn.linear import Linear
from nemolet.nn.norm import LayerNorm
from nemolet.nn.transformer import Encoder
from nemolet.speech.encoder import Encoded, SpeechEncoder
from nemolet.speech.features import SAMPLES, Features, FrameFeatures, Samples, masked
from nemolet.types import AudioBN, AudioLengthsB, Hidden, HiddenBTD, LengthsB, MaskBS, NeuralType, SpectrogramBTC

FramesBSC = Annotated[Tensor, NeuralType("B S C", Hidden())]


class Waveform(FrameFeatures):
    """The samples themselves, one to a frame, for encoders that find features of their own (final).

    Args:
        sample_rate: in hertz.
        normalized: whether each recording is brought to mean 0 and variance 1; padding counts for nothing and stays 0.

    Shape: audio_BN, lengths_B -> ``B T C=1``, lengths_B; T is N.

    Example:
        >>> Waveform()(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([2])).spectrogram.round(decimals=3).flatten()
        tensor([-1.,  1.,  0.])
    """

    GUARD = 1e-7  # of a variance, as transformers has it

    def __init__(self, *, sample_rate: int = 16000, normalized: bool = True) -> None:
        super().__init__(sample_rate=sample_rate, width=1, framing=SAMPLES)
        self.normalized = self.needs_whole = normalized

    def forward(self, audio: AudioBN, audio_lengths: AudioLengthsB) -> Features:
        signal_BN = masked(audio.float(), audio_lengths)
        if self.normalized:
            samples_B1 = audio_lengths.clamp_min(1)[:, None]
            signal_BN = masked(signal_BN - signal_BN.sum(1, keepdim=True) / samples_B1, audio_lengths)
            variance_B1 = signal_BN.square().sum(1, keepdim=True) / samples_B1
            signal_BN = signal_BN / (variance_B1 + self.GUARD).sqrt()
        return Features(signal_BN[..., None], audio_lengths)

    def of_block(self, frames_BTN: Tensor) -> Tensor:
        """As they are."""
        return frames_BTN


class TimeNorm(NeuralModule):
    """Each channel with mean 0 and variance 1 over time, then a learned scale and shift (final).

    Args:
        width: number of channels.
        eps: added to variances.

    Shape: ``B S C``, lengths_B -> ``B S C``; weight ``C``, bias ``C``. With lengths, padding counts for nothing.

    Example:
        >>> TimeNorm(1)(torch.tensor([[[1.0], [3.0]]])).round(decimals=3).flatten().tolist()
        [-1.0, 1.0]
    """

    def __init__(self, width: int, *, eps: float = 1e-5) -> None:
        super().__init__(C=width)
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.declare_axes(weight=f"C={width}", bias=f"C={width}")

    def forward(self, hidden: FramesBSC, lengths: LengthsB | None = None) -> FramesBSC:
        if lengths is None:
            channels_BCS = hidden.transpose(1, 2)
            return F.group_norm(channels_BCS, channels_BCS.shape[1], self.weight, self.bias, self.eps).transpose(1, 2)
        frames_B11 = lengths.clamp_min(1)[:, None, None]
        wide_BSC = masked(hidden.float(), lengths)
        centred_BSC = masked(wide_BSC - wide_BSC.sum(1, keepdim=True) / frames_B11, lengths)
        variance_B1C = centred_BSC.square().sum(1, keepdim=True) / frames_B11
        scale_B1C = (variance_B1C + self.eps).rsqrt() * self.weight
        return torch.addcmul(self.bias, centred_BSC, scale_B1C).to(hidden.dtype)


class WaveStem(NeuralModule):
    """Strided convolutions from samples to frames (Baevski et al., 2020; final).

    Args:
        widths: channels after each convolution.
        kernels: what each sees.
        strides: by how much each shortens.
        norm: ``"group"`` normalises each channel over time after the first convolution; ``"layer"`` all channels of a
            frame after each.
        bias: whether convolutions add a vector.
        activation: after each.

    Shape: audio_BN, lengths_B -> ``B S C``; audio that is too short for a frame is filled up with silence.

    Example:
        >>> stem = WaveStem(widths=(4, 4), kernels=(10, 3), strides=(5, 2))
        >>> stem(torch.zeros(1, 100)).shape, stem.frames(torch.tensor([100, 50])).tolist()
        (torch.Size([1, 9, 4]), [9, 4])
    """

    def __init__(
        self,
        *,
        widths: Sequence[int] = (512,) * 7,
        kernels: Sequence[int] = (10, 3, 3, 3, 3, 2, 2),
        strides: Sequence[int] = (5, 2, 2, 2, 2, 2, 2),
        norm: Literal["group", "layer"] = "group",
        bias: bool = False,
        activation: ActivationName = "gelu",
    ) -> None:
        if not len(widths) == len(kernels) == len(strides) > 0:
            raise ShapeError(
                "the convolutions are not described alike",
                where="WaveStem.widths, kernels, strides",
                expected="as many values in each, at least one",
                found=f"{len(widths)}, {len(kernels)} and {len(strides)}",
            )
        super().__init__(C=widths[-1])
        self.width, self.kernels, self.strides = widths[-1], tuple(kernels), tuple(strides)
        self.activate = ACTIVATIONS[activation]
        sizes = list(pairwise((1, *widths)))
        self.convs = nn.ModuleList(
            Conv1d("C", "C", before, after, kernel=kernel, stride=stride, bias=bias, padded=False)
            for (before, after), kernel, stride in zip(sizes, kernels, strides)
        )
        norms = [TimeNorm(widths[0])] if norm == "group" else [LayerNorm("C", size) for size in widths]
        self.norms = nn.ModuleList(norms)

    def forward(self, audio: AudioBN, lengths: AudioLengthsB | None = None) -> FramesBSC:
        hidden_BSC = F.pad(audio, (0, max(0, self.shortest - audio.shape[1])))[..., None]
        for index, conv in enumerate(self.convs):
            hidden_BSC = conv(hidden_BSC)
            if index < len(self.norms):
                norm = self.norms[index]
                valid = (self.frames(lengths, layers=1),) if isinstance(norm, TimeNorm) and lengths is not None else ()
                hidden_BSC = norm(hidden_BSC, *valid)
            hidden_BSC = self.activate(hidden_BSC)
        return hidden_BSC

    @property
    def shortest(self) -> int:
        """Samples of one frame."""
        samples = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides)):
            samples = (samples - 1) * stride + kernel
        return samples

    def frames(self, samples: Samples, *, layers: int | None = None) -> Samples:
        """Frames of so many samples: of a number, or of each of a tensor; after all convolutions, or the first few."""
        for kernel, stride in [*zip(self.kernels, self.strides)][:layers]:
            samples = (samples - kernel) // stride + 1
        return samples.clamp_min(0) if isinstance(samples, Tensor) else max(0, samples)


class ConvPositions(NeuralModule):
    """Positions from what is around: a wide grouped convolution, added to its input (Baevski et al., 2020; final).

    Its filters are a direction, of length one at each place of the kernel, times a length for that place.

    Args:
        width: D.
        kernel: frames that are seen.
        groups: of channels that are mixed with each other only.
        activation: of what is added.

    Shape: hidden_BTD -> hidden_BTD; direction ``D D/groups kernel``, scale ``1 1 kernel``, bias ``D``.

    Example:
        >>> ConvPositions(8, kernel=4, groups=2)(torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, width: int, *, kernel: int = 128, groups: int = 16, activation: ActivationName = "gelu") -> None:
        super().__init__(D=width)
        if width % groups:
            raise ShapeError(
                "the groups do not divide the width", where="ConvPositions.groups", expected=width, found=groups
            )
        self.kernel, self.groups, self.activate = kernel, groups, ACTIVATIONS[activation]
        std = 2 * (kernel * width) ** -0.5
        self.direction = nn.Parameter(torch.empty(width, width // groups, kernel).normal_(std=std))
        self.scale = nn.Parameter(torch.full((1, 1, kernel), std * (width * width / groups) ** 0.5))
        self.bias = nn.Parameter(torch.zeros(width))
        self.declare_axes(direction=f"D={width} {width // groups} {kernel}", scale=f"1 1 {kernel}", bias=f"D={width}")

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        weight = torch._weight_norm(self.direction, self.scale, 2)
        channels_BDT = F.pad(hidden.transpose(1, 2), (self.kernel // 2, (self.kernel - 1) // 2))
        found_BDT = F.conv1d(channels_BDT, weight, self.bias, groups=self.groups)
        return hidden + self.activate(found_BDT).transpose(1, 2)


class WaveEncoder(SpeechEncoder):
    """From a waveform to hidden states: convolutions, positions and a stack of blocks (final).

    It reads :class:`Waveform`. With lengths, a row among others is read as it is alone; without them padding is read as
    silence, as the models whose stem has ``norm="group"`` are used in transformers.

    Args:
        stem: from samples to frames.
        stack: the blocks; positions are not theirs.
        position_kernel: frames that positions are made of.
        position_groups: of the channels there.
        position_activation: of what is added for positions.
        mask_vector: whether a learned vector can stand in the place of frames, as in pre-training.
        norm_eps: added to the variance of the norm of frames.

    Shape: ``B T C=1``, lengths_B -> ``B S D``, lengths_B.

    Example:
        >>> stem = WaveStem(widths=(4, 4), kernels=(10, 3), strides=(5, 2))
        >>> stack = Encoder(layers=1, width=8, heads=2, position="none")
        >>> encoder = WaveEncoder(stem=stem, stack=stack, position_kernel=4, position_groups=2)
        >>> encoder(torch.zeros(2, 100, 1), torch.tensor([100, 50])).lengths.tolist()
        [9, 4]
    """

    def __init__(
        self,
        *,
        stem: WaveStem,
        stack: Encoder,
        position_kernel: int = 128,
        position_groups: int = 16,
        position_activation: ActivationName = "gelu",
        mask_vector: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        width = stack.width
        super().__init__(bins=1, width=width, factor=math.prod(stem.strides))
        self.stem = stem
        self.norm = LayerNorm("C", stem.width, eps=norm_eps)
        self.project = Linear("C", "D", stem.width, width, bias=True, init_std=0.02)
        self.positions = ConvPositions(
            width, kernel=position_kernel, groups=position_groups, activation=position_activation
        )
        self.stack = stack
        self.mask_vector = nn.Parameter(torch.empty(width).uniform_()) if mask_vector else None
        self.declare_axes(mask_vector=f"D={width}")

    def forward(
        self, spectrogram: SpectrogramBTC, lengths: LengthsB | None = None, masked: MaskBS | None = None
    ) -> Encoded:
        hidden_BSD = self.project(self.norm(self.stem(spectrogram[..., 0], lengths)))
        if masked is not None and self.mask_vector is not None:
            hidden_BSD = torch.where(masked[..., None], self.mask_vector.to(hidden_BSD.dtype), hidden_BSD)
        frames = hidden_BSD.shape[1]
        if lengths is None:
            valid_BS, frames_B = None, torch.full((len(spectrogram),), frames, device=spectrogram.device)
        else:
            frames_B = self.stem.frames(lengths)
            valid_BS = torch.arange(frames, device=spectrogram.device) < frames_B[:, None]
            hidden_BSD = hidden_BSD * valid_BS[..., None]
        return Encoded(self.stack(self.positions(hidden_BSD), mask=valid_BS), frames_B)

    def frames(self, count: Samples) -> Samples:
        """Hidden states of so many samples."""
        return self.stem.frames(count)
