"""Whisper (Radford et al., 2022): two stacks as in BART, over a spectrogram, without biases of keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemolet.convert.architecture import Architecture
from nemolet.convert.fields import Config, Field, Fixed, Part, activation
from nemolet.convert.generation import KEY
from nemolet.convert.mapping import Rule, rules
from nemolet.convert.operations import Heads, Rows

SIDES = ("encoder", "decoder")
_SAID = {"task_to_id": "tasks", "no_timestamps_token_id": "no_times", "max_initial_timestamp_index": "latest"}
_USUAL = {"norm": "layer", "norm_eps": 1e-5, "gated": False, "bias": True, "position": "learned"}


@dataclass(frozen=True)
class _Prompt(Part):
    """The argument ``prompt``, out of ``generation_config.json``."""

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        said = theirs.get(KEY, theirs)
        languages = {name.strip("<|>"): token for name, token in (said.get("lang_to_id") or {}).items()}
        prompt = {"languages": languages, **{own: said.get(key) for key, own in _SAID.items()}}
        prompt["tasks"] = prompt["tasks"] or {}
        if any(value not in ({}, None) for value in prompt.values()):
            ours["prompt"] = prompt

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        prompt = ours.get("prompt") or {}
        languages = {f"<|{name}|>": token for name, token in (prompt.get("languages") or {}).items()}
        said = {"lang_to_id": languages, **{key: prompt.get(own) for key, own in _SAID.items()}}
        rest = {key: value for key, value in theirs.get(KEY, {}).items() if key not in said}
        theirs[KEY] = {**rest, **{key: value for key, value in said.items() if value not in ({}, None)}}


def _side(side: str, positions: str) -> tuple[Part, ...]:
    return (
        Field("d_model", f"{side}.width"),
        Field(f"{side}_layers", f"{side}.layers"),
        Field(f"{side}_attention_heads", f"{side}.heads"),
        Field(f"{side}_ffn_dim", f"{side}.ffn"),
        Field(positions, f"{side}.max_length"),
        Field("dropout", f"{side}.dropout"),
        activation("activation_function", f"{side}.activation"),
    )


CONFIG = (
    Fixed(
        {
            "encoder._target_": "nemolet.nn.Encoder",
            "decoder._target_": "nemolet.nn.Decoder",
            "decoder.cross": True,
            "embedding_scale": 1.0,  # theirs has a key for it, but does not scale
            **{f"{side}.{name}": value for side in SIDES for name, value in _USUAL.items()},
        }
    ),
    Field("vocab_size", "vocab_size"),
    Field("num_mel_bins", "bins"),
    *_side("encoder", "max_source_positions"),
    *_side("decoder", "max_target_positions"),
    Field("tie_word_embeddings", "tied"),
    _Prompt(),
)
_LAYER = {
    "attention.qkv.weight": (
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        Heads(),
    ),
    "attention.qkv.bias": (("self_attn.q_proj.bias", "self_attn.v_proj.bias"), Heads(keyless=True)),
    "attention.out.@": "self_attn.out_proj.@",
    "attention_norm.@": "self_attn_layer_norm.@",
    "cross_attention.query.@": "encoder_attn.q_proj.@",
    "cross_attention.kv.weight": (("encoder_attn.k_proj.weight", "encoder_attn.v_proj.weight"), Heads(paired=True)),
    "cross_attention.kv.bias": (("encoder_attn.v_proj.bias",), Heads(paired=True, keyless=True)),
    "cross_attention.out.@": "encoder_attn.out_proj.@",
    "cross_norm.@": "encoder_attn_layer_norm.@",
    "feed_forward.up.@": "fc1.@",
    "feed_forward.down.@": "fc2.@",
    "feed_forward_norm.@": "final_layer_norm.@",
}
TABLE = (
    Rule("graph.stem.widen.@", "model.encoder.conv1.@"),
    Rule("graph.stem.halve.@", "model.encoder.conv2.@"),
    Rule("graph.embed.weight", "model.decoder.embed_tokens.weight", Rows()),
    Rule("graph.head.weight", "proj_out.weight", Rows()),
    *(
        rule
        for side in SIDES
        for rule in (
            Rule(f"graph.{side}.position.weight", f"model.{side}.embed_positions.weight"),
            *rules(f"graph.{side}.blocks.*.", f"model.{side}.layers.*.", _LAYER),
            Rule(f"graph.{side}.norm.@", f"model.{side}.layer_norm.@"),
        )
    ),
)
ARCHITECTURES = (
    Architecture(
        "whisper",
        "WhisperForConditionalGeneration",
        "nemolet.speech.SpectrogramToText",
        CONFIG,
        TABLE,
        {
            "vocab_size": 51865,
            "num_mel_bins": 80,
            "d_model": 384,
            **{f"{side}_layers": 4 for side in SIDES},
            **{f"{side}_attention_heads": 6 for side in SIDES},
            **{f"{side}_ffn_dim": 1536 for side in SIDES},
            "max_source_positions": 1500,
            "max_target_positions": 448,
            "dropout": 0.0,
            "activation_function": "gelu",
            "tie_word_embeddings": True,
        },
        prefix="model.",
    ),
)
