"""An encoder that learns from little text: tokens and their n-grams, neighbours, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.module import NeuralModule
from nemolet.nn.embedding import Embedding
from nemolet.nn.linear import Linear
from nemolet.nn.norm import LayerNorm
from nemolet.nn.transformer import Encoder
from nemolet.types import Hidden, HiddenBTD, Mask, MaskBT, NeuralType, TokenIdsBT

HiddenBUD = Annotated[Tensor, NeuralType("B U D", Hidden())]
MaskBU = Annotated[Tensor, NeuralType("B U", Mask())]

PRIME, BIG = 1_000_003, 2_038_074_743


class NgramEmbedding(NeuralModule):
    """A vector for each token and each run of tokens that ends there; runs share a table by hashing (final).

    The hashed rows follow fastText (Joulin et al., 2017): rare runs collide, frequent ones are learned.

    Args:
        vocab_size: number of tokens.
        width: size of a vector.
        orders: lengths of the runs.
        buckets: rows of the shared table.
        token_dropout: share of tokens whose vectors are left out, in training.

    Shape: tokens_BT, mask_BT -> hidden_BTD.

    Example:
        >>> NgramEmbedding(vocab_size=9, width=4, buckets=16)(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 4])
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        orders: Sequence[int] = (2, 3),
        buckets: int = 1 << 15,
        token_dropout: float = 0.0,
        init_std: float = 0.1,
    ) -> None:
        super().__init__(V=vocab_size, D=width)
        self.orders, self.buckets, self.token_dropout = tuple(orders), buckets, token_dropout
        self.tokens = Embedding("V", "D", vocab_size, width, init_std=init_std)
        self.runs = Embedding("V", "D", buckets, width, init_std=init_std) if self.orders else None

    def forward(self, tokens: TokenIdsBT, mask: MaskBT | None = None) -> HiddenBTD:
        hidden: Tensor = self.tokens(tokens)
        if self.runs is not None:
            for order in self.orders:
                hidden = hidden + self.runs(self.rows(tokens, order))
        if self.token_dropout and self.training:
            kept = torch.rand(tokens.shape, device=tokens.device) >= self.token_dropout
            hidden = hidden * kept[..., None]
        return hidden if mask is None else hidden * mask[..., None]

    def rows(self, tokens_BT: Tensor, order: int) -> Tensor:
        """The row of the run of ``order`` tokens that ends at each position."""
        return run_rows(tokens_BT, order, self.buckets)


def run_rows(ids_BT: Tensor, order: int, buckets: int) -> Tensor:
    """The row of the run of ``order`` ids that ends at each position, in a table that runs share by hashing."""
    mixed = torch.full_like(ids_BT, order)
    for back in range(order):
        shifted = F.pad(ids_BT + 1, (back, 0))[:, : ids_BT.shape[1]]
        mixed = (mixed * PRIME + shifted) % BIG
    return mixed % buckets


class Neighbours(NeuralModule):
    """Each position sees those beside it: a gated convolution on a normalised residual stream (final).

    Args:
        width: model width D.
        reach: how many positions to each side.
        dropout: of what is added, in training.

    Shape: hidden_BUD, mask_BU -> hidden_BUD; weight ``(2 D) ((2 reach + 1) D)``. Words or tokens are U here: a part
    of them does not see its neighbours, so ranks never cut them as they cut the T of a stack.
    """

    def __init__(self, *, width: int, reach: int = 1, dropout: float = 0.0) -> None:
        super().__init__(D=width)
        self.reach, self.dropout = reach, dropout
        self.norm = LayerNorm("D", width)
        window = 2 * reach + 1
        self.proj = Linear(f"({window} D={width})", f"(2 D={width})", window * width, 2 * width, bias=True)

    def forward(self, hidden: HiddenBUD, mask: MaskBU | None = None) -> HiddenBUD:
        here = self.norm(hidden)
        if mask is not None:
            here = here * mask[..., None]  # what lies behind the end is nothing, however long the batch is
        padded = F.pad(here, (0, 0, self.reach, self.reach))
        beside = torch.cat([padded[:, i : i + hidden.shape[1]] for i in range(2 * self.reach + 1)], dim=-1)
        value, gate = self.proj(beside).chunk(2, dim=-1)
        return hidden + F.dropout(value * gate.sigmoid(), self.dropout, self.training)


class NgramEncoder(NeuralModule):
    """Hidden states of a short text, for tasks with some thousand examples and no pre-training (final).

    Args:
        vocab_size: number of tokens; in a config it comes from the tokenizer.
        width: model width D.
        orders: lengths of the runs of tokens that have vectors.
        buckets: rows of their table.
        neighbours: number of gated convolutions.
        reach: how many positions each sees to either side.
        layers: number of transformer blocks above them.
        heads: of each.
        dropout: probability, in training.
        token_dropout: share of tokens that are left out, in training.

    Shape: tokens_BT, mask_BT -> hidden_BTD.

    Example:
        >>> encoder = NgramEncoder(vocab_size=9, width=8, buckets=16, layers=1, heads=2)
        >>> encoder(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 8])
    """

    CONFIG_RULES: ClassVar = (
        ("width >= 1 and buckets >= 1", "width and buckets are at least 1"),
        ("layers == 0 or width % heads == 0", "width must be divisible by heads"),
        ("dropout >= 0 and dropout < 1", "dropout is a probability below 1"),
        ("token_dropout >= 0 and token_dropout < 1", "token_dropout is a share below 1"),
    )

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int = 128,
        orders: Sequence[int] = (2, 3),
        buckets: int = 1 << 15,
        neighbours: int = 2,
        reach: int = 1,
        layers: int = 0,
        heads: int = 4,
        dropout: float = 0.1,
        token_dropout: float = 0.0,
    ) -> None:
        super().__init__(V=vocab_size, D=width)
        self.dropout = dropout
        self.embed = NgramEmbedding(
            vocab_size=vocab_size, width=width, orders=orders, buckets=buckets, token_dropout=token_dropout
        )
        self.neighbours = nn.ModuleList(
            Neighbours(width=width, reach=reach, dropout=dropout) for _ in range(neighbours)
        )
        self.blocks = Encoder(layers=layers, width=width, heads=heads, dropout=dropout) if layers else None

    def forward(self, tokens: TokenIdsBT, mask: MaskBT | None = None) -> HiddenBTD:
        hidden: Tensor = F.dropout(self.embed(tokens, mask), self.dropout, self.training)
        for layer in self.neighbours:
            hidden = layer(hidden, mask)
        return hidden if self.blocks is None else self.blocks(hidden, mask=mask)
