"""Tables of vectors: token embedding, output head, learned positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.types import Axis, HiddenBTD, LogitsBTV, PositionsBT, TokenIdsBT


def padded(vocab: int, multiple: int) -> int:
    """The size of a vocabulary rounded up to a multiple."""
    return -(-vocab // multiple) * multiple


class Embedding(NeuralModule):
    """A vector for each token (final).

    Args:
        token_axis: letter of the vocabulary.
        width_axis: letter of the vectors.
        vocab: number of tokens.
        width: size of a vector.
        pad_to_multiple_of: rows of the table are rounded up to it; the extra rows are never used.
        init_std: standard deviation of the initial vectors.

    Shape: tokens_BT -> hidden_BTD; weight ``V D``.

    Example:
        >>> Embedding("V", "D", 10, 4)(torch.tensor([[1, 2]])).shape
        torch.Size([1, 2, 4])
    """

    def __init__(
        self,
        token_axis: str,
        width_axis: str,
        vocab: int,
        width: int,
        *,
        pad_to_multiple_of: int = 1,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(V=Axis(token_axis, vocab), D=Axis(width_axis, width))
        self.vocab, self.width = vocab, width
        rows = padded(vocab, pad_to_multiple_of)
        self.weight = nn.Parameter(torch.empty(rows, width).normal_(std=init_std))
        self.declare_axes(weight=f"{token_axis}={rows} {width_axis}={width}")

    def forward(self, tokens: TokenIdsBT) -> HiddenBTD:
        return F.embedding(tokens, self.weight)


class Head(NeuralModule):
    """Scores of all tokens from a hidden state (final).

    Args:
        in_axis: letter of the hidden states.
        out_axis: letter of the vocabulary.
        width: size of a hidden state; taken from ``tied`` where that is given.
        vocab: number of tokens; likewise.
        tied: an embedding whose weight is shared.
        softcap: bound the scores smoothly to this magnitude (Gemma 2, 2024).
        pad_to_multiple_of: rows of an untied weight are rounded up; padding never shows in the scores.
        init_std: standard deviation of an untied weight.

    Shape: hidden_BTD -> logits_BTV; weight ``V D``.

    Raises:
        ShapeError: where neither ``tied`` nor both sizes are given.

    Example:
        >>> head = Head("D", "V", tied=Embedding("V", "D", 10, 4))
        >>> head(torch.zeros(1, 2, 4)).shape
        torch.Size([1, 2, 10])
    """

    def __init__(
        self,
        in_axis: str,
        out_axis: str,
        width: int | None = None,
        vocab: int | None = None,
        *,
        tied: Embedding | None = None,
        softcap: float | None = None,
        pad_to_multiple_of: int = 1,
        init_std: float = 0.02,
    ) -> None:
        width = tied.width if tied is not None else width
        vocab = tied.vocab if tied is not None else vocab
        if width is None or vocab is None:
            raise ShapeError(
                "a head needs its sizes",
                where="Head",
                expected="tied=..., or width and vocab",
                found=f"width={width}, vocab={vocab}",
                fix="give both sizes, or an embedding to share",
            )
        super().__init__(D=Axis(in_axis, width), V=Axis(out_axis, vocab))
        self.vocab, self.softcap, self.tied = vocab, softcap, tied is not None
        rows = padded(vocab, pad_to_multiple_of)
        if tied is not None:
            self.weight = tied.weight
        else:
            self.weight = nn.Parameter(torch.empty(rows, width).normal_(std=init_std))
        self.declare_axes(weight=f"{out_axis}={self.weight.shape[0]} {in_axis}={width}")

    def forward(self, hidden: HiddenBTD, last_only: bool = False) -> LogitsBTV:
        if last_only:  # decoding looks at the last position only; a prompt need not be scored
            hidden = hidden[:, -1:]
        weight = self.weight if self.weight.shape[0] == self.vocab else self.weight[: self.vocab]
        logits_BTV = F.linear(hidden, weight)
        return logits_BTV if self.softcap is None else self.softcap * torch.tanh(logits_BTV / self.softcap)


class PositionEmbedding(NeuralModule):
    """A learned vector for each position (final).

    Args:
        max_length: number of positions.
        width: size of a vector.
        init_std: standard deviation of the initial vectors.

    Shape: hidden_BTD, positions_BT -> hidden_BTD; weight ``T D``.

    Example:
        >>> PositionEmbedding(8, 4)(torch.zeros(1, 3, 4), torch.arange(3)[None]).shape
        torch.Size([1, 3, 4])
    """

    def __init__(self, max_length: int, width: int, *, init_std: float = 0.02) -> None:
        super().__init__(D=width)
        self.max_length = max_length
        self.weight = nn.Parameter(torch.empty(max_length, width).normal_(std=init_std))
        self.declare_axes(weight=f"T={max_length} D")

    def forward(self, hidden: HiddenBTD, positions: PositionsBT | None = None, offset: int = 0) -> HiddenBTD:
        if positions is None:  # from ``offset`` on: a slice, where looking up each would be slower
            return hidden + self.weight[offset : offset + hidden.shape[1]]
        return hidden + F.embedding(positions, self.weight)
