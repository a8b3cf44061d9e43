"""One vector for a whole utterance."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from nemolet.module import NeuralModule
from nemolet.nn.linear import Linear
from nemolet.speech.features import masked
from nemolet.types import Axis, Hidden, HiddenBTD, LengthsB, NeuralType

PooledBO = Annotated[Tensor, NeuralType("B O", Hidden())]


class MeanPooling(NeuralModule):
    """The mean over all valid frames (final).

    Shape: hidden_BTD, lengths_B -> ``B D``

    Example:
        >>> MeanPooling(1)(torch.tensor([[[1.0], [3.0], [99.0]]]), torch.tensor([2])).tolist()
        [[2.0]]
    """

    def __init__(self, width: int) -> None:
        super().__init__(D=width, O=Axis("D", width))
        self.out_width = width

    def forward(self, hidden: HiddenBTD, lengths: LengthsB) -> PooledBO:
        return masked(hidden, lengths).sum(1) / lengths.clamp(min=1)[:, None]


class AttentivePooling(NeuralModule):
    """Mean and standard deviation over frames, weighed by a small network for each channel (Okabe et al., 2018; final).

    The network also sees the mean and the deviation of the whole utterance, as in ECAPA-TDNN.

    Args:
        width: D of the frames.
        hidden: of the network.

    Shape: hidden_BTD, lengths_B -> ``B D`` of twice the width.

    Example:
        >>> AttentivePooling(4, hidden=8)(torch.randn(2, 5, 4), torch.tensor([5, 2])).shape
        torch.Size([2, 8])
    """

    def __init__(self, width: int, *, hidden: int = 128) -> None:
        super().__init__(D=width, O=Axis("D", 2 * width))
        self.out_width = 2 * width
        self.of_frame = Linear("D", "F", width, hidden, bias=True)
        self.of_whole = Linear("D", "F", 2 * width, hidden)
        self.score = Linear("F", "D", hidden, width)

    def forward(self, hidden: HiddenBTD, lengths: LengthsB) -> PooledBO:
        valid_BT1 = (torch.arange(hidden.shape[1], device=lengths.device) < lengths[:, None])[..., None]
        even_BT1 = valid_BT1 / lengths.clamp(min=1)[:, None, None]
        whole = _statistics(hidden, even_BT1)
        score_BTD = self.score(torch.tanh(self.of_frame(hidden) + self.of_whole(whole)[:, None]))
        least = torch.finfo(score_BTD.dtype).min
        weight_BTD = score_BTD.masked_fill(~valid_BT1, least).softmax(1).masked_fill(~valid_BT1, 0.0)
        return _statistics(hidden, weight_BTD)


def _statistics(hidden_BTD: Tensor, weight: Tensor) -> Tensor:
    """Weighed mean and standard deviation, side by side."""
    mean_B1D = (hidden_BTD * weight).sum(1, keepdim=True)
    variance_BD = ((hidden_BTD - mean_B1D).square() * weight).sum(1)
    return torch.cat((mean_B1D[:, 0], variance_BD.clamp(min=1e-6).sqrt()), -1)
