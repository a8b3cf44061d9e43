"""Llama 2 and 3, and what differs from them in a few options: Mistral, Qwen 2, Qwen 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemolet.convert.architecture import Architecture
from nemolet.convert.attention_parts import Rope, Window
from nemolet.convert.fields import Field, Fixed, Only, Part, activation
from nemolet.convert.mapping import Rule, rules
from nemolet.convert.operations import Heads, Rows

SIZES: tuple[Part, ...] = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "width"),
    Field("intermediate_size", "ffn_width"),
    Field("num_hidden_layers", "layers"),
    Field("num_attention_heads", "heads"),
    Field("num_key_value_heads", "kv_heads"),
    Field("max_position_embeddings", "context"),
    Field("rms_norm_eps", "norm_eps"),
)
USUAL: tuple[Part, ...] = (
    *SIZES,
    Fixed({"norm": "rms", "gated": True, "position": "rope"}),
    activation("hidden_act", "activation"),
    Field("attention_dropout", "dropout"),
    Field("tie_word_embeddings", "tied"),
    Field("head_dim", "attention.head_size"),
)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
_MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
TABLE = (
    Rule("graph.embed.weight", "model.embed_tokens.weight", Rows()),
    Rule("graph.head.weight", "lm_head.weight", Rows()),
    *rules(
        "graph.decoder.blocks.*.",
        "model.layers.*.",
        {
            "attention_norm.@": "input_layernorm.@",
            "attention.qkv.@": (("self_attn.q_proj.@", "self_attn.k_proj.@", "self_attn.v_proj.@"), Heads()),
            "attention.query_norm.weight": "self_attn.q_norm.weight",
            "attention.key_norm.weight": "self_attn.k_norm.weight",
            "attention.out.@": "self_attn.o_proj.@",
            "feed_forward_norm.@": "post_attention_layernorm.@",
            "feed_forward.gate.@": "mlp.gate_proj.@",
            "feed_forward.up.@": "mlp.up_proj.@",
            "feed_forward.down.@": "mlp.down_proj.@",
        },
    ),
    Rule("graph.decoder.norm.@", "model.norm.@"),
)


def _family(model_type: str, name: str, defaults: Mapping[str, Any], *parts: Part) -> Architecture:
    return Architecture(
        model_type,
        name,
        "nemolet.language.CausalLM",
        (*USUAL, Rope(), *parts),
        TABLE,
        {**DEFAULTS, **defaults},
        prefix="model.",
        ignored=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    )


# The layers after the first few look at near tokens only, where that is switched on.
_QWEN_WINDOW = Window(usual=lambda layer, config: layer >= config["max_window_layers"], switch="use_sliding_window")


ARCHITECTURES = (
    _family(
        "llama",
        "LlamaForCausalLM",
        {},
        Only({"mlp_bias": False}),
        Field("attention_bias", "attention.bias"),
        Field("attention_bias", "attention.out_bias"),
    ),
    _family("mistral", "MistralForCausalLM", {**_MISTRAL, "sliding_window": 4096}, Window()),
    _family(
        "qwen2",
        "Qwen2ForCausalLM",
        _QWEN,
        Fixed({"attention.bias": True, "attention.out_bias": False}),
        _QWEN_WINDOW,
    ),
    _family(
        "qwen3",
        "Qwen3ForCausalLM",
        {**_QWEN, "head_dim": 128},
        Fixed({"qk_norm": True}),
        Field("attention_bias", "attention.bias"),
        Field("attention_bias", "attention.out_bias"),
        _QWEN_WINDOW,
    ),
)
