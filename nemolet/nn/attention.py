"""Attention with one, several or grouped key/value heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.nn.cache import KVCache
from nemolet.nn.linear import Linear
from nemolet.nn.mask import AttentionMask
from nemolet.nn.norm import NormName, make_norm
from nemolet.nn.rope import Rotation, heads_first, rotate
from nemolet.rules import Checked
from nemolet.types import HiddenBTD, MemoryBSD


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
    half_on_cpu = query_BTHK.device.type == "cpu" and query_BTHK.dtype in (torch.bfloat16, torch.float16)
    if half_on_cpu and (query_BTHK.shape[1] == 1 or (query_BTHK.requires_grad and key_BSGK.shape[1] <= 512)):
        # torch's kernel takes twice as long and more, here for one query, there forth and back (2.13).
        return _PRODUCTS(query_BTHK, key_BSGK, value_BSGK, mask, dropout)
    return _kernel(query_BTHK, key_BSGK, value_BSGK, mask, dropout)


def _kernel(query_BTHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor, mask: AttentionMask, dropout: float) -> Tensor:
    allowed = mask.allowed
    if allowed is not None and allowed.is_floating_point():
        allowed = allowed.to(query_BTHK.dtype)
    mixed_BHTK = F.scaled_dot_product_attention(
        query_BTHK.transpose(1, 2),
        key_BSGK.transpose(1, 2),
        value_BSGK.transpose(1, 2),
        attn_mask=allowed,
        is_causal=mask.causal,
        dropout_p=dropout,
        enable_gqa=query_BTHK.shape[2] != key_BSGK.shape[2],
    )
    return mixed_BHTK.transpose(1, 2)


@dataclass(frozen=True)
class PlainAttention:
    """Attention by products and a softmax between them; scores take T x S numbers a head.

    Args:
        cap: scores are bounded smoothly to this magnitude (Gemma 2, 2024), which no kernel does; None for no bound.
    """

    cap: float | None = None

    def __call__(
        self, query_BTHK: Tensor, key_BSGK: Tensor, value_BSGK: Tensor, mask: AttentionMask, dropout: float
    ) -> Tensor:
        weights_BGRTS = attention_scores(query_BTHK, key_BSGK, mask, cap=self.cap).softmax(-1)
        weights_BGXS = F.dropout(weights_BGRTS, dropout).flatten(2, 3)
        mixed_BHTK = (weights_BGXS @ value_BSGK.transpose(1, 2)).view(query_BTHK.transpose(1, 2).shape)
        return mixed_BHTK.transpose(1, 2)


_PRODUCTS = PlainAttention()


def attention_scores(query_BTHK: Tensor, key_BSGK: Tensor, mask: AttentionMask, *, cap: float | None = None) -> Tensor:
    """How well each key answers each query, minus infinity where one may not look. Shape: [B, G, R, T, S], R = H/G.

    Args:
        query_BTHK: queries.
        key_BSGK: keys.
        mask: who may look at whom.
        cap: bound of the scores; None for none.

    Example:
        >>> query = key = torch.ones(1, 2, 1, 4)
        >>> attention_scores(query, key, AttentionMask(None, causal=True))[0, 0, 0].tolist()
        [[2.0, -inf], [2.0, 2.0]]
    """
    length, size = query_BTHK.shape[1], query_BTHK.shape[3]
    query_BGXK = (query_BTHK * size**-0.5).transpose(1, 2).unflatten(1, (key_BSGK.shape[2], -1)).flatten(2, 3)
    scores: Tensor = (query_BGXK @ key_BSGK.permute(0, 2, 3, 1)).unflatten(2, (-1, length))
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    allowed = mask.allowed
    if mask.causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    elif allowed is not None and allowed.is_floating_point():  # numbers to add, one row per query head or for all
        grouped_by_key = allowed.unflatten(1, (-1, 1) if allowed.shape[1] == 1 else scores.shape[1:3])
        scores = scores + grouped_by_key.to(scores.dtype)
    elif allowed is not None:
        scores = scores.masked_fill(~allowed[:, :, None], -torch.inf)
    return scores


@dataclass(frozen=True)
class AttentionOptions(Checked):
    """What the attention of an architecture does beside the usual.

    Args:
        head_size: K; None for ``width / heads``.
        bias: whether queries, keys and values have a bias; None for what the other projections have.
        out_bias: whether the output has one; likewise.
        scale: factor of the scores; None for ``K ** -0.5``.
        softcap: bound the scores smoothly to this magnitude (Gemma 2, 2024); None for no bound.
        rotary: share of each head that rotary positions turn (partial rotary, Phi-3).
    """

    head_size: int | None = None
    bias: bool | None = None
    out_bias: bool | None = None
    scale: float | None = None
    softcap: float | None = None
    rotary: float = 1.0

    CONFIG_RULES = (
        ("head_size >= 1", "head_size is at least 1"),
        ("scale > 0", "the scale is above 0"),
        ("softcap > 0", "softcap is above 0; null for no bound"),
        ("rotary > 0 and rotary <= 1", "rotary is a share above 0, at most 1"),
    )


class Attention(NeuralModule):
    """Self-attention by ``scaled_dot_product_attention`` (Vaswani et al., 2017; Ainslie et al., 2023; final).

    Queries, keys and values come from one product. Its rows are grouped by key/value head, so that the
    weight can be sharded on G: for each group its queries, then its key, then its value.

    Args:
        width: model width D.
        heads: query heads H.
        kv_heads: key/value heads G; None for as many as ``heads``, 1 for multi-query.
        bias: whether the projections have a bias.
        options: what is beside the usual: head size, single biases, scale, bound of the scores.
        qk_norm: whether queries and keys are normalised per head (Dehghani et al., 2023).
        norm: kind of that norm; per head there is no shift.
        norm_eps: added to its variance.
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
        bias: bool = False,
        options: AttentionOptions | None = None,
        qk_norm: bool = False,
        norm: NormName = "rms",
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        init_std: float = 0.02,
        out_std: float = 0.02,
    ) -> None:
        super().__init__(D=width)
        options = options or AttentionOptions()
        kv_heads = heads if kv_heads is None else kv_heads
        check_heads(width, heads, kv_heads, options.head_size)
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, options.head_size or width // heads
        self.queries_per_group, self.dropout = heads // kv_heads, dropout
        # What replaces the core knows only the usual scale; another one is a factor of the queries.
        self.query_scale = None if options.scale is None else options.scale * self.head_size**0.5
        self.core: AttentionCore = scaled_dot_product if options.softcap is None else PlainAttention(options.softcap)
        rows = self.queries_per_group + 2
        self.qkv = Linear(
            "D",
            f"(G={kv_heads} {rows} K={self.head_size})",
            width,
            kv_heads * rows * self.head_size,
            bias=bias if options.bias is None else options.bias,
            init_std=init_std,
        )
        self.out = Linear(
            f"(H={heads} K={self.head_size})",
            "D",
            heads * self.head_size,
            width,
            bias=bias if options.out_bias is None else options.out_bias,
            init_std=out_std,
        )
        self.query_norm = make_norm(norm, "K", self.head_size, eps=norm_eps, bias=False) if qk_norm else None
        self.key_norm = make_norm(norm, "K", self.head_size, eps=norm_eps, bias=False) if qk_norm else None

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
        elif rotation is not None:  # as rotated queries and keys lie
            value = heads_first(value)
        mixed_BTHK = self.core(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.out(mixed_BTHK.reshape(batch, length, -1))  # type: ignore[no-any-return]

    def _split(self, qkv: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, K], keys and values [B, T, G, K]."""
        query, key, value = qkv.split((self.queries_per_group, 1, 1), dim=3)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if self.query_scale is not None:
            query = query * self.query_scale
        return query.flatten(2, 3), key.squeeze(3), value.squeeze(3)


class CrossAttention(NeuralModule):
    """Attention from one sequence to another, the memory (Vaswani et al., 2017; final).

    Args:
        width: model width D, of both.
        heads: query heads H.
        kv_heads: key/value heads G; None for as many as ``heads``.
        bias: whether the projections have a bias.
        options: what is beside the usual, as for :class:`Attention`.
        dropout: of attention weights, in training.
        init_std: standard deviation of the initial weights.
        out_std: that of the output projection.

    Shape: hidden_BTD, memory_BSD -> hidden_BTD; query weight ``(H K) D``, kv weight ``(G 2 K) D``, out weight
    ``D (H K)``.

    Example:
        >>> CrossAttention(8, 2)(torch.zeros(1, 3, 8), torch.zeros(1, 5, 8), AttentionMask(None, False)).shape
        torch.Size([1, 3, 8])
    """

    branch: ClassVar[bool] = True

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        bias: bool = False,
        options: AttentionOptions | None = None,
        dropout: float = 0.0,
        init_std: float = 0.02,
        out_std: float = 0.02,
    ) -> None:
        super().__init__(D=width)
        options = options or AttentionOptions()
        kv_heads = heads if kv_heads is None else kv_heads
        check_heads(width, heads, kv_heads, options.head_size)
        size = self.head_size = options.head_size or width // heads
        self.heads, self.kv_heads, self.dropout = heads, kv_heads, dropout
        self.query_scale = None if options.scale is None else options.scale * size**0.5
        self.core: AttentionCore = scaled_dot_product if options.softcap is None else PlainAttention(options.softcap)
        in_bias = bias if options.bias is None else options.bias
        out_bias = bias if options.out_bias is None else options.out_bias
        self.query = Linear("D", f"(H={heads} K={size})", width, heads * size, bias=in_bias, init_std=init_std)
        self.kv = Linear("D", f"(G={kv_heads} 2 K={size})", width, kv_heads * 2 * size, bias=in_bias, init_std=init_std)
        self.out = Linear(f"(H={heads} K={size})", "D", heads * size, width, bias=out_bias, init_std=out_std)

    def forward(
        self,
        hidden: HiddenBTD,
        memory: MemoryBSD,
        mask: AttentionMask,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> HiddenBTD:
        batch, length, _ = hidden.shape
        query_BTHK = self.query(hidden).view(batch, length, -1, self.head_size)
        if self.query_scale is not None:
            query_BTHK = query_BTHK * self.query_scale
        if cache is None:
            key, value = self._keys_and_values(memory)
        else:  # the memory stays the same for all tokens
            if layer not in cache.memory:
                cache.memory[layer] = self._keys_and_values(memory)
            key, value = cache.memory[layer]
        mixed_BTHK = self.core(query_BTHK, key, value, mask, self.dropout if self.training else 0.0)
        return self.out(mixed_BTHK.reshape(batch, length, -1))  # type: ignore[no-any-return]

    def _keys_and_values(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, _ = memory_BSD.shape
        key, value = self.kv(memory_BSD).view(batch, length, -1, 2, self.head_size).unbind(3)
        return key, value


def check_heads(width: int, heads: int, kv_heads: int, head_size: int | None = None) -> None:
    """Refuse numbers of heads that do not divide.

    Raises:
        ShapeError: with the nearest number that does.
    """
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


def _nearest_divisor(number: int, wanted: int) -> int:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return min([*small, *(number // d for d in small)], key=lambda d: abs(d - wanted))
