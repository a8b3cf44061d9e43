"""Encoders that read a waveform without features of their own: Wav2Vec 2.0, HuBERT."""

from __future__ import annotations

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
from nemolet.speech.encoder import Encoded
from nemolet.types import AudioBN, AudioLengthsB, Hidden, HiddenBTD, MaskBS, NeuralType

FramesBSC = Annotated[Tensor, NeuralType("B S C", Hidden())]


class TimeNorm(NeuralModule):
    """Each channel with mean 0 and variance 1 over time, then a learned scale and shift (final).

    Args:
        width: number of channels.

    Shape: ``B S C -> B S C``; weight ``C``, bias ``C``.

    Example:
        >>> TimeNorm(1)(torch.tensor([[[1.0], [3.0]]])).round(decimals=3).flatten().tolist()
        [-1.0, 1.0]
    """

    def __init__(self, width: int) -> None:
        super().__init__(C=width)
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.declare_axes(weight=f"C={width}", bias=f"C={width}")

    def forward(self, hidden: FramesBSC) -> FramesBSC:
        channels_BCS = hidden.transpose(1, 2)
        return F.group_norm(channels_BCS, channels_BCS.shape[1], self.weight, self.bias).transpose(1, 2)


class WaveStem(NeuralModule):
    """Strided convolutions from samples to frames (Baevski et al., 2020; final).

    Args:
        widths: channels after each convolution.
        kernels: what each sees.
        strides: by how much each shortens.
        norm: ``"group"`` normalises each channel over time after the first convolution, padding included;
            ``"layer"`` all channels of a frame after each.
        bias: whether convolutions add a vector.
        activation: after each.

    Shape: audio_BN -> ``B S C``

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

    def forward(self, audio: AudioBN) -> FramesBSC:
        hidden_BSC = audio[..., None]
        for index, conv in enumerate(self.convs):
            hidden_BSC = conv(hidden_BSC)
            if index < len(self.norms):
                hidden_BSC = self.norms[index](hidden_BSC)
            hidden_BSC = self.activate(hidden_BSC)
        return hidden_BSC

    def frames(self, samples: Tensor) -> Tensor:
        """Frames of so many samples."""
        for kernel, stride in zip(self.kernels, self.strides):
            samples = torch.div(samples - kernel, stride, rounding_mode="floor") + 1
        return samples.clamp(min=0)


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


class WaveEncoder(NeuralModule):
    """From a waveform to hidden states: convolutions, positions and a stack of blocks (final).

    Args:
        stem: from samples to frames.
        stack: the blocks; positions are not theirs.
        position_kernel: frames that positions are made of.
        position_groups: of the channels there.
        mask_vector: whether a learned vector can stand in the place of frames, as in pre-training.
        norm_eps: added to the variance of the norm of frames.

    Shape: audio_BN, lengths_B -> ``B S D``, lengths_B.

    Example:
        >>> stem = WaveStem(widths=(4, 4), kernels=(10, 3), strides=(5, 2))
        >>> stack = Encoder(layers=1, width=8, heads=2, position="none")
        >>> encoder = WaveEncoder(stem=stem, stack=stack, position_kernel=4, position_groups=2)
        >>> encoder(torch.zeros(2, 100), torch.tensor([100, 50])).lengths.tolist()
        [9, 4]
    """

    def __init__(
        self,
        *,
        stem: WaveStem,
        stack: Encoder,
        position_kernel: int = 128,
        position_groups: int = 16,
        mask_vector: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        width = stack.width
        super().__init__(D=width)
        self.width = width
        self.stem = stem
        self.norm = LayerNorm("C", stem.width, eps=norm_eps)
        self.project = Linear("C", "D", stem.width, width, bias=True, init_std=0.02)
        self.positions = ConvPositions(width, kernel=position_kernel, groups=position_groups)
        self.stack = stack
        self.mask_vector = nn.Parameter(torch.empty(width).uniform_()) if mask_vector else None
        self.declare_axes(mask_vector=f"D={width}")

    def forward(
        self, audio: AudioBN, audio_lengths: AudioLengthsB | None = None, masked: MaskBS | None = None
    ) -> Encoded:
        hidden_BSD = self.project(self.norm(self.stem(audio)))
        if masked is not None and self.mask_vector is not None:
            hidden_BSD = torch.where(masked[..., None], self.mask_vector.to(hidden_BSD.dtype), hidden_BSD)
        frames = hidden_BSD.shape[1]
        if audio_lengths is None:
            valid_BS, lengths_B = None, torch.full((len(audio),), frames, device=audio.device)
        else:
            lengths_B = self.stem.frames(audio_lengths)
            valid_BS = torch.arange(frames, device=audio.device) < lengths_B[:, None]
            hidden_BSD = hidden_BSD * valid_BS[..., None]
        return Encoded(self.stack(self.positions(hidden_BSD), mask=valid_BS), lengths_B)
