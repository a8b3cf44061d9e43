"""BART (Lewis et al., 2020) and Marian (Junczys-Dowmunt et al., 2018): one table, two kinds of positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemolet.convert.architecture import Architecture
from nemolet.convert.fields import Config, Field, Fixed, Only, Part, activation
from nemolet.convert.mapping import Rule, rules
from nemolet.convert.operations import Flatten, Heads, Rows, chain

SIDES = ("encoder", "decoder")


@dataclass(frozen=True)
class EmbeddingScale(Part):
    """The square root of the width, or none."""

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        ours["embedding_scale"] = math.sqrt(theirs["d_model"]) if theirs["scale_embedding"] else 1.0

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        theirs["scale_embedding"] = ours["embedding_scale"] != 1.0


def _config(position: Mapping[str, Any], *parts: Part) -> tuple[Part, ...]:
    usual = {"norm": "layer", "norm_eps": 1e-5, "gated": False, "bias": True, **position}
    fixed = {f"{side}.{name}": value for side in SIDES for name, value in usual.items()}
    return (
        Fixed(
            {
                "encoder._target_": "nemolet.nn.Encoder",
                "decoder._target_": "nemolet.nn.Decoder",
                "decoder.cross": True,
                "head_bias": True,
                **fixed,
            }
        ),
        Field("vocab_size", "vocab_size"),
        *(
            part
            for side in SIDES
            for part in (
                Field("d_model", f"{side}.width"),
                Field(f"{side}_layers", f"{side}.layers"),
                Field(f"{side}_attention_heads", f"{side}.heads"),
                Field(f"{side}_ffn_dim", f"{side}.ffn"),
                Field("max_position_embeddings", f"{side}.max_length"),
                Field("dropout", f"{side}.dropout"),
                activation("activation_function", f"{side}.activation"),
            )
        ),
        EmbeddingScale(),
        Field("tie_word_embeddings", "tied"),
        *parts,
    )


_ATTENTION = {
    "attention.qkv.@": (("self_attn.q_proj.@", "self_attn.k_proj.@", "self_attn.v_proj.@"), Heads()),
    "attention.out.@": "self_attn.out_proj.@",
    "attention_norm.@": "self_attn_layer_norm.@",
    "cross_attention.query.@": "encoder_attn.q_proj.@",
    "cross_attention.kv.@": (("encoder_attn.k_proj.@", "encoder_attn.v_proj.@"), Heads(paired=True)),
    "cross_attention.out.@": "encoder_attn.out_proj.@",
    "cross_norm.@": "encoder_attn_layer_norm.@",
    "feed_forward.up.@": "fc1.@",
    "feed_forward.down.@": "fc2.@",
    "feed_forward_norm.@": "final_layer_norm.@",
}


def _side(side: str) -> tuple[Rule, ...]:
    return (
        Rule(f"graph.{side}.position.weight", f"model.{side}.embed_positions.weight"),
        Rule(f"graph.{side}.input_norm.@", f"model.{side}.layernorm_embedding.@"),
        *rules(f"graph.{side}.blocks.*.", f"model.{side}.layers.*.", _ATTENTION),
    )


TABLE = (
    Rule("graph.embed.weight", "model.shared.weight", Rows()),
    Rule("graph.head.bias", "final_logits_bias", chain(Flatten(), Rows())),
    Rule("graph.head.weight", "lm_head.weight", Rows()),
    *_side("encoder"),
    *_side("decoder"),
)
_COPIES = {f"model.{side}.embed_tokens.weight": "model.shared.weight" for side in SIDES}
_TARGET = "nemolet.language.EncoderDecoder"
_DEFAULTS = {
    "vocab_size": 50265,
    "d_model": 1024,
    **{f"{side}_layers": 12 for side in SIDES},
    **{f"{side}_attention_heads": 16 for side in SIDES},
    **{f"{side}_ffn_dim": 4096 for side in SIDES},
    "max_position_embeddings": 1024,
    "dropout": 0.1,
    "activation_function": "gelu",
    "scale_embedding": False,
    "tie_word_embeddings": True,
    "decoder_start_token_id": 2,
}
ARCHITECTURES = (
    Architecture(
        "bart",
        "BartForConditionalGeneration",
        _TARGET,
        _config(
            {"position": "learned", "positions.offset": 2, "residual": {"order": "post", "input_norm": True}},
            Only({"normalize_before": False, "add_final_layer_norm": False}),
        ),
        TABLE,
        _DEFAULTS,
        prefix="model.",
        copies=_COPIES,
        apart=tuple(_COPIES),
    ),
    Architecture(
        "marian",
        "MarianMTModel",
        _TARGET,
        _config(
            {"position": "sinusoidal", "residual": {"order": "post"}},
            Only({"normalize_before": False, "share_encoder_decoder_embeddings": True}),
        ),
        TABLE,
        {**_DEFAULTS, "vocab_size": 58101, "decoder_start_token_id": 58100},
        prefix="model.",
        ignored=(r"model\.(encoder|decoder)\.embed_positions\.weight",),
        copies=_COPIES,
        apart=tuple(_COPIES),
    ),
)
