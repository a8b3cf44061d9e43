"""An encoder of convolutions over time and frequency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.nn.conv import Conv2d
from nemolet.nn.linear import Linear
from nemolet.nn.norm import LayerNorm
from nemolet.speech.convolutional import ConvBlock
from nemolet.speech.encoder import Encoded, SpeechEncoder
from nemolet.speech.features import masked
from nemolet.types import Axis, Hidden, LengthsB, NeuralType, SpectrogramBTC

PlaneBTXI = Annotated[Tensor, NeuralType("B T Any I", Hidden())]
PlaneBSXO = Annotated[Tensor, NeuralType("B S Any O", Hidden())]


class PlaneConv(NeuralModule):
    """A convolution over time and features, then a norm of the channels at each point (final).

    Channels come last, so that the norm reads neighbours; the convolution takes them as they lie.

    Args:
        in_size: channels that come in.
        out_size: channels of the result.
        kernel: along both axes.
        stride: along time; features are halved.

    Shape: ``B T X I``, lengths_B -> ``B S X/2 O``; T becomes T / stride, rounded up.
    """

    def __init__(self, in_size: int, out_size: int, *, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(I=Axis("C", in_size), O=Axis("C", out_size))
        self.conv = Conv2d("C", "C", in_size, out_size, kernel=kernel, stride=(stride, 2))
        self.norm = LayerNorm("C", out_size)

    def forward(self, plane: PlaneBTXI, lengths: LengthsB) -> PlaneBSXO:
        mixed = self.conv(masked(plane, lengths).permute(0, 3, 1, 2))
        return F.relu(self.norm(mixed.permute(0, 2, 3, 1)))


class Conv2dEncoder(SpeechEncoder):
    """Convolutions over time and frequency, then separable ones over time (final).

    A pattern is recognised wherever it lies on the frequency axis, as the same vowel of a longer or shorter vocal
    tract does. So much is learned from few speakers, where an encoder that mixes all features at once learns their
    voices.

    Args:
        bins: C, features of a frame.
        width: D of the result.
        channels: of each convolution over both axes; each halves the features.
        strides: of each along time; their product is the factor.
        kernels: of the blocks that follow, over time alone.
        dropout: probability, in training; of whole channels first, then of single values.

    Shape: ``B T C``, lengths_B -> ``B S D``, lengths_B

    Example:
        >>> encoder = Conv2dEncoder(bins=8, width=16, channels=[4, 8], strides=[2, 1], kernels=[5])
        >>> encoder(torch.randn(1, 9, 8), torch.tensor([9])).hidden.shape
        torch.Size([1, 5, 16])
    """

    CONFIG_RULES: ClassVar = (("width >= 1", "width is at least 1"),)

    def __init__(
        self,
        *,
        bins: int,
        width: int,
        channels: Sequence[int],
        strides: Sequence[int],
        kernels: Sequence[int] = (),
        dropout: float = 0.1,
    ) -> None:
        super().__init__(bins=bins, width=width, factor=math.prod(strides))
        if not channels or len(channels) != len(strides):
            raise ShapeError(
                "each convolution has its channels and its stride",
                where="Conv2dEncoder.channels, Conv2dEncoder.strides",
                expected="two lists of the same length, at least 1",
                found=f"{len(channels)} and {len(strides)}",
            )
        self.strides, self.dropout = tuple(strides), dropout
        self.planes = nn.ModuleList(
            PlaneConv(before, after, kernel=5 if before == 1 else 3, stride=stride)
            for before, after, stride in zip([1, *channels], channels, strides)
        )
        left = -(-bins // 2 ** len(channels))
        self.project = Linear(f"({left} C={channels[-1]})", "D", left * channels[-1], width, bias=True)
        self.norm = LayerNorm("D", width)
        self.blocks = nn.ModuleList(
            ConvBlock(width, kernel=kernel, repeats=1, squeeze=False, dropout=dropout) for kernel in kernels
        )

    def forward(self, spectrogram: SpectrogramBTC, lengths: LengthsB) -> Encoded:
        plane_BTXC = spectrogram[..., None]
        for layer, stride in zip(self.planes, self.strides):
            plane_BTXC = layer(plane_BTXC, lengths)
            lengths = (lengths + stride - 1) // stride
            kept_B11C = F.dropout(torch.ones_like(plane_BTXC[:, :1, :1]), self.dropout, self.training)
            plane_BTXC = plane_BTXC * kept_B11C
        hidden_BTD = F.relu(self.norm(self.project(plane_BTXC.flatten(2))))
        hidden_BTD = F.dropout(hidden_BTD, self.dropout, self.training)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD, lengths)
        return Encoded(masked(hidden_BTD, lengths), lengths)
