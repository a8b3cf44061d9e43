"""Attention with one, several or grouped key/value heads."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch.nn.functional as F
from torch import Tensor

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.nn.cache import KVCache
from nemolet.nn.linear import Linear
from nemolet.nn.mask import AttentionMask
from nemolet.nn.norm import RMSNorm
from nemolet.nn.rope import Rotation, heads_first, rotate
from nemolet.types import HiddenBTD


class AttentionCore(Protocol):
    """What mixes values once queries and keys are made; replaced where a sequence lies on several devices.

    Shape: query [B, T, H, K], key and value [B, S, G, K] -> [B, T, H, K].
    """

    def __call__(
        self, query_BTHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor, mask: AttentionMask, dropout: float
    ) -> Tensor: ...


def scaled_dot_product(
    query_BTHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor, mask: AttentionMask, dropout: float
) -> Tensor:
    """Attention on one device."""
    mixed_BHTK = F.scaled_dot_product_attention(
        query_BTHK.transpose(1, 2),
        key_BSGK.transpose(1, 2),
        value_BSGK.transpose(1, 2),
        attn_mask=mask.allowed,
        is_causal=mask.causal,
        dropout_p=dropout,
        enable_gqa=query_BTHK.shape[2] != key_BSGK.shape[2],
    )
    return mixed_BHTK.transpose(1, 2)


class Attention(NeuralModule):
    """Self-attention by ``scaled_dot_product_attention`` (Vaswani et al., 2017; Ainslie et al., 2023; final).

    Queries, keys and values come from one product. Its rows are grouped by key/value head, so that the
    weight can be sharded on G: for each group its queries, then its key, then its value.

    Args:
        width: model width D.
        heads: query heads H.
        kv_heads: key/value heads G; None for as many as ``heads``, 1 for multi-query.
        head_size: K; None for ``width / heads``.
        bias: whether the projections have a bias.
        qk_norm: whether queries and keys are normalised per head (Dehghani et al., 2023).
        dropout: of attention weights, in training.
        init_std: standard deviation of the initial weights.
        out_std: that of the output projection.

    Shape: hidden_BTD -> hidden_BTD; qkv weight ``(G R K) D`` with R = H/G + 2, out weight ``D (H K)``.

    Raises:
        ShapeError: where heads do not divide.

    Example:
        >>> import torch
        >>> Attention(8, 4, 2)(torch.zeros(1, 3, 8), AttentionMask(None, causal=True)).shape
        torch.Size([1, 3, 8])
    """

    branch: ClassVar[bool] = True

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        head_size: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        init_std: float = 0.02,
        out_std: float = 0.02,
    ) -> None:
        super().__init__(D=width)
        kv_heads = heads if kv_heads is None else kv_heads
        if head_size is None and width % heads:
            raise ShapeError(
                "heads do not divide the width",
                where="Attention.heads",
                expected=f"a divisor of {width}",
                found=heads,
                fix=f"set heads={_nearest_divisor(width, heads)}, or give head_size",
            )
        if heads % kv_heads:
            raise ShapeError(
                "key/value heads do not divide the query heads",
                where="Attention.kv_heads",
                expected=f"a divisor of {heads}",
                found=kv_heads,
                fix=f"set kv_heads={_nearest_divisor(heads, kv_heads)}",
            )
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, head_size or width // heads
        self.queries_per_group, self.dropout = heads // kv_heads, dropout
        self.core: AttentionCore = scaled_dot_product
        rows = self.queries_per_group + 2
        self.qkv = Linear(
            "D",
            f"(G={kv_heads} {rows} K={self.head_size})",
            width,
            kv_heads * rows * self.head_size,
            bias=bias,
            init_std=init_std,
        )
        self.out = Linear(
            f"(H={heads} K={self.head_size})", "D", heads * self.head_size, width, bias=bias, init_std=out_std
        )
        self.query_norm = RMSNorm("K", self.head_size, eps=norm_eps) if qk_norm else None
        self.key_norm = RMSNorm("K", self.head_size, eps=norm_eps) if qk_norm else None

    def forward(
        self,
        hidden: HiddenBTD,
        mask: AttentionMask,
        rotation: Rotation | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> HiddenBTD:
        batch, length, _ = hidden.shape
        # The heads are counted from the projection, which may hold a share of them.
        qkv = self.qkv(hidden).view(batch, length, -1, self.queries_per_group + 2, self.head_size)
        query, key, value = self._split(qkv, rotation)
        if cache is not None:
            key, value = cache.update(layer, key, value)
        mixed_BTHK = self.core(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.out(mixed_BTHK.reshape(batch, length, -1))  # type: ignore[no-any-return]

    def _split(self, qkv: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, K], keys and values [B, T, G, K]."""
        query, key, value = qkv.split((self.queries_per_group, 1, 1), dim=3)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
            value = heads_first(value)
        return query.flatten(2, 3), key.squeeze(3), value.squeeze(3)


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))
