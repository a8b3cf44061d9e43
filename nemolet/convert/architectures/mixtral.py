"""Mixtral and Qwen 3 with mixtures of experts: the attention of their dense relatives, experts in one tensor each."""

from __future__ import annotations

from nemolet.convert.architecture import Architecture
from nemolet.convert.architectures.llama import DEFAULTS, USUAL
from nemolet.convert.architectures.llama import TABLE as LLAMA
from nemolet.convert.attention_parts import Rope, Window
from nemolet.convert.fields import Field, Fixed, Only, Part
from nemolet.convert.mapping import Rule, rules
from nemolet.convert.operations import Stack


def _table(theirs: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    experts = f"{theirs}.experts.#"  # one tensor for each expert
    return (
        *rules(
            "graph.decoder.blocks.*.feed_forward.",
            "model.layers.*.",
            {
                "router.weight": f"{theirs}.gate.weight",
                "experts.gate": (f"{experts}.{gate}.weight", Stack()),
                "experts.up": (f"{experts}.{up}.weight", Stack()),
                "experts.down": (f"{experts}.{down}.weight", Stack()),
            },
        ),
        *LLAMA,
    )


_ROUTING: tuple[Part, ...] = (
    *USUAL,
    Rope(),
    Field("num_experts_per_tok", "experts.per_token"),
    Fixed({"experts.scoring": "softmax", "experts.scale": 1.0, "experts.shared_width": 0}),
)
ARCHITECTURES = (
    Architecture(
        "mixtral",
        "MixtralForCausalLM",
        "nemolet.language.CausalLM",
        (
            *_ROUTING,
            Field("num_local_experts", "experts.number"),
            Field("router_aux_loss_coef", "experts.balance_loss"),
            Fixed({"experts.normalised": True}),
            Window(),
        ),
        _table("block_sparse_moe", "w1", "w3", "w2"),
        {
            **DEFAULTS,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        prefix="model.",
    ),
    Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "nemolet.language.CausalLM",
        (
            *_ROUTING,
            Only({"decoder_sparse_step": 1, "mlp_only_layers": []}),
            Field("moe_intermediate_size", "ffn_width"),  # after that of dense layers, of which there are none
            Field(("num_local_experts", "num_experts"), "experts.number"),
            Field("router_aux_loss_coef", "experts.balance_loss"),
            Field("norm_topk_prob", "experts.normalised"),
            Fixed({"qk_norm": True}),
            Field("attention_bias", "attention.bias"),
            Field("attention_bias", "attention.out_bias"),
            Window(switch="use_sliding_window"),
        ),
        _table("mlp", "gate_proj", "up_proj", "down_proj"),
        {
            **DEFAULTS,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.001,
        },
        prefix="model.",
    ),
)
