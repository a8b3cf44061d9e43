"""GPT-2 (Radford et al., 2019)."""

from __future__ import annotations

from nemolet.convert.architecture import Architecture
from nemolet.convert.fields import Field, Fixed, Only, activation
from nemolet.convert.mapping import Rule, rules
from nemolet.convert.operations import Rows, Stacked, Transpose, chain

CONFIG = (
    Fixed({"norm": "layer", "gated": False, "position": "learned", "bias": True}),
    Only({"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}),
    Field("vocab_size", "vocab_size"),
    Field("n_embd", "width"),
    Field("n_layer", "layers"),
    Field("n_head", "heads"),
    Field("n_inner", "ffn_width"),
    Field("n_positions", "context"),
    Field("layer_norm_epsilon", "norm_eps"),
    activation("activation_function", "activation"),
    Field(("resid_pdrop", "embd_pdrop", "attn_pdrop"), "dropout"),
    Field("tie_word_embeddings", "tied"),
)
TABLE = (
    Rule("graph.embed.weight", "transformer.wte.weight", Rows()),
    Rule("graph.decoder.position.weight", "transformer.wpe.weight"),
    Rule("graph.head.weight", "lm_head.weight", Rows()),
    *rules(
        "graph.decoder.blocks.*.",
        "transformer.h.*.",
        {
            "attention_norm.@": "ln_1.@",
            "attention.qkv.@": ("attn.c_attn.@", chain(Transpose(), Stacked())),
            "attention.out.@": ("attn.c_proj.@", Transpose()),
            "feed_forward_norm.@": "ln_2.@",
            "feed_forward.up.@": ("mlp.c_fc.@", Transpose()),
            "feed_forward.down.@": ("mlp.c_proj.@", Transpose()),
        },
    ),
    Rule("graph.decoder.norm.@", "transformer.ln_f.@"),
)
ARCHITECTURES = (
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        "nemolet.language.CausalLM",
        CONFIG,
        TABLE,
        {
            "vocab_size": 50257,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "resid_pdrop": 0.1,
            "tie_word_embeddings": True,
        },
        prefix="transformer.",
        ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
    ),
)
