"""Transformer blocks and the stack of them."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.nn.attention import Attention
from nemolet.nn.cache import KVCache
from nemolet.nn.embedding import PositionEmbedding
from nemolet.nn.feed_forward import ActivationName, FeedForward
from nemolet.nn.mask import AttentionMask, MakeMask, attention_mask
from nemolet.nn.moe import MixtureOfExperts
from nemolet.nn.norm import LayerNorm, RMSNorm
from nemolet.nn.rope import RotaryEmbedding, Rotation
from nemolet.nn.router import Mixture
from nemolet.types import HiddenBTD, MaskBT, PositionsBT, SegmentsBT


class Block(NeuralModule):
    """Attention and feed-forward, each on a normalised residual stream (pre-norm; final).

    Args:
        attention: the attention layer.
        feed_forward: the feed-forward layer, or a mixture of experts.
        attention_norm: applied before attention.
        feed_forward_norm: applied before the feed-forward.
        dropout: of both branches, in training.

    Shape: hidden_BTD -> hidden_BTD.
    """

    def __init__(
        self,
        *,
        attention: Attention,
        feed_forward: FeedForward | MixtureOfExperts,
        attention_norm: LayerNorm | RMSNorm,
        feed_forward_norm: LayerNorm | RMSNorm,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.feed_forward_norm, self.feed_forward = feed_forward_norm, feed_forward
        self.dropout = dropout

    def forward(
        self,
        hidden: HiddenBTD,
        mask: AttentionMask,
        rotation: Rotation | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> HiddenBTD:
        mixed = self.attention(self.attention_norm(hidden), mask, rotation, cache, layer)
        hidden = hidden + (F.dropout(mixed, self.dropout, self.training) if self.dropout else mixed)
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))  # type: ignore[no-any-return]


class Decoder(NeuralModule):
    """A stack of causal transformer blocks with a final norm (final).

    Args:
        layers: number of blocks L.
        width: model width D.
        heads: query heads H.
        kv_heads: key/value heads G; None for as many as ``heads``.
        head_size: size of a head K; None for ``width / heads``.
        ffn: feed-forward width F; None for 4 D, or 8/3 D rounded up to 32 where gated.
        norm: ``"rms"`` or ``"layer"``.
        norm_eps: added to the variance.
        activation: of the feed-forward.
        gated: whether the feed-forward is gated.
        position: ``"rope"``, ``"learned"`` or ``"none"``.
        rope_base: base of the rotary wavelengths.
        rope_scaling: see :class:`nemolet.nn.RotaryEmbedding`.
        max_length: longest sequence; needed by learned positions.
        bias: whether linear layers and layer norms have a bias.
        qk_norm: whether queries and keys are normalised per head.
        window: how far back attention looks; None for everything.
        dropout: probability, in training.
        checkpointing: recompute activations in the backward pass: ``"none"``, ``"full"``, or ``"every_2"``
            for every second block.
        experts: the feed-forwards are mixtures of experts, each of width F; None for plain ones.
        init_std: standard deviation of the initial weights; what writes to the residual stream has it divided
            by the square root of 2 L (Radford et al., 2019).

    Shape: hidden_BTD -> hidden_BTD.

    Raises:
        ShapeError: for sizes that do not divide, or a sequence longer than learned positions.

    Example:
        >>> Decoder(layers=2, width=8, heads=2)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        *,
        layers: int,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        head_size: int | None = None,
        ffn: int | None = None,
        norm: Literal["rms", "layer"] = "rms",
        norm_eps: float = 1e-5,
        activation: ActivationName = "silu",
        gated: bool = True,
        position: Literal["rope", "learned", "none"] = "rope",
        rope_base: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        max_length: int = 1024,
        bias: bool = False,
        qk_norm: bool = False,
        window: int | None = None,
        dropout: float = 0.0,
        checkpointing: str = "none",
        experts: Mixture | None = None,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(D=width)
        self.window, self.max_length, self.dropout = window, max_length, dropout
        self.checkpoint_every = _checkpoint_every(checkpointing)
        out_std = init_std / (2 * layers) ** 0.5
        ffn = ffn or (-(-width * 8 // 3 // 32) * 32 if gated else 4 * width)

        def make_norm() -> LayerNorm | RMSNorm:
            if norm == "rms":
                return RMSNorm("D", width, eps=norm_eps)
            return LayerNorm("D", width, eps=norm_eps, bias=bias)

        def make_feed_forward() -> FeedForward | MixtureOfExperts:
            options: dict[str, Any] = {"activation": activation, "init_std": init_std, "out_std": out_std}
            if experts is not None:
                return MixtureOfExperts(width, ffn, experts, dropout=dropout, **options)
            return FeedForward(width, ffn, gated=gated, bias=bias, dropout=dropout, **options)

        def make_block() -> Block:
            return Block(
                attention=Attention(
                    width,
                    heads,
                    kv_heads,
                    head_size=head_size,
                    bias=bias,
                    qk_norm=qk_norm,
                    norm_eps=norm_eps,
                    dropout=dropout,
                    init_std=init_std,
                    out_std=out_std,
                ),
                feed_forward=make_feed_forward(),
                attention_norm=make_norm(),
                feed_forward_norm=make_norm(),
                dropout=dropout,
            )

        self.make_mask: MakeMask = attention_mask
        self.blocks = nn.ModuleList(make_block() for _ in range(layers))
        self.norm = make_norm()
        head_size = head_size or width // heads
        self.rope: RotaryEmbedding | None = None
        self.position: PositionEmbedding | None = None
        if position == "rope":
            self.rope = RotaryEmbedding(head_size, base=rope_base, scaling=rope_scaling)
        elif position == "learned":
            self.position = PositionEmbedding(max_length, width, init_std=init_std)

    def forward(
        self,
        hidden: HiddenBTD,
        segments: SegmentsBT | None = None,
        positions: PositionsBT | None = None,
        mask: MaskBT | None = None,
        cache: KVCache | None = None,
    ) -> HiddenBTD:
        length, offset = hidden.shape[1], 0 if cache is None else cache.length
        valid_BS = mask if cache is None else cache.valid_with(length, mask)
        attend = self.make_mask(
            length, offset=offset, segments_BT=segments, valid_BS=valid_BS, window=self.window, device=hidden.device
        )
        hidden = self._add_positions(hidden, positions, offset)
        rotation = None
        if self.rope is not None:
            rotation = self.rope(
                torch.arange(offset, offset + length, device=hidden.device)[None] if positions is None else positions
            )
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout, self.training)
        every = self.checkpoint_every if self.training and cache is None else 0
        for layer, block in enumerate(self.blocks):
            if every and layer % every == 0:
                hidden = checkpoint(block, hidden, attend, rotation, use_reentrant=False)
            else:
                hidden = block(hidden, attend, rotation, cache, layer)
        if cache is not None:
            cache.advance(length, valid_BS)
        return self.norm(hidden)  # type: ignore[no-any-return]

    def _add_positions(self, hidden_BTD: Tensor, positions_BT: Tensor | None, offset: int) -> Tensor:
        if self.position is None:
            return hidden_BTD
        if offset + hidden_BTD.shape[1] > self.max_length:
            raise ShapeError(
                "the sequence is longer than the learned positions",
                where=f"{self.label}.hidden",
                expected=f"at most {self.max_length}",
                found=offset + hidden_BTD.shape[1],
                fix="shorten the sequence, or build the model with a longer context",
            )
        return self.position(hidden_BTD, positions_BT, offset)  # type: ignore[no-any-return]


def _checkpoint_every(name: str) -> int:
    if name == "none":
        return 0
    if name == "full":
        return 1
    if name.startswith("every_") and name[6:].isdigit() and int(name[6:]) > 0:
        return int(name[6:])
    raise ShapeError(
        "unknown activation checkpointing",
        where="checkpointing",
        expected="none, full or every_n",
        found=name,
        fix="for example every_2",
    )
