"""Phi-3: projections that lie in one weight each, and rotary positions in part of a head."""

from __future__ import annotations

from nemolet.convert.architecture import Architecture
from nemolet.convert.architectures.llama import DEFAULTS, USUAL
from nemolet.convert.architectures.llama import TABLE as LLAMA
from nemolet.convert.attention_parts import Rope, Window
from nemolet.convert.fields import Field
from nemolet.convert.mapping import rules
from nemolet.convert.operations import Halves, Stacked

TABLE = (
    *rules(
        "graph.decoder.blocks.*.",
        "model.layers.*.",
        {
            "attention.qkv.weight": ("self_attn.qkv_proj.weight", Stacked()),
            ("feed_forward.gate.weight", "feed_forward.up.weight"): ("mlp.gate_up_proj.weight", Halves()),
        },
    ),
    *LLAMA,
)
ARCHITECTURES = (
    Architecture(
        "phi3",
        "Phi3ForCausalLM",
        "nemolet.language.CausalLM",
        (*USUAL, Rope(partial=True, scalings=()), Window(), Field("resid_pdrop", "dropout")),
        TABLE,
        {
            **DEFAULTS,
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "resid_pdrop": 0.0,
        },
        prefix="model.",
        ignored=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    ),
)
