"""Encoders of separable convolutions over time, as in QuartzNet, Citrinet and MatchboxNet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.nn.conv import Conv1d, HiddenBSO, HiddenBTI
from nemolet.nn.linear import Linear
from nemolet.nn.norm import LayerNorm
from nemolet.speech.encoder import Encoded, SpeechEncoder
from nemolet.speech.features import masked
from nemolet.types import Axis, HiddenBTD, LengthsB, SpectrogramBTC


class SeparableConv(NeuralModule):
    """A convolution over each channel, then one over channels, then a norm of each frame (final).

    Args:
        in_axis: letter of the input channels.
        in_size: their number.
        width: D of the result.
        kernel: frames that an output sees.
        stride: frames from one output to the next.
        dilation: frames between two that an output sees.

    Shape: ``B T I``, lengths_B -> ``B S D``

    Example:
        >>> import torch
        >>> SeparableConv("C", 8, 4, kernel=3, stride=2)(torch.zeros(1, 5, 8), torch.tensor([5])).shape
        torch.Size([1, 3, 4])
    """

    def __init__(
        self, in_axis: str, in_size: int, width: int, *, kernel: int, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__(I=Axis(in_axis, in_size), O=Axis("D", width))
        self.depthwise = Conv1d(
            in_axis, in_axis, in_size, in_size, kernel=kernel, stride=stride, dilation=dilation, depthwise=True
        )
        self.pointwise = Linear(in_axis, "D", in_size, width)
        self.norm = LayerNorm("D", width)

    def forward(self, hidden: HiddenBTI, lengths: LengthsB) -> HiddenBSO:
        return self.norm(self.pointwise(self.depthwise(masked(hidden, lengths))))  # type: ignore[no-any-return]


class SqueezeExcite(NeuralModule):
    """Scale channels by what is heard in the whole utterance (Hu et al., 2018; final).

    Args:
        width: D.
        narrow: size of the bottleneck.

    Shape: hidden_BTD, lengths_B -> hidden_BTD
    """

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__(D=width)
        self.down = Linear("D", "F", width, narrow, bias=True)
        self.up = Linear("F", "D", narrow, width, bias=True)

    def forward(self, hidden: HiddenBTD, lengths: LengthsB) -> HiddenBTD:
        mean_B1D = masked(hidden, lengths).sum(1, keepdim=True) / lengths.clamp(min=1)[:, None, None]
        scaled: Tensor = hidden * self.up(F.relu(self.down(mean_B1D))).sigmoid()
        return scaled


class ConvBlock(NeuralModule):
    """Some separable convolutions with a way around them (final).

    Args:
        width: D.
        kernel: of each convolution.
        repeats: how many.
        squeeze: whether channels are scaled by the whole utterance, as in Citrinet.
        dropout: after each convolution, in training.

    Shape: hidden_BTD, lengths_B -> hidden_BTD
    """

    def __init__(self, width: int, *, kernel: int, repeats: int, squeeze: bool, dropout: float) -> None:
        super().__init__(D=width)
        self.convs = nn.ModuleList(SeparableConv("D", width, width, kernel=kernel) for _ in range(repeats))
        self.squeeze = SqueezeExcite(width, max(8, width // 8)) if squeeze else None
        self.dropout = dropout

    def forward(self, hidden: HiddenBTD, lengths: LengthsB) -> HiddenBTD:
        mixed = hidden
        for number, conv in enumerate(self.convs):
            mixed = conv(mixed, lengths)
            if number < len(self.convs) - 1:
                mixed = F.dropout(F.relu(mixed), self.dropout, self.training)
        if self.squeeze is not None:
            mixed = self.squeeze(mixed, lengths)
        return F.dropout(F.relu(hidden + mixed), self.dropout, self.training)


class ConvEncoder(SpeechEncoder):
    """Blocks of separable convolutions; nothing is attended to, so that time and memory grow as T (final).

    QuartzNet (Kriman et al., 2020) and MatchboxNet (Majumdar and Ginsburg, 2020) have plain blocks, Citrinet
    (Majumdar et al., 2021) scales channels as well. Frames are normalised one by one instead of over the batch,
    so that padding and the way a batch is split change nothing.

    Args:
        bins: C, features of a frame.
        width: D of all blocks.
        kernels: of each block.
        repeats: convolutions in a block.
        strides: of the convolutions before the blocks, such as ``[2]``; their product is the factor.
        squeeze: whether blocks scale channels by the whole utterance.
        last_kernel: of the convolution after the blocks, with dilation 2.
        dropout: probability, in training.

    Shape: ``B T C``, lengths_B -> ``B S D``, lengths_B

    Example:
        >>> import torch
        >>> encoder = ConvEncoder(bins=8, width=16, kernels=[3, 5], repeats=2)
        >>> encoder(torch.randn(1, 9, 8), torch.tensor([9])).hidden.shape
        torch.Size([1, 5, 16])
    """

    CONFIG_RULES = (("repeats >= 1 and width >= 1", "repeats and width are at least 1"),)

    def __init__(
        self,
        *,
        bins: int,
        width: int,
        kernels: Sequence[int],
        repeats: int = 1,
        strides: Sequence[int] = (2,),
        squeeze: bool = False,
        last_kernel: int = 15,
        dropout: float = 0.1,
    ) -> None:
        factor = math.prod(strides)
        super().__init__(bins=bins, width=width, factor=factor)
        if not strides or not kernels:
            raise ShapeError(
                "an encoder needs layers", where="ConvEncoder.strides, ConvEncoder.kernels", expected="at least one"
            )
        self.strides, self.dropout = tuple(strides), dropout
        first = [SeparableConv("C", bins, width, kernel=11, stride=strides[0])]
        rest = [SeparableConv("D", width, width, kernel=5, stride=stride) for stride in strides[1:]]
        self.stem = nn.ModuleList([*first, *rest])
        self.blocks = nn.ModuleList(
            ConvBlock(width, kernel=kernel, repeats=repeats, squeeze=squeeze, dropout=dropout) for kernel in kernels
        )
        self.last = SeparableConv("D", width, width, kernel=last_kernel, dilation=2)

    def forward(self, spectrogram: SpectrogramBTC, lengths: LengthsB) -> Encoded:
        hidden: Tensor = spectrogram
        for conv, stride in zip(self.stem, self.strides):
            hidden = F.dropout(F.relu(conv(hidden, lengths)), self.dropout, self.training)
            lengths = (lengths + stride - 1) // stride
        for block in self.blocks:
            hidden = block(hidden, lengths)
        return Encoded(masked(F.relu(self.last(hidden, lengths)), lengths), lengths)
