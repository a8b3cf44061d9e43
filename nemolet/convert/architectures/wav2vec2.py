"""Wav2Vec 2.0 (Baevski et al., 2020) and HuBERT (Hsu et al., 2021): encoders of a waveform."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemolet.convert.architecture import Architecture
from nemolet.convert.fields import Config, Field, Fixed, Only, Part, activation, get, put
from nemolet.convert.mapping import Rule, rules
from nemolet.convert.operations import Heads
from nemolet.errors import ConversionError

_STEM = {"conv_dim": "widths", "conv_kernel": "kernels", "conv_stride": "strides"}
_NORMS: dict[bool, dict[str, Any]] = {True: {"order": "pre"}, False: {"order": "post", "input_norm": True}}


@dataclass(frozen=True)
class Convolutions(Part):
    """What each convolution of the stem is like, and how many there are."""

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        count = theirs.get("num_feat_extract_layers", len(theirs["conv_dim"]))
        for key, name in _STEM.items():
            if len(theirs[key]) != count:
                raise ConversionError(
                    "the convolutions are not described alike",
                    where=f"config.json: {key}",
                    expected=f"{count} values",
                    found=theirs[key],
                )
            put(ours, f"stem.{name}", list(theirs[key]))

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        theirs |= {key: list(get(ours, f"stem.{name}")) for key, name in _STEM.items()}
        theirs["num_feat_extract_layers"] = len(theirs["conv_dim"])


@dataclass(frozen=True)
class NormOrder(Part):
    """Whether norms come before the branches, and one after all of them (the large models), or after the sums."""

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        put(ours, "stack.residual", dict(_NORMS[bool(theirs.get("do_stable_layer_norm", False))]))

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        theirs["do_stable_layer_norm"] = get(ours, "stack.residual.order") == "pre"


@dataclass(frozen=True)
class MaskVector(Part):
    """There is a vector for masked frames where frames are masked in training."""

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        shares = (theirs.get("mask_time_prob", 0.05), theirs.get("mask_feature_prob", 0.0))
        put(ours, "mask_vector", any(share > 0 for share in shares))

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        theirs |= {"mask_time_prob": 0.05 if ours["mask_vector"] else 0.0, "mask_feature_prob": 0.0}


CONFIG = (
    Fixed(
        {
            "stem._target_": "nemolet.speech.WaveStem",
            "stack._target_": "nemolet.nn.Encoder",
            "stack.norm": "layer",
            "stack.gated": False,
            "stack.bias": True,
            "stack.position": "none",
        }
    ),
    Convolutions(),
    Field("feat_extract_norm", "stem.norm", "group"),
    Field("conv_bias", "stem.bias", False),
    activation("feat_extract_activation", "stem.activation", "gelu"),
    Field("hidden_size", "stack.width"),
    Field("num_hidden_layers", "stack.layers"),
    Field("num_attention_heads", "stack.heads"),
    Field("intermediate_size", "stack.ffn"),
    Field("layer_norm_eps", "stack.norm_eps", 1e-5),
    Field("layer_norm_eps", "norm_eps", 1e-5),
    Field("hidden_dropout", "stack.dropout", 0.1),
    activation("hidden_act", "stack.activation", "gelu"),
    NormOrder(),
    Field("num_conv_pos_embeddings", "position_kernel", 128),
    Field("num_conv_pos_embedding_groups", "position_groups", 16),
    MaskVector(),
)
_LAYER = {
    "attention.qkv.@": (("attention.q_proj.@", "attention.k_proj.@", "attention.v_proj.@"), Heads()),
    "attention.out.@": "attention.out_proj.@",
    "attention_norm.@": "layer_norm.@",
    "feed_forward.up.@": "feed_forward.intermediate_dense.@",
    "feed_forward.down.@": "feed_forward.output_dense.@",
    "feed_forward_norm.@": "final_layer_norm.@",
}
_FILTERS = "encoder.pos_conv_embed.conv."
TABLE = (
    *rules(
        "stem.",
        "feature_extractor.conv_layers.*.",
        {"convs.*.@": "conv.@", "norms.*.@": "layer_norm.@"},
    ),
    Rule("norm.@", "feature_projection.layer_norm.@"),
    Rule("project.@", "feature_projection.projection.@"),
    Rule("positions.scale", f"{_FILTERS}parametrizations.weight.original0"),
    Rule("positions.direction", f"{_FILTERS}parametrizations.weight.original1"),
    Rule("positions.bias", f"{_FILTERS}bias"),
    Rule("mask_vector", "masked_spec_embed"),
    Rule("stack.input_norm.@", "encoder.layer_norm.@"),
    Rule("stack.norm.@", "encoder.layer_norm.@"),
    *rules("stack.blocks.*.", "encoder.layers.*.", _LAYER),
)
_HEADS = (r"lm_head\..*", r"quantizer\..*", r"project_(hid|q)\..*", r"projector\..*", r"classifier\..*")


def _architecture(model_type: str, name: str, *parts: Part) -> Architecture:
    return Architecture(
        model_type,
        name,
        "nemolet.speech.WaveEncoder",
        (*CONFIG, *parts),
        TABLE,
        prefix=f"{model_type}.",
        ignored=_HEADS,
    )


ARCHITECTURES = (
    _architecture("wav2vec2", "Wav2Vec2Model", Only({"add_adapter": False, "adapter_attn_dim": None})),
    _architecture("hubert", "HubertModel", Only({"feat_proj_layer_norm": True, "conv_pos_batch_norm": False})),
)
