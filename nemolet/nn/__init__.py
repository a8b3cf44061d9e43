"""Layers that declare the axes of their parameters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "LSTM": "nemolet.nn.recurrent",
    "RelativeAttention": "nemolet.nn.relative_attention",
    "Conv1d": "nemolet.nn.conv",
    "Attention": "nemolet.nn.attention",
    "AttentionMask": "nemolet.nn.mask",
    "AttentionOptions": "nemolet.nn.attention",
    "Block": "nemolet.nn.block",
    "CrossAttention": "nemolet.nn.attention",
    "Decoder": "nemolet.nn.transformer",
    "Embedding": "nemolet.nn.embedding",
    "Encoder": "nemolet.nn.transformer",
    "FeedForward": "nemolet.nn.feed_forward",
    "Head": "nemolet.nn.embedding",
    "KVCache": "nemolet.nn.cache",
    "LayerNorm": "nemolet.nn.norm",
    "Linear": "nemolet.nn.linear",
    "LocalLayers": "nemolet.nn.transformer",
    "PositionEmbedding": "nemolet.nn.embedding",
    "PositionOptions": "nemolet.nn.transformer",
    "RMSNorm": "nemolet.nn.norm",
    "RelativePositions": "nemolet.nn.embedding",
    "ResidualOptions": "nemolet.nn.block",
    "RopeScaling": "nemolet.nn.rope",
    "RotaryEmbedding": "nemolet.nn.rope",
    "SinusoidalPositions": "nemolet.nn.embedding",
    "TextEmbedding": "nemolet.nn.embedding",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"nemolet.nn has no {name!r}; it has {', '.join(_EXPORTS)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


if TYPE_CHECKING:
    from nemolet.nn.attention import Attention, AttentionOptions, CrossAttention
    from nemolet.nn.block import Block, ResidualOptions
    from nemolet.nn.cache import KVCache
    from nemolet.nn.conv import Conv1d
    from nemolet.nn.embedding import (
        Embedding,
        Head,
        PositionEmbedding,
        RelativePositions,
        SinusoidalPositions,
        TextEmbedding,
    )
    from nemolet.nn.feed_forward import FeedForward
    from nemolet.nn.linear import Linear
    from nemolet.nn.mask import AttentionMask
    from nemolet.nn.norm import LayerNorm, RMSNorm
    from nemolet.nn.recurrent import LSTM
    from nemolet.nn.relative_attention import RelativeAttention
    from nemolet.nn.rope import RopeScaling, RotaryEmbedding
    from nemolet.nn.transformer import Decoder, Encoder, LocalLayers, PositionOptions
