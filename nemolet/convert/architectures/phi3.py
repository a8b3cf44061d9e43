"""Phi-3: projections that lie in one weight each, and rotary positions in part of a head."""

from __future__ import annotations

from nemolet.convert.architecture import Architecture
from nemolet.convert.architectures.llama import TABLE as LLAMA
from nemolet.convert.architectures.llama import USUAL
from nemolet.convert.fields import Field, Window
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
        (*USUAL, Window(), Field("resid_pdrop", "dropout", 0.0)),
        TABLE,
        prefix="model.",
        ignored=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    ),
)
