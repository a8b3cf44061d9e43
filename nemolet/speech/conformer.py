"""Conformer and FastConformer encoders, over whole utterances or chunk by chunk."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.module import NeuralModule
from nemolet.nn.conv import Conv1d
from nemolet.nn.feed_forward import FeedForward
from nemolet.nn.linear import Linear
from nemolet.nn.norm import LayerNorm
from nemolet.nn.relative_attention import (
    Past,
    RelativeAttention,
    RelativeContext,
    chunk_mask,
    joined,
    relative_distances,
)
from nemolet.speech.encoder import Encoded, SpeechEncoder
from nemolet.speech.subsampling import ConvSubsampling
from nemolet.types import HiddenBTD, LengthsB, MaskBT, SpectrogramBTC


class BlockState(NamedTuple):
    """What a block remembers of a stream: keys and values, and the last inputs of its convolution."""

    past: Past
    conv: Tensor


class ConvolutionModule(NeuralModule):
    """A gated convolution over each channel (Gulati et al., 2020; final).

    Frames are normalised one by one, not over the batch: padding, other utterances and the way a batch is split
    change nothing.

    Args:
        width: model width D.
        kernel: frames that an output sees.
        causal: whether no later frame is seen.
        dropout: of the result, in training.

    Shape: hidden_BTD, mask_BT -> hidden_BTD

    Example:
        >>> ConvolutionModule(4, kernel=3)(torch.zeros(1, 5, 4)).shape
        torch.Size([1, 5, 4])
    """

    def __init__(self, width: int, *, kernel: int = 31, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__(D=width)
        self.dropout, self.memory = dropout, kernel - 1
        self.value = Linear("D", "D", width, width, bias=True)
        self.gate = Linear("D", "D", width, width, bias=True)
        self.depthwise = Conv1d("D", "D", width, width, kernel=kernel, depthwise=True, causal=causal)
        self.norm = LayerNorm("D", width)
        self.out = Linear("D", "D", width, width, bias=True)

    def forward(self, hidden: HiddenBTD, mask: MaskBT | None = None) -> HiddenBTD:
        return self.finish(self.depthwise(self.gated(hidden, mask)))

    def gated(self, hidden_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """What the convolution reads; padding is zero, as beyond the end of a row that stands alone."""
        gated_BTD: Tensor = self.value(hidden_BTD) * self.gate(hidden_BTD).sigmoid()
        return gated_BTD if mask_BT is None else gated_BTD * mask_BT[..., None]

    def finish(self, mixed_BTD: Tensor) -> Tensor:
        """What follows the convolution."""
        return F.dropout(self.out(F.silu(self.norm(mixed_BTD))), self.dropout, self.training)


class ConformerBlock(NeuralModule):
    """Half a feed-forward, attention, convolution, half a feed-forward (Gulati et al., 2020; final).

    Args:
        width: model width D.
        heads: of attention.
        ffn: feed-forward width F.
        kernel: of the convolution.
        causal: of the convolution.
        dropout: of every branch, in training.

    Shape: hidden_BTD -> hidden_BTD
    """

    def __init__(self, width: int, heads: int, *, ffn: int, kernel: int, causal: bool, dropout: float) -> None:
        super().__init__(D=width)

        def feed_forward() -> FeedForward:
            return FeedForward(
                width,
                ffn,
                activation="silu",
                bias=True,
                dropout=dropout,
                init_std=width**-0.5,
                out_std=ffn**-0.5,
            )

        self.dropout = dropout
        self.first_norm, self.first = LayerNorm("D", width), feed_forward()
        self.attention_norm, self.attention = LayerNorm("D", width), RelativeAttention(width, heads, dropout=dropout)
        self.convolution_norm = LayerNorm("D", width)
        self.convolution = ConvolutionModule(width, kernel=kernel, causal=causal, dropout=dropout)
        self.second_norm, self.second = LayerNorm("D", width), feed_forward()
        self.norm = LayerNorm("D", width)

    def forward(self, hidden: HiddenBTD, context: RelativeContext, mask: MaskBT | None = None) -> HiddenBTD:
        hidden = hidden + 0.5 * self.first(self.first_norm(hidden))
        mixed = self.attention(self.attention_norm(hidden), context)
        hidden = hidden + F.dropout(mixed, self.dropout, self.training)
        hidden = hidden + self.convolution(self.convolution_norm(hidden), mask)
        hidden = hidden + 0.5 * self.second(self.second_norm(hidden))
        return self.norm(hidden)  # type: ignore[no-any-return]

    def start(self, batch: int) -> BlockState:
        """What is remembered before the first frame."""
        weight, heads = self.norm.weight, self.attention.content_bias.weight.shape
        nothing = weight.new_zeros(batch, 0, *heads)
        width = weight.shape[0]
        return BlockState(Past(nothing, nothing), weight.new_zeros(batch, self.convolution.memory, width))

    def advance(
        self, hidden_BTD: Tensor, context: RelativeContext, state: BlockState, keep: int
    ) -> tuple[Tensor, BlockState]:
        """The next chunk of a stream, and what is remembered of it: ``keep`` frames of keys and values."""
        hidden_BTD = hidden_BTD + 0.5 * self.first(self.first_norm(hidden_BTD))
        query, new = self.attention.project(self.attention_norm(hidden_BTD))
        known = joined(state.past, new)
        hidden_BTD = hidden_BTD + self.attention.attend(query, known, context)
        gated = self.convolution.gated(self.convolution_norm(hidden_BTD), None)
        hidden_BTD = hidden_BTD + self.convolution.finish(self.convolution.depthwise(gated, state.conv))
        hidden_BTD = hidden_BTD + 0.5 * self.second(self.second_norm(hidden_BTD))
        read = torch.cat((state.conv, gated), 1)
        return self.norm(hidden_BTD), BlockState(known.last(keep), read[:, read.shape[1] - self.convolution.memory :])


class ConformerEncoder(SpeechEncoder):
    """Conformer, or FastConformer with ``factor=8, separable=True, kernel=9`` (Rekesh et al., 2023; final).

    With ``chunk`` it reads in chunks: a frame sees its own chunk and some chunks before, convolutions see nothing
    later, and :class:`nemolet.speech.ConformerStream` computes the same from audio that is still arriving.

    Args:
        bins: C, features of a frame.
        layers: number of blocks L.
        width: model width D.
        heads: of attention.
        ffn: feed-forward width F; None for 4 D.
        kernel: frames the convolutions see.
        factor: frames of features for one hidden state: 2, 4 or 8.
        channels: of the subsampling; None for D.
        separable: whether the subsampling is separable.
        chunk: frames (hidden states) of a chunk; None for the whole utterance.
        left_chunks: how many earlier chunks a frame sees.
        dropout: probability, in training.

    Shape: ``B T C``, lengths_B -> ``B S D``, lengths_B

    Example:
        >>> encoder = ConformerEncoder(bins=8, layers=1, width=8, heads=2, kernel=3)
        >>> hidden, lengths = encoder(torch.randn(2, 20, 8), torch.tensor([20, 12]))
        >>> hidden.shape, lengths.tolist()
        (torch.Size([2, 5, 8]), [5, 3])
    """

    CONFIG_RULES = (
        ("width % heads == 0", "width must be divisible by heads"),
        ("layers >= 1", "layers is at least 1"),
        ("chunk >= 1", "chunk is at least 1; null for the whole utterance"),
        ("left_chunks >= 0", "left_chunks is at least 0"),
        ("dropout >= 0 and dropout < 1", "dropout is a probability below 1"),
    )

    def __init__(
        self,
        *,
        bins: int,
        layers: int,
        width: int,
        heads: int,
        ffn: int | None = None,
        kernel: int = 31,
        factor: int = 4,
        channels: int | None = None,
        separable: bool = False,
        chunk: int | None = None,
        left_chunks: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(bins=bins, width=width, factor=factor)
        self.chunk, self.left_chunks, self.dropout = chunk, left_chunks, dropout
        causal = chunk is not None
        self.subsampling = ConvSubsampling(
            bins=bins, width=width, factor=factor, channels=channels or width, separable=separable, causal=causal
        )
        self.blocks = nn.ModuleList(
            ConformerBlock(width, heads, ffn=ffn or 4 * width, kernel=kernel, causal=causal, dropout=dropout)
            for _ in range(layers)
        )

    def forward(self, spectrogram: SpectrogramBTC, lengths: LengthsB) -> Encoded:
        hidden_BTD, lengths_B = self.subsampling(spectrogram, lengths)
        size = hidden_BTD.shape[1]
        mask_BT = torch.arange(size, device=lengths_B.device) < lengths_B[:, None]
        allowed = chunk_mask(
            size, chunk=self.chunk, left_chunks=self.left_chunks, valid_BT=mask_BT, device=hidden_BTD.device
        )
        context = RelativeContext(relative_distances(size, size, self.width, device=hidden_BTD.device), allowed)
        hidden_BTD = F.dropout(hidden_BTD, self.dropout, self.training)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD, context, mask_BT)
        return Encoded(hidden_BTD * mask_BT[..., None], lengths_B)
