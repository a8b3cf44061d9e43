"""Gemma 2 and 3 (text): norms around each branch, soft caps, local layers, embeddings scaled by the width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemolet.convert.architecture import Architecture
from nemolet.convert.architectures.llama import HEAD_SIZE, SIZES
from nemolet.convert.architectures.llama import TABLE as LLAMA
from nemolet.convert.fields import Config, Field, Fixed, Only, Part, Rope, Window, activation, get
from nemolet.convert.mapping import rules


@dataclass(frozen=True)
class EmbeddingScale(Part):
    """The square root of the width; theirs has no key for it."""

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        ours["embedding_scale"] = math.sqrt(theirs["hidden_size"])

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        """Nothing to write."""


@dataclass(frozen=True)
class QueryScale(Part):
    """The factor of the scores, theirs as the number whose inverse square root it is."""

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        ours.setdefault("attention", {})["scale"] = float(theirs.get("query_pre_attn_scalar", 256)) ** -0.5

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        scale = get(ours, "attention.scale", None)
        theirs["query_pre_attn_scalar"] = get(ours, "attention.head_size") if scale is None else round(scale**-2)


# Gemma names the norm before the feed-forward by another word than Llama, which leaves Llama's for the one after.
TABLE = (
    *rules(
        "graph.decoder.blocks.*.",
        "model.layers.*.",
        {
            "attention_out_norm.weight": "post_attention_layernorm.weight",
            "feed_forward_norm.weight": "pre_feedforward_layernorm.weight",
            "feed_forward_out_norm.weight": "post_feedforward_layernorm.weight",
        },
    ),
    *LLAMA,
)
USUAL: tuple[Part, ...] = (
    *SIZES,
    HEAD_SIZE,
    Fixed({"norm": "rms_zero", "gated": True, "position": "rope", "residual.order": "sandwich"}),
    Only({"use_bidirectional_attention": False}),
    EmbeddingScale(),
    QueryScale(),
    activation("hidden_activation", "activation", "gelu_pytorch_tanh"),
    Field("attention_dropout", "dropout", 0.0),
    Field("attention_bias", "attention.bias", False),
    Field("attention_bias", "attention.out_bias", False),
    Field("tie_word_embeddings", "tied", True),
    Field("final_logit_softcapping", "softcap", None),
    Field("attn_logit_softcapping", "attention.softcap", None),
)


def _family(model_type: str, name: str, *parts: Part) -> Architecture:
    return Architecture(model_type, name, "nemolet.language.CausalLM", (*USUAL, *parts), TABLE, prefix="model.")


def _gemma3_local(layer: int, config: Mapping[str, Any]) -> bool:
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    return (layer + 1) % pattern != 0


ARCHITECTURES = (
    _family(
        "gemma2",
        "Gemma2ForCausalLM",
        Fixed({"qk_norm": False}),
        Window(usual=lambda i, _: i % 2 == 0, always=True),
        Rope(),
    ),
    _family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        Fixed({"qk_norm": True}),
        Window(usual=_gemma3_local, always=True),
        Rope(kinds=True, base=1_000_000.0, local_base=10_000.0),
    ),
)
