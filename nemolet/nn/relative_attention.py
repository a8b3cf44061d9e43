"""Attention that knows how far apart two frames are, over all of them or chunk by chunk."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.nn.linear import Linear
from nemolet.types import Hidden, HiddenBTD, NeuralType


class RelativeContext(NamedTuple):
    """What all layers of an encoder share: distances as vectors, and who may look at whom.

    ``distances`` is [R, D], from S - 1 frames back to T - 1 frames ahead. ``allowed`` is boolean,
    [B or 1, 1, T, S]; None where all may.
    """

    distances: Tensor
    allowed: Tensor | None


class Past(NamedTuple):
    """Keys and values of earlier frames, ``[B, S, H, K]``."""

    keys: Tensor
    values: Tensor

    def last(self, frames: int) -> Past:
        """Those of the last so many frames."""
        start = max(0, self.keys.shape[1] - frames)
        return Past(self.keys[:, start:], self.values[:, start:])


QueryBTHK = Annotated[Tensor, NeuralType("B T H K", Hidden())]


class HeadBias(NeuralModule):
    """A vector for each head, added to its queries (final).

    Args:
        heads: H.
        head_size: K.

    Shape: ``B T H K -> B T H K``; weight ``H K``.
    """

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__(H=heads, K=head_size)
        self.weight = nn.Parameter(torch.zeros(heads, head_size))
        self.declare_axes(weight=f"H={heads} K={head_size}")

    def forward(self, query: QueryBTHK) -> QueryBTHK:
        return query + self.weight


class RelativeAttention(NeuralModule):
    """Self-attention with relative positions (Dai et al., 2019, section 3.3; final).

    A score is the product of a key with the query, plus that of the distance's vector with the query, each with a
    learned bias added to the query.

    Args:
        width: model width D.
        heads: heads H.
        dropout: of attention weights, in training.

    Shape: hidden_BTD -> hidden_BTD; qkv weight ``(H 3 K) D``, position weight ``(H K) D``, biases ``H K``.

    Raises:
        ShapeError: where heads do not divide the width.

    Example:
        >>> hidden = torch.randn(1, 5, 8)
        >>> RelativeAttention(8, 2)(hidden, RelativeContext(relative_distances(5, 5, 8), None)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__(D=width)
        if width % heads or width % 2:
            raise ShapeError(
                "heads do not divide the width",
                where="RelativeAttention.heads",
                expected=f"a divisor of {width}, which is even",
                found=heads,
                fix="choose another width or number of heads",
            )
        self.head_size, self.dropout = width // heads, dropout
        self.qkv = Linear("D", f"(H={heads} 3 K={self.head_size})", width, 3 * width, bias=True)
        self.position = Linear("D", f"(H={heads} K={self.head_size})", width, width)
        self.out = Linear(f"(H={heads} K={self.head_size})", "D", width, width, bias=True)
        self.content_bias = HeadBias(heads, self.head_size)
        self.position_bias = HeadBias(heads, self.head_size)

    def forward(self, hidden: HiddenBTD, context: RelativeContext, past: Past | None = None) -> HiddenBTD:
        query, new = self.project(hidden)
        return self.attend(query, new if past is None else joined(past, new), context)

    def project(self, hidden_BTD: Tensor) -> tuple[Tensor, Past]:
        """Queries [B, T, H, K], and keys and values that a stream keeps."""
        batch, length, _ = hidden_BTD.shape
        query, key, value = self.qkv(hidden_BTD).view(batch, length, -1, 3, self.head_size).unbind(3)
        return query, Past(key, value)

    def attend(self, query_BTHK: Tensor, known: Past, context: RelativeContext) -> Tensor:
        """Mix values of all known frames."""
        batch, length = query_BTHK.shape[:2]
        frames = known.keys.shape[1]
        distance_RHK = self.position(context.distances.to(query_BTHK.dtype)).unflatten(-1, (-1, self.head_size))
        by_distance_BHTR = torch.einsum("bthk,rhk->bhtr", self.position_bias(query_BTHK), distance_RHK)
        score_BHTS = aligned(by_distance_BHTR, frames) * self.head_size**-0.5
        if context.allowed is not None:
            score_BHTS = score_BHTS.masked_fill(~context.allowed, float("-inf"))
        mixed_BHTK = F.scaled_dot_product_attention(
            self.content_bias(query_BTHK).transpose(1, 2),
            known.keys.transpose(1, 2),
            known.values.transpose(1, 2),
            attn_mask=score_BHTS,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(mixed_BHTK.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]


def joined(past: Past, new: Past) -> Past:
    """Earlier frames followed by new ones."""
    return Past(torch.cat((past.keys, new.keys), 1), torch.cat((past.values, new.values), 1))


def relative_distances(queries: int, keys: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """A vector of sines and cosines for each distance from ``keys - 1`` back to ``queries - 1`` ahead, ``[R, D]``.

    Example:
        >>> relative_distances(2, 3, 4).shape
        torch.Size([4, 4])
    """
    steps = torch.arange(keys - 1, -queries, -1, device=device, dtype=torch.float32)
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles_RK = steps[:, None] * rates
    return torch.stack((angles_RK.sin(), angles_RK.cos()), -1).flatten(1)


def aligned(by_distance_BHTR: Tensor, keys: int) -> Tensor:
    """From a score for each distance to one for each key: row t begins one distance earlier than row t - 1.

    Example:
        >>> aligned(torch.tensor([[[[2, 1, 0, -1], [2, 1, 0, -1]]]]), 3).tolist()  # distances of 2 queries to 3 keys
        [[[[1, 0, -1], [2, 1, 0]]]]
    """
    batch, heads, queries, distances = by_distance_BHTR.shape
    if queries == 1:
        return by_distance_BHTR[..., :keys]
    flat = by_distance_BHTR.flatten(2)[..., queries - 1 : queries - 1 + queries * (distances - 1)]
    return flat.view(batch, heads, queries, distances - 1)[..., :keys]


def chunk_mask(
    length: int, *, chunk: int | None, left_chunks: int, valid_BT: Tensor | None, device: torch.device | None = None
) -> Tensor | None:
    """Who may look at whom where frames are read in chunks: a chunk sees itself and some chunks before.

    Args:
        length: T.
        chunk: frames in a chunk; None for all frames.
        left_chunks: how many earlier chunks are seen.
        valid_BT: False at padding, which nobody sees; None where there is none.
        device: where the mask is made.

    Example:
        >>> chunk_mask(4, chunk=2, left_chunks=0, valid_BT=None).int()[0, 0].tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """
    allowed = None
    frame_T = torch.arange(length, device=device)
    if chunk is not None:
        number_T = frame_T // chunk
        behind_TS = number_T[:, None] - number_T[None, :]
        allowed = ((behind_TS >= 0) & (behind_TS <= left_chunks))[None, None]
    if valid_BT is not None:
        # A padded query sees itself, since a row without any key has no softmax.
        seen = valid_BT[:, None, None, :]
        allowed = (seen if allowed is None else allowed & seen) | (frame_T[:, None] == frame_T)
    return allowed
