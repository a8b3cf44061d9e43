"""Gemma 2 and 3 (text): norms around each branch, soft caps, local layers, embeddings scaled by the width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemolet.convert.architecture import Architecture
from nemolet.convert.architectures.llama import DEFAULTS as LLAMA_DEFAULTS
from nemolet.convert.architectures.llama import SIZES
from nemolet.convert.architectures.llama import TABLE as LLAMA
from nemolet.convert.attention_parts import Rope, Window
from nemolet.convert.fields import Config, Field, Fixed, Only, Part, activation, get
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
        ours.setdefault("attention", {})["scale"] = float(theirs["query_pre_attn_scalar"]) ** -0.5

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        theirs["query_pre_attn_scalar"] = round(get(ours, "attention.scale") ** -2)


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
    Field("head_dim", "attention.head_size"),
    Fixed({"norm": "rms_zero", "gated": True, "position": "rope", "residual.order": "sandwich"}),
    Only({"use_bidirectional_attention": False}),
    EmbeddingScale(),
    QueryScale(),
    activation("hidden_activation", "activation"),
    Field("attention_dropout", "dropout"),
    Field("attention_bias", "attention.bias"),
    Field("attention_bias", "attention.out_bias"),
    Field("tie_word_embeddings", "tied"),
    Field("final_logit_softcapping", "softcap"),
)


DEFAULTS = {
    **LLAMA_DEFAULTS,
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_GEMMA3 = {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}


def _family(model_type: str, name: str, defaults: Mapping[str, Any], *parts: Part) -> Architecture:
    target, parts = "nemolet.language.CausalLM", (*USUAL, *parts)
    return Architecture(model_type, name, target, parts, TABLE, {**DEFAULTS, **defaults}, prefix="model.")


def _gemma3_local(layer: int, config: Mapping[str, Any]) -> bool:
    return (layer + 1) % int(config["sliding_window_pattern"]) != 0


ARCHITECTURES = (
    _family(
        "gemma2",
        "Gemma2ForCausalLM",
        {},
        Fixed({"qk_norm": False}),
        Field("attn_logit_softcapping", "attention.softcap"),
        Window(usual=lambda i, _: i % 2 == 0, always=True),
        Rope(),
    ),
    _family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _GEMMA3,
        # Its config has a bound of the scores, too, which transformers does not obey.
        Fixed({"qk_norm": True, "attention.softcap": None}),
        Window(usual=_gemma3_local, always=True),
        Rope(kinds=True),
    ),
)
