"""Wav2Vec 2.0 (Baevski et al., 2020) and HuBERT (Hsu et al., 2021): encoders of a waveform, and recognizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemolet.convert.architecture import Architecture
from nemolet.convert.fields import Config, Field, Fixed, Only, Part, activation, get, put
from nemolet.convert.folder import EXTRACTOR
from nemolet.convert.mapping import Rule, rules
from nemolet.convert.operations import BlankLast, Heads
from nemolet.errors import ConversionError

ENCODER = "nemolet.speech.WaveEncoder"
_STEM = {"conv_dim": "widths", "conv_kernel": "kernels", "conv_stride": "strides"}
_NORMS: dict[bool, dict[str, Any]] = {True: {"order": "pre"}, False: {"order": "post", "input_norm": True}}


@dataclass(frozen=True)
class Convolutions(Part):
    """What each convolution of the stem is like, and how many there are."""

    ours: str

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
            put(ours, f"{self.ours}stem.{name}", list(theirs[key]))

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        theirs |= {key: list(get(ours, f"{self.ours}stem.{name}")) for key, name in _STEM.items()}
        theirs["num_feat_extract_layers"] = len(theirs["conv_dim"])


@dataclass(frozen=True)
class NormOrder(Part):
    """Whether norms come before the branches, and one after all of them (the large models), or after the sums."""

    ours: str

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        put(ours, f"{self.ours}stack.residual", dict(_NORMS[bool(theirs["do_stable_layer_norm"])]))

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        theirs["do_stable_layer_norm"] = get(ours, f"{self.ours}stack.residual.order") == "pre"


@dataclass(frozen=True)
class MaskVector(Part):
    """There is a vector for masked frames where frames are masked in training."""

    ours: str

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        shares = (theirs["mask_time_prob"], theirs["mask_feature_prob"])
        put(ours, f"{self.ours}mask_vector", any(share > 0 for share in shares))

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        has = get(ours, f"{self.ours}mask_vector")
        theirs |= {"mask_time_prob": 0.05 if has else 0.0, "mask_feature_prob": 0.0}


@dataclass(frozen=True)
class Listening(Part):
    """What their feature extractor does, which is our front end; their blank is the token of padding."""

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        said = theirs.get(EXTRACTOR, {})
        put(ours, "front_end._target_", "nemolet.speech.FrontEnd")
        put(
            ours,
            "front_end.features",
            {
                "_target_": "nemolet.speech.Waveform",
                "sample_rate": said.get("sampling_rate", 16000),
                "normalized": said.get("do_normalize", True),
            },
        )

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        if theirs.get("pad_token_id") not in range(get(ours, "vocab_size") + 1):  # of another vocabulary, or of none
            theirs["pad_token_id"] = 0
        theirs[EXTRACTOR] = {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": 1,
            "padding_value": 0.0,
            **theirs.get(EXTRACTOR, {}),
            "sampling_rate": get(ours, "front_end.features.sample_rate"),
            "do_normalize": get(ours, "front_end.features.normalized"),
            "return_attention_mask": theirs["feat_extract_norm"] == "layer",
        }


def _config(at: str) -> tuple[Part, ...]:
    """The encoder; ``at`` is where it is among our arguments."""
    stack = f"{at}stack."
    return (
        Fixed(
            {
                **({f"{at}_target_": ENCODER} if at else {}),
                f"{at}stem._target_": "nemolet.speech.WaveStem",
                f"{stack}_target_": "nemolet.nn.Encoder",
                f"{stack}norm": "layer",
                f"{stack}gated": False,
                f"{stack}bias": True,
                f"{stack}position": "none",
            }
        ),
        Convolutions(at),
        Field("feat_extract_norm", f"{at}stem.norm"),
        Field("conv_bias", f"{at}stem.bias"),
        activation("feat_extract_activation", f"{at}stem.activation"),
        activation("feat_extract_activation", f"{at}position_activation"),
        Field("hidden_size", f"{stack}width"),
        Field("num_hidden_layers", f"{stack}layers"),
        Field("num_attention_heads", f"{stack}heads"),
        Field("intermediate_size", f"{stack}ffn"),
        Field("layer_norm_eps", f"{stack}norm_eps"),
        Field("layer_norm_eps", f"{at}norm_eps"),
        Field("hidden_dropout", f"{stack}dropout"),
        activation("hidden_act", f"{stack}activation"),
        NormOrder(at),
        Field("num_conv_pos_embeddings", f"{at}position_kernel"),
        Field("num_conv_pos_embedding_groups", f"{at}position_groups"),
        MaskVector(at),
    )


_DEFAULTS = {
    "vocab_size": 32,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "hidden_dropout": 0.1,
    "hidden_act": "gelu",
    "conv_dim": (512,) * 7,
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
    "conv_bias": False,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "do_stable_layer_norm": False,
    "mask_time_prob": 0.05,
    "mask_feature_prob": 0.0,
}
_LAYER = {
    "attention.qkv.@": (("attention.q_proj.@", "attention.k_proj.@", "attention.v_proj.@"), Heads()),
    "attention.out.@": "attention.out_proj.@",
    "attention_norm.@": "layer_norm.@",
    "feed_forward.up.@": "feed_forward.intermediate_dense.@",
    "feed_forward.down.@": "feed_forward.output_dense.@",
    "feed_forward_norm.@": "final_layer_norm.@",
}


def _table(ours: str, theirs: str) -> tuple[Rule, ...]:
    filters = f"{theirs}encoder.pos_conv_embed.conv."
    return (
        *rules(
            f"{ours}stem.",
            f"{theirs}feature_extractor.conv_layers.*.",
            {"convs.*.@": "conv.@", "norms.*.@": "layer_norm.@"},
        ),
        Rule(f"{ours}norm.@", f"{theirs}feature_projection.layer_norm.@"),
        Rule(f"{ours}project.@", f"{theirs}feature_projection.projection.@"),
        Rule(f"{ours}positions.scale", f"{filters}parametrizations.weight.original0"),
        Rule(f"{ours}positions.direction", f"{filters}parametrizations.weight.original1"),
        Rule(f"{ours}positions.bias", f"{filters}bias"),
        Rule(f"{ours}mask_vector", f"{theirs}masked_spec_embed"),
        Rule(f"{ours}stack.input_norm.@", f"{theirs}encoder.layer_norm.@"),
        Rule(f"{ours}stack.norm.@", f"{theirs}encoder.layer_norm.@"),
        *rules(f"{ours}stack.blocks.*.", f"{theirs}encoder.layers.*.", _LAYER),
    )


_HEADS = (r"quantizer\..*", r"project_(hid|q)\..*", r"projector\..*", r"classifier\..*")


def _encoder(model_type: str, name: str, *parts: Part, bodies_of: tuple[str, ...] = ()) -> Architecture:
    config, table, ignored = (*_config(""), *parts), _table("", ""), (*_HEADS, r"lm_head\..*")
    return Architecture(
        model_type, name, ENCODER, config, table, _DEFAULTS, f"{model_type}.", ignored, bodies_of=bodies_of
    )


def _recognizer(model_type: str, name: str, *parts: Part) -> Architecture:
    prefix = f"{model_type}."
    head = (Field("vocab_size", "vocab_size", lambda n: n - 1, lambda n: n + 1), Fixed({"bias": True}))
    table = (*_table("encoder.", prefix), Rule("head.@", "lm_head.@", BlankLast()))
    config = (*_config("encoder."), *parts, Listening(), *head)
    return Architecture(model_type, name, "nemolet.speech.CTCRecognizer", config, table, _DEFAULTS, prefix, _HEADS)


_WAV2VEC2 = Only({"add_adapter": False, "adapter_attn_dim": None})
_HUBERT = Only({"feat_proj_layer_norm": True, "conv_pos_batch_norm": False})
ARCHITECTURES = (
    # What its quantizer is for is pre-training only.
    _encoder("wav2vec2", "Wav2Vec2Model", _WAV2VEC2, bodies_of=("Wav2Vec2ForPreTraining",)),
    _encoder("hubert", "HubertModel", _HUBERT),
    _recognizer("wav2vec2", "Wav2Vec2ForCTC", _WAV2VEC2),
    _recognizer("hubert", "HubertForCTC", _HUBERT),
)
