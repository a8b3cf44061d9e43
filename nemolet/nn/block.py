"""One transformer block, and the plan by which a stack makes all of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from nemolet.module import NeuralModule
from nemolet.nn.attention import Attention, AttentionOptions, CrossAttention
from nemolet.nn.cache import KVCache
from nemolet.nn.feed_forward import ActivationName, FeedForward
from nemolet.nn.mask import AttentionMask
from nemolet.nn.moe import MixtureOfExperts
from nemolet.nn.norm import LayerNorm, NormName, RMSNorm, make_norm
from nemolet.nn.rope import Rotation
from nemolet.nn.router import Mixture
from nemolet.rules import Checked
from nemolet.types import HiddenBTD, MemoryBSD

Norm = LayerNorm | RMSNorm


@dataclass(frozen=True)
class ResidualOptions(Checked):
    """Where a stack normalises its residual stream.

    Args:
        order: ``"pre"`` normalises what enters a branch (GPT-2, Llama), ``"sandwich"`` also what leaves it (Gemma 2),
            ``"post"`` the stream after each branch was added (BERT).
        input_norm: whether the stream is normalised before the first block.
        final_norm: whether it is after the last one; None for all orders but ``"post"``.
        first_norm: whether the attention of the first block has a norm before it (ModernBERT has none).
    """

    order: Literal["pre", "post", "sandwich"] = "pre"
    input_norm: bool = False
    final_norm: bool | None = None
    first_norm: bool = True

    @property
    def ends_normalised(self) -> bool:
        """Whether there is a norm after the last block."""
        return self.order != "post" if self.final_norm is None else self.final_norm


class Block(NeuralModule):
    """Attention, perhaps attention to a memory, and feed-forward, each added to a residual stream (final).

    Args:
        attention: the attention layer.
        feed_forward: the feed-forward layer; any module from hidden states to hidden states.
        attention_norm: applied before attention, or after its sum where ``post``; None for no norm.
        feed_forward_norm: the same of the feed-forward.
        cross_attention: attention to a memory, in a decoder that has one.
        cross_norm: the norm of that.
        attention_out_norm: applied to what attention returns.
        feed_forward_out_norm: applied to what the feed-forward returns.
        post: whether norms come after the sums.
        dropout: of the attention branches, in training.

    Shape: hidden_BTD -> hidden_BTD.
    """

    def __init__(
        self,
        *,
        attention: Attention,
        feed_forward: NeuralModule,
        attention_norm: LayerNorm | RMSNorm | None,
        feed_forward_norm: LayerNorm | RMSNorm,
        cross_attention: CrossAttention | None = None,
        cross_norm: LayerNorm | RMSNorm | None = None,
        attention_out_norm: LayerNorm | RMSNorm | None = None,
        feed_forward_out_norm: LayerNorm | RMSNorm | None = None,
        post: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention, self.attention_out_norm = attention_norm, attention, attention_out_norm
        self.cross_norm, self.cross_attention = cross_norm, cross_attention
        self.feed_forward_norm, self.feed_forward = feed_forward_norm, feed_forward
        self.feed_forward_out_norm = feed_forward_out_norm
        self.post, self.dropout = post, dropout

    def forward(
        self,
        hidden: HiddenBTD,
        mask: AttentionMask,
        rotation: Rotation | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        memory: MemoryBSD | None = None,
        memory_mask: AttentionMask | None = None,
    ) -> HiddenBTD:
        mixed = self.attention(self._before(self.attention_norm, hidden), mask, rotation, cache, layer)
        hidden = self._add(hidden, mixed, self.attention_norm, self.attention_out_norm, self.dropout)
        if self.cross_attention is not None:
            inner = self._before(self.cross_norm, hidden)
            mixed = self.cross_attention(inner, memory, memory_mask, cache, layer)
            hidden = self._add(hidden, mixed, self.cross_norm, None, self.dropout)
        wide = self.feed_forward(self._before(self.feed_forward_norm, hidden))
        return self._add(hidden, wide, self.feed_forward_norm, self.feed_forward_out_norm)

    def _before(self, norm: Norm | None, stream_BTD: Tensor) -> Tensor:
        return stream_BTD if self.post or norm is None else norm(stream_BTD)

    def _add(
        self, stream_BTD: Tensor, branch_BTD: Tensor, norm: Norm | None, out_norm: Norm | None, dropout: float = 0.0
    ) -> Tensor:
        if out_norm is not None:
            branch_BTD = out_norm(branch_BTD)
        if dropout:
            branch_BTD = F.dropout(branch_BTD, dropout, self.training)
        stream_BTD = stream_BTD + branch_BTD
        return norm(stream_BTD) if self.post and norm is not None else stream_BTD


@dataclass(frozen=True)
class BlockPlan:
    """What the blocks of a stack have in common; it makes them one by one.

    Args:
        layers: number of blocks L, by which what writes to the stream starts smaller.
        width: model width D.
        heads: query heads H.
        kv_heads: key/value heads G.
        ffn: feed-forward width F.
        norm: kind of all norms.
        norm_eps: added to the variance.
        activation: of the feed-forward.
        gated: whether the feed-forward is gated.
        bias: whether linear layers and layer norms have a bias.
        qk_norm: whether queries and keys are normalised per head.
        attention: what attention does beside the usual.
        residual: where the stream is normalised.
        cross: whether blocks look at a memory.
        experts: how the feed-forward is divided; None where it is not.
        dropout: probability, in training.
        init_std: standard deviation of the initial weights.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int | None
    ffn: int | None
    norm: NormName
    norm_eps: float
    activation: ActivationName
    gated: bool
    bias: bool
    qk_norm: bool
    attention: AttentionOptions
    residual: ResidualOptions
    cross: bool
    experts: Mixture | None
    dropout: float
    init_std: float

    def make_norm(self, width: int | None = None) -> Norm:
        """A norm of the stream."""
        return make_norm(self.norm, "D", width or self.width, eps=self.norm_eps, bias=self.bias)

    def make_block(self, layer: int) -> Block:
        """The block at this place of the stack."""
        residual, sandwich = self.residual, self.residual.order == "sandwich"
        return Block(
            attention=self._attention(),
            feed_forward=self._feed_forward(layer),
            attention_norm=self.make_norm() if layer or residual.first_norm else None,
            feed_forward_norm=self.make_norm(),
            cross_attention=self._cross_attention() if self.cross else None,
            cross_norm=self.make_norm() if self.cross else None,
            attention_out_norm=self.make_norm() if sandwich else None,
            feed_forward_out_norm=self.make_norm() if sandwich else None,
            post=residual.order == "post",
            dropout=self.dropout,
        )

    @property
    def out_std(self) -> float:
        """Of what writes to the stream (Radford et al., 2019)."""
        return float(self.init_std / (2 * self.layers) ** 0.5)

    def _attention(self) -> Attention:
        return Attention(
            self.width,
            self.heads,
            self.kv_heads,
            bias=self.bias,
            options=self.attention,
            qk_norm=self.qk_norm,
            norm=self.norm,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            init_std=self.init_std,
            out_std=self.out_std,
        )

    def _cross_attention(self) -> CrossAttention:
        return CrossAttention(
            self.width,
            self.heads,
            self.kv_heads,
            bias=self.bias,
            options=self.attention,
            dropout=self.dropout,
            init_std=self.init_std,
            out_std=self.out_std,
        )

    def _feed_forward(self, layer: int) -> NeuralModule:
        """The feed-forward of one layer: the place to choose another kind of it."""
        usual = -(-self.width * 8 // 3 // 32) * 32 if self.gated else 4 * self.width
        if self.experts is not None:
            return MixtureOfExperts(
                self.width,
                self.ffn or usual,
                self.experts,
                activation=self.activation,
                dropout=self.dropout,
                init_std=self.init_std,
                out_std=self.out_std,
            )
        return FeedForward(
            self.width,
            self.ffn or usual,
            activation=self.activation,
            gated=self.gated,
            bias=self.bias,
            dropout=self.dropout,
            init_std=self.init_std,
            out_std=self.out_std,
        )
