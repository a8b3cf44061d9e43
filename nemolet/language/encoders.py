"""Encoders of text: hidden states that have seen both sides, and the guess of masked tokens."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from nemolet.graph import Graph
from nemolet.module import NeuralModule
from nemolet.nn.embedding import Head, TextEmbedding
from nemolet.nn.feed_forward import ACTIVATIONS, ActivationName
from nemolet.nn.linear import Linear
from nemolet.nn.norm import NormName, make_norm
from nemolet.nn.transformer import Encoder
from nemolet.symbols import inputs_of
from nemolet.types import HiddenBTD, LogitsBTV, MaskBT, PositionsBT, SegmentsBT, TokenIdsBT, TokenTypesBT


class TextEncoder(NeuralModule):
    """Embeddings and a stack of blocks that look both ways: BERT, RoBERTa, ModernBERT and their kin (final).

    Args:
        vocab_size: number of tokens.
        stack: the blocks; positions and norms are theirs.
        token_types: number of token types; 0 for none.
        pooler: whether there is a layer for :meth:`pool`.
        pad_vocab_to: round the stored vocabulary up to a multiple; padding is never visible.

    Shape: tokens_BT -> hidden_BTD.

    Example:
        >>> import torch
        >>> encoder = TextEncoder(vocab_size=11, stack=Encoder(layers=1, width=8, heads=2), token_types=2)
        >>> encoder(torch.zeros(1, 4, dtype=torch.long)).shape
        torch.Size([1, 4, 8])
    """

    CONFIG_RULES: ClassVar = (
        ("vocab_size >= 1", "vocab_size is at least 1"),
        ("token_types >= 0", "token_types is at least 0"),
    )

    def __init__(
        self,
        *,
        vocab_size: int,
        stack: Encoder,
        token_types: int = 0,
        pooler: bool = False,
        pad_vocab_to: int = 1,
    ) -> None:
        width, entry = stack.width, stack.entry_width
        super().__init__(V=vocab_size, D=width)
        self.vocab_size, self.width, self.context = vocab_size, width, stack.max_length
        self.token_types = token_types
        embed = TextEmbedding(vocab_size, entry, types=token_types, pad_to_multiple_of=pad_vocab_to)
        inputs = inputs_of(self)
        hidden = embed(inputs.pop("tokens"), inputs.pop("types"))
        self.graph = Graph(stack(hidden, **inputs), names={"embed": embed, "stack": stack})
        self._embed = (embed,)  # a tuple: it is a part of the graph already
        self.pooler = Linear("D", "D", width, width, bias=True, init_std=0.02) if pooler else None

    def forward(
        self,
        tokens: TokenIdsBT,
        types: TokenTypesBT | None = None,
        segments: SegmentsBT | None = None,
        positions: PositionsBT | None = None,
        mask: MaskBT | None = None,
    ) -> HiddenBTD:
        hidden: Tensor = self.graph(tokens, types, segments, positions, mask)
        return hidden

    @property
    def embed(self) -> TextEmbedding:
        """The embedding, whose weights a head may share."""
        return self._embed[0]

    def pool(self, hidden_BTD: Tensor) -> Tensor:
        """One vector per text from its first token, by the layer that BERT learns for it. Shape: [B, D]."""
        first_BD = hidden_BTD[:, 0]
        return first_BD if self.pooler is None else self.pooler(first_BD).tanh()


class MaskedHead(NeuralModule):
    """Scores of all tokens after one more layer, with the weights of the embedding (BERT, 2018; final).

    Args:
        embed: the embedding whose weights are shared.
        width: size of the hidden states.
        activation: of the layer.
        norm: kind of the norm after it.
        norm_eps: added to the variance.
        bias: whether the layer and its norm have a bias.
        token_bias: whether each token has one.

    Shape: hidden_BTD -> logits_BTV.
    """

    def __init__(
        self,
        *,
        embed: TextEmbedding,
        width: int,
        activation: ActivationName = "gelu",
        norm: NormName = "layer",
        norm_eps: float = 1e-12,
        bias: bool = True,
        token_bias: bool = True,
    ) -> None:
        super().__init__(D=width, V=embed.tokens.vocab)
        entry = embed.tokens.width
        self.activate = ACTIVATIONS[activation]
        self.dense = Linear("D", "D", width, entry, bias=bias, init_std=0.02)
        self.norm = make_norm(norm, "D", entry, eps=norm_eps, bias=bias)
        self.head = Head("D", "V", tied=embed.tokens, bias=token_bias)

    def forward(self, hidden: HiddenBTD) -> LogitsBTV:
        logits_BTV: Tensor = self.head(self.norm(self.activate(self.dense(hidden))))
        return logits_BTV


class MaskedLM(NeuralModule):
    """A model that guesses masked tokens: an encoder and a head (final).

    Args:
        encoder: of the text.
        activation: of the head.
        norm_eps: of the head.
        bias: whether the layers of the head have a bias.
        token_bias: whether each token has one.

    Shape: tokens_BT -> logits_BTV.

    Example:
        >>> import torch
        >>> encoder = TextEncoder(vocab_size=11, stack=Encoder(layers=1, width=8, heads=2))
        >>> MaskedLM(encoder=encoder)(torch.zeros(1, 4, dtype=torch.long)).shape
        torch.Size([1, 4, 11])
    """

    def __init__(
        self,
        *,
        encoder: TextEncoder,
        activation: ActivationName = "gelu",
        norm_eps: float = 1e-12,
        bias: bool = True,
        token_bias: bool = True,
    ) -> None:
        super().__init__(V=encoder.vocab_size)
        self.vocab_size, self.context = encoder.vocab_size, encoder.context
        head = MaskedHead(
            embed=encoder.embed,
            width=encoder.width,
            activation=activation,
            norm_eps=norm_eps,
            bias=bias,
            token_bias=token_bias,
        )
        self.graph = Graph(head(encoder(**inputs_of(self))), names={"encoder": encoder, "head": head})

    def forward(
        self,
        tokens: TokenIdsBT,
        types: TokenTypesBT | None = None,
        segments: SegmentsBT | None = None,
        positions: PositionsBT | None = None,
        mask: MaskBT | None = None,
    ) -> LogitsBTV:
        logits: Tensor = self.graph(tokens, types, segments, positions, mask)
        return logits
