"""T5 (Raffel et al., 2020) and its gated successor: relative positions, scores without a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemolet.convert.architecture import Architecture
from nemolet.convert.fields import ACTIVATIONS, Config, Field, Fixed, Part, get, put
from nemolet.convert.mapping import Rule, rules
from nemolet.convert.operations import Heads, Rows
from nemolet.errors import ConversionError

SIDES = ("encoder", "decoder")
_CONTEXT = 1 << 20  # relative positions know no longest sequence


@dataclass(frozen=True)
class FeedForwardName(Part):
    """``relu``, ``gated-gelu`` and the like: activation and gate in one word."""

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        gate, _, name = str(theirs["feed_forward_proj"]).rpartition("-")
        name = theirs.get("dense_act_fn", "gelu_new" if gate and name == "gelu" else name)
        if name not in ACTIVATIONS or gate not in ("", "gated"):
            raise ConversionError(
                "this feed-forward is not supported",
                where="config.json: feed_forward_proj",
                found=f"{theirs['feed_forward_proj']}, dense_act_fn {name}",
                expected="an activation, or gated- and an activation",
            )
        for side in SIDES:
            put(ours, f"{side}.activation", ACTIVATIONS[name])
            put(ours, f"{side}.gated", bool(theirs.get("is_gated_act", gate)))

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        back = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}
        name = back[get(ours, "encoder.activation")]
        gated = get(ours, "encoder.gated")
        theirs["feed_forward_proj"] = f"gated-{'gelu' if name == 'gelu_new' else name}" if gated else name
        theirs["dense_act_fn"], theirs["is_gated_act"] = name, gated


@dataclass(frozen=True)
class HeadScale(Part):
    """A tied head is scaled by the inverse square root of the width."""

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        scaled = theirs.get("scale_decoder_outputs", theirs["tie_word_embeddings"] is not False)
        ours["head_scale"] = theirs["d_model"] ** -0.5 if scaled else 1.0

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        theirs["scale_decoder_outputs"] = ours["head_scale"] != 1.0


def _both(theirs: str, ours: str) -> tuple[Field, ...]:
    return tuple(Field(theirs, f"{side}.{ours}") for side in SIDES)


CONFIG: tuple[Part, ...] = (
    Fixed(
        {
            "encoder._target_": "nemolet.nn.Encoder",
            "decoder._target_": "nemolet.nn.Decoder",
            "decoder.cross": True,
            "head_bias": False,
            **{f"{side}.norm": "rms" for side in SIDES},
            **{f"{side}.position": "relative" for side in SIDES},
            **{f"{side}.attention.scale": 1.0 for side in SIDES},
            **{f"{side}.max_length": _CONTEXT for side in SIDES},
        }
    ),
    Field("vocab_size", "vocab_size"),
    Field(("num_decoder_layers", "num_layers"), "decoder.layers"),
    Field("num_layers", "encoder.layers"),  # after the other, which writes the same key
    *_both("d_model", "width"),
    *_both("num_heads", "heads"),
    *_both("d_kv", "attention.head_size"),
    *_both("d_ff", "ffn"),
    *_both("layer_norm_epsilon", "norm_eps"),
    *_both("dropout_rate", "dropout"),
    *_both("relative_attention_num_buckets", "positions.buckets"),
    *_both("relative_attention_max_distance", "positions.max_distance"),
    FeedForwardName(),
    HeadScale(),
    Field("tie_word_embeddings", "tied", lambda tied: tied is not False),
)


def _side(side: str) -> tuple[Rule, ...]:
    last = 2 if side == "decoder" else 1
    dense = f"{last}.DenseReluDense"
    return (
        Rule(f"graph.{side}.relative.weight", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        *rules(
            f"graph.{side}.blocks.*.",
            f"{side}.block.*.layer.",
            {
                "attention_norm.weight": "0.layer_norm.weight",
                "attention.qkv.weight": (
                    ("0.SelfAttention.q.weight", "0.SelfAttention.k.weight", "0.SelfAttention.v.weight"),
                    Heads(),
                ),
                "attention.out.weight": "0.SelfAttention.o.weight",
                "cross_norm.weight": "1.layer_norm.weight",
                "cross_attention.query.weight": "1.EncDecAttention.q.weight",
                "cross_attention.kv.weight": (
                    ("1.EncDecAttention.k.weight", "1.EncDecAttention.v.weight"),
                    Heads(paired=True),
                ),
                "cross_attention.out.weight": "1.EncDecAttention.o.weight",
                "feed_forward_norm.weight": f"{last}.layer_norm.weight",
                ("feed_forward.gate.weight", "feed_forward.up.weight"): (
                    f"{dense}.wi_0.weight",
                    f"{dense}.wi_1.weight",
                ),
                "feed_forward.up.weight": f"{dense}.wi.weight",  # where there is no gate
                "feed_forward.down.weight": f"{dense}.wo.weight",
            },
        ),
        Rule(f"graph.{side}.norm.weight", f"{side}.final_layer_norm.weight"),
    )


TABLE = (
    Rule("graph.embed.weight", "shared.weight", Rows()),
    Rule("graph.head.weight", "lm_head.weight", Rows()),
    *_side("encoder"),
    *_side("decoder"),
)
ARCHITECTURES = (
    Architecture(
        "t5",
        "T5ForConditionalGeneration",
        "nemolet.language.EncoderDecoder",
        CONFIG,
        TABLE,
        {
            "vocab_size": 32128,
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 2048,
            "num_layers": 6,
            "num_heads": 8,
            "feed_forward_proj": "relu",
            "layer_norm_epsilon": 1e-6,
            "dropout_rate": 0.1,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "tie_word_embeddings": True,
            "decoder_start_token_id": None,
        },
        ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
        copies={f"{side}.embed_tokens.weight": "shared.weight" for side in SIDES},
        head_by_file=True,
    ),
)
