"""An encoder of bidirectional LSTMs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from nemolet.nn.linear import Linear
from nemolet.nn.norm import LayerNorm
from nemolet.nn.recurrent import LSTM
from nemolet.speech.encoder import Encoded, SpeechEncoder
from nemolet.speech.features import masked
from nemolet.speech.subsampling import ConvSubsampling
from nemolet.types import LengthsB, SpectrogramBTC


class LSTMEncoder(SpeechEncoder):
    """Fewer frames, then LSTMs that read both ways, each projected back to D (final).

    Args:
        bins: C, features of a frame.
        layers: number of LSTMs.
        width: D of the result.
        hidden: F of each direction.
        factor: frames of features for one hidden state: 2, 4 or 8.
        channels: of the subsampling.
        dropout: probability, in training.

    Shape: ``B T C``, lengths_B -> ``B S D``, lengths_B

    Example:
        >>> import torch
        >>> encoder = LSTMEncoder(bins=8, layers=1, width=8, hidden=4, channels=4)
        >>> encoder(torch.randn(1, 9, 8), torch.tensor([9])).hidden.shape
        torch.Size([1, 5, 8])
    """

    CONFIG_RULES = (("layers >= 1", "layers is at least 1"),)

    def __init__(
        self,
        *,
        bins: int,
        layers: int,
        width: int,
        hidden: int,
        factor: int = 2,
        channels: int = 32,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(bins=bins, width=width, factor=factor)
        self.dropout = dropout
        self.subsampling = ConvSubsampling(bins=bins, width=width, factor=factor, channels=channels)
        self.layers = nn.ModuleList(LSTM(width, hidden, bidirectional=True) for _ in range(layers))
        self.project = nn.ModuleList(Linear("F", "D", 2 * hidden, width, bias=True) for _ in range(layers))
        self.norms = nn.ModuleList(LayerNorm("D", width) for _ in range(layers))

    def forward(self, spectrogram: SpectrogramBTC, lengths: LengthsB) -> Encoded:
        hidden, lengths = self.subsampling(spectrogram, lengths)
        for layer, project, norm in zip(self.layers, self.project, self.norms):
            mixed = project(layer(norm(hidden), lengths))
            hidden = hidden + F.dropout(mixed, self.dropout, self.training)
        return Encoded(masked(hidden, lengths), lengths)
