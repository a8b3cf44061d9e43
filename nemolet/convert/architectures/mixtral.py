"""Mixtral and Qwen 3 with mixtures of experts: the attention of their dense relatives, experts in one tensor each."""

from __future__ import annotations

from nemolet.convert.architecture import Architecture
from nemolet.convert.architectures.llama import HEAD_SIZE, USUAL, qwen_window
from nemolet.convert.architectures.llama import TABLE as LLAMA
from nemolet.convert.fields import Field, Fixed, Only, Part, Window
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
    Field("num_experts_per_tok", "experts.per_token", 2),
    Fixed({"experts.scoring": "softmax", "experts.scale": 1.0, "experts.shared_width": 0}),
)
ARCHITECTURES = (
    Architecture(
        "mixtral",
        "MixtralForCausalLM",
        "nemolet.language.CausalLM",
        (
            *USUAL,
            HEAD_SIZE,
            *_ROUTING,
            Field("num_local_experts", "experts.number", 8),
            Field("router_aux_loss_coef", "experts.balance_loss", 0.001),
            Fixed({"experts.normalised": True}),
            Window(),
        ),
        _table("block_sparse_moe", "w1", "w3", "w2"),
        prefix="model.",
    ),
    Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "nemolet.language.CausalLM",
        (
            *USUAL,
            HEAD_SIZE,
            *_ROUTING,
            Only({"decoder_sparse_step": 1, "mlp_only_layers": []}),
            Field("moe_intermediate_size", "ffn_width"),  # after that of dense layers, of which there are none
            Field(("num_local_experts", "num_experts"), "experts.number", 128),
            Field("router_aux_loss_coef", "experts.balance_loss", 0.001),
            Field("norm_topk_prob", "experts.normalised", False),
            Fixed({"qk_norm": True}),
            Field("attention_bias", "attention.bias", False),
            Field("attention_bias", "attention.out_bias", False),
            qwen_window(),
        ),
        _table("mlp", "gate_proj", "up_proj", "down_proj"),
        prefix="model.",
    ),
)
