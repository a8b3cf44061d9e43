"""ECAPA-TDNN, an encoder for speakers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.nn.conv import Conv1d
from nemolet.nn.linear import Linear
from nemolet.nn.norm import LayerNorm
from nemolet.speech.convolutional import SqueezeExcite
from nemolet.speech.encoder import Encoded, SpeechEncoder
from nemolet.speech.features import masked
from nemolet.types import HiddenBTD, LengthsB, SpectrogramBTC


class Res2Block(NeuralModule):
    """Dilated convolutions over groups of channels, each reading what the last one found (final).

    Args:
        width: D.
        kernel: of each convolution.
        dilation: of each convolution.
        groups: of channels.

    Shape: hidden_BTD, lengths_B -> hidden_BTD
    """

    def __init__(self, width: int, *, kernel: int, dilation: int, groups: int) -> None:
        super().__init__(D=width)
        self.groups, part = groups, width // groups
        self.before = Linear("D", "D", width, width, bias=True)
        self.before_norm = LayerNorm("D", width)
        self.convs = nn.ModuleList(
            Conv1d("D", "D", part, part, kernel=kernel, dilation=dilation) for _ in range(groups - 1)
        )
        self.after = Linear("D", "D", width, width, bias=True)
        self.after_norm = LayerNorm("D", width)
        self.squeeze = SqueezeExcite(width, max(8, width // 8))

    def forward(self, hidden: HiddenBTD, lengths: LengthsB) -> HiddenBTD:
        first, *others = self.before_norm(F.relu(self.before(hidden))).chunk(self.groups, -1)
        parts, last = [first], torch.zeros_like(first)
        for part, conv in zip(others, self.convs):
            last = F.relu(conv(masked(part + last, lengths)))
            parts.append(last)
        mixed = self.after_norm(F.relu(self.after(torch.cat(parts, -1))))
        return hidden + self.squeeze(mixed, lengths)  # type: ignore[no-any-return]


class ECAPAEncoder(SpeechEncoder):
    """Blocks of dilated convolutions whose results are all joined (Desplanques et al., 2020; final).

    Args:
        bins: C, features of a frame.
        width: D of the result.
        channels: of the blocks.
        dilations: of each block.
        groups: of channels in a block.

    Shape: ``B T C``, lengths_B -> ``B T D``, lengths_B

    Example:
        >>> encoder = ECAPAEncoder(bins=8, width=24, channels=16, groups=4)
        >>> encoder(torch.randn(1, 9, 8), torch.tensor([9])).hidden.shape
        torch.Size([1, 9, 24])
    """

    CONFIG_RULES = (("channels % groups == 0", "channels must be divisible by groups"),)

    def __init__(
        self,
        *,
        bins: int,
        width: int = 1536,
        channels: int = 512,
        dilations: Sequence[int] = (2, 3, 4),
        groups: int = 8,
    ) -> None:
        super().__init__(bins=bins, width=width, factor=1)
        if channels % groups:
            raise ShapeError(
                "groups do not divide the channels",
                where="ECAPAEncoder.groups",
                expected=f"a divisor of {channels}",
                found=groups,
                fix="8 is usual",
            )
        self.stem = Conv1d("C", "D", bins, channels, kernel=5)
        self.stem_norm = LayerNorm("D", channels)
        self.blocks = nn.ModuleList(
            Res2Block(channels, kernel=3, dilation=dilation, groups=groups) for dilation in dilations
        )
        self.join = Linear("D", "D", channels * len(dilations), width, bias=True)

    def forward(self, spectrogram: SpectrogramBTC, lengths: LengthsB) -> Encoded:
        hidden = self.stem_norm(F.relu(self.stem(masked(spectrogram, lengths))))
        found = []
        for block in self.blocks:
            hidden = block(hidden, lengths)
            found.append(hidden)
        return Encoded(masked(F.relu(self.join(torch.cat(found, -1))), lengths), lengths)
