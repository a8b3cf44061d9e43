"""Fewer frames before the expensive layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.nn.conv import Conv2d
from nemolet.nn.linear import Linear
from nemolet.speech.encoder import Encoded
from nemolet.speech.features import masked
from nemolet.types import LengthsB, SpectrogramBTC


class ConvSubsampling(NeuralModule):
    """Strided convolutions over time and features, then a projection (final).

    Each halves both axes. Padding is zero before every convolution, so that it stands for nothing, as the end
    of an utterance alone does. An output depends on no frame after its own ``factor``-th where causal.

    Args:
        bins: C, features of a frame.
        width: D of the result.
        factor: 2, 4 or 8, how many frames become one.
        channels: of the convolutions.
        separable: all but the first are split into one over each channel and one over channels, as in
            FastConformer (Rekesh et al., 2023).
        causal: whether no later frame is seen.

    Shape: ``B T C``, lengths_B -> ``B S D``, lengths_B

    Example:
        >>> layer = ConvSubsampling(bins=8, width=4, factor=4, channels=2)
        >>> hidden, lengths = layer(torch.zeros(2, 10, 8), torch.tensor([10, 5]))
        >>> hidden.shape, lengths.tolist()
        (torch.Size([2, 3, 4]), [3, 2])
    """

    def __init__(
        self, *, bins: int, width: int, factor: int = 4, channels: int, separable: bool = False, causal: bool = False
    ) -> None:
        super().__init__(C=bins, D=width)
        if factor not in (2, 4, 8):
            raise ShapeError(
                "frames are halved one, two or three times",
                where="ConvSubsampling.factor",
                expected="2, 4 or 8",
                found=factor,
                fix="4 is usual for a Conformer, 8 for a FastConformer",
            )
        self.factor = factor
        self.stages = nn.ModuleList()
        size = bins
        for stage in range(factor.bit_length() - 1):
            split = separable and stage > 0
            inputs = channels if stage else 1
            self.stages.append(Conv2d("C", "C", inputs, channels, kernel=3, stride=2, depthwise=split, causal=causal))
            self.stages.append(Conv2d("C", "C", channels, channels, kernel=1) if split else nn.Identity())
            size = halved(size)
        self.project = Linear(f"(C={channels} {size})", "D", channels * size, width, bias=True)

    def forward(self, spectrogram: SpectrogramBTC, lengths: LengthsB) -> Encoded:
        plane, left = spectrogram[:, None], lengths
        for strided, mix in zip(self.stages[::2], self.stages[1::2]):
            plane = F.relu(mix(strided(_masked_plane(plane, left))))
            left = halved(left)
        hidden_BTD = self.project(plane.transpose(1, 2).flatten(2))
        return Encoded(masked(hidden_BTD, left), left)

    @property
    def memory(self) -> int:
        """How many earlier frames of features the next ones need, a multiple of ``factor`` (where causal)."""
        return 2 * self.factor


def halved(size):  # type: ignore[no-untyped-def]  # of a number or a tensor of numbers
    """Outputs of a convolution with stride 2."""
    return (size + 1) // 2


def _masked_plane(plane_BITX: Tensor, lengths_B: Tensor) -> Tensor:
    valid_BT = torch.arange(plane_BITX.shape[2], device=lengths_B.device) < lengths_B[:, None]
    return plane_BITX * valid_BT[:, None, :, None]
