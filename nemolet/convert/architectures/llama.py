"""Llama 2 and 3, and what differs from them in a few options: Mistral, Qwen 2, Qwen 3."""

from __future__ import annotations

from nemolet.convert.architecture import Architecture
from nemolet.convert.fields import Field, Fixed, Only, Part, Rope, Window, activation
from nemolet.convert.mapping import Rule, rules
from nemolet.convert.operations import Heads, Rows

SIZES: tuple[Part, ...] = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "width"),
    Field("intermediate_size", "ffn_width"),
    Field("num_hidden_layers", "layers"),
    Field("num_attention_heads", "heads"),
    Field("num_key_value_heads", "kv_heads", None),
    Field("max_position_embeddings", "context"),
    Field("rms_norm_eps", "norm_eps", 1e-6),
)
USUAL: tuple[Part, ...] = (
    *SIZES,
    Fixed({"norm": "rms", "gated": True, "position": "rope"}),
    activation("hidden_act", "activation", "silu"),
    Field("attention_dropout", "dropout", 0.0),
    Field("tie_word_embeddings", "tied", False),
    Rope(),
)
HEAD_SIZE = Field("head_dim", "attention.head_size", None)
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


def _family(model_type: str, name: str, *parts: Part) -> Architecture:
    return Architecture(
        model_type,
        name,
        "nemolet.language.CausalLM",
        (*USUAL, *parts),
        TABLE,
        prefix="model.",
        ignored=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    )


def _qwen_window() -> Window:
    return Window(usual=lambda layer, config: layer >= config.get("max_window_layers", 0), switch="use_sliding_window")


ARCHITECTURES = (
    _family(
        "llama",
        "LlamaForCausalLM",
        HEAD_SIZE,
        Only({"mlp_bias": False}),
        Field("attention_bias", "attention.bias", False),
        Field("attention_bias", "attention.out_bias", False),
    ),
    _family("mistral", "MistralForCausalLM", HEAD_SIZE, Window()),
    _family("qwen2", "Qwen2ForCausalLM", Fixed({"attention.bias": True, "attention.out_bias": False}), _qwen_window()),
    _family(
        "qwen3",
        "Qwen3ForCausalLM",
        HEAD_SIZE,
        Fixed({"qk_norm": True}),
        Field("attention_bias", "attention.bias", False),
        Field("attention_bias", "attention.out_bias", False),
        _qwen_window(),
    ),
)
