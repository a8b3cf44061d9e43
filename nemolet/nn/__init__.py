"""Layers that declare the axes of their parameters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "AdaptedLinear": "nemolet.nn.adapters",
    "Adapter": "nemolet.nn.adapters",
    "Attention": "nemolet.nn.attention",
    "AttentionMask": "nemolet.nn.mask",
    "AttentionOptions": "nemolet.nn.attention",
    "Block": "nemolet.nn.block",
    "Conv1d": "nemolet.nn.conv",
    "CrossAttention": "nemolet.nn.attention",
    "Decoder": "nemolet.nn.transformer",
    "Embedding": "nemolet.nn.embedding",
    "Encoder": "nemolet.nn.transformer",
    "FeedForward": "nemolet.nn.feed_forward",
    "Head": "nemolet.nn.embedding",
    "KVCache": "nemolet.nn.cache",
    "LSTM": "nemolet.nn.recurrent",
    "LayerNorm": "nemolet.nn.norm",
    "Linear": "nemolet.nn.linear",
    "LocalLayers": "nemolet.nn.transformer",
    "Mixture": "nemolet.nn.router",
    "MixtureOfExperts": "nemolet.nn.moe",
    "PositionEmbedding": "nemolet.nn.embedding",
    "PositionOptions": "nemolet.nn.transformer",
    "RMSNorm": "nemolet.nn.norm",
    "RelativeAttention": "nemolet.nn.relative_attention",
    "RelativePositions": "nemolet.nn.embedding",
    "ResidualOptions": "nemolet.nn.block",
    "RopeScaling": "nemolet.nn.rope",
    "RotaryEmbedding": "nemolet.nn.rope",
    "SinusoidalPositions": "nemolet.nn.embedding",
    "TextEmbedding": "nemolet.nn.embedding",
    "adapt": "nemolet.nn.adapters",
    "adapted_layers": "nemolet.nn.adapters",
    "freeze": "nemolet.nn.adapters",
    "load_adapter": "nemolet.nn.adapter_files",
    "merge": "nemolet.nn.adapters",
    "pack": "nemolet.nn.prepacking",
    "packed": "nemolet.nn.prepacking",
    "recorded_attention": "nemolet.nn.observation",
    "save_adapter": "nemolet.nn.adapter_files",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"nemolet.nn has no {name!r}; it has {', '.join(_EXPORTS)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


if TYPE_CHECKING:
    from nemolet.nn.adapter_files import load_adapter, save_adapter
    from nemolet.nn.adapters import AdaptedLinear, Adapter, adapt, adapted_layers, freeze, merge
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
    from nemolet.nn.moe import MixtureOfExperts
    from nemolet.nn.norm import LayerNorm, RMSNorm
    from nemolet.nn.observation import recorded_attention
    from nemolet.nn.prepacking import pack, packed
    from nemolet.nn.recurrent import LSTM
    from nemolet.nn.relative_attention import RelativeAttention
    from nemolet.nn.rope import RopeScaling, RotaryEmbedding
    from nemolet.nn.router import Mixture
    from nemolet.nn.transformer import Decoder, Encoder, LocalLayers, PositionOptions
