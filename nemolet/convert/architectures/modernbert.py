"""ModernBERT (Warner et al., 2024): rotary positions, local layers, gated feed-forward, norms before branches."""

from __future__ import annotations

from nemolet.convert.architecture import Architecture
from nemolet.convert.architectures.bert import ENCODER, MASKED
from nemolet.convert.architectures.heads import heads
from nemolet.convert.attention_parts import Rope, Window
from nemolet.convert.fields import Field, Fixed, Only, Part, activation
from nemolet.convert.mapping import Rule, rules
from nemolet.convert.operations import Halves, Rows, Stacked


def _parts(at: str) -> tuple[Part, ...]:
    stack = f"{at}stack."
    return (
        Fixed(
            {
                **({f"{at}_target_": ENCODER} if at else {}),
                f"{stack}_target_": "nemolet.nn.Encoder",
                f"{stack}norm": "layer",
                f"{stack}gated": True,
                f"{stack}position": "rope",
                f"{stack}residual": {"input_norm": True, "first_norm": False},
            }
        ),
        Only({"attention_bias": False, "mlp_bias": False, "norm_bias": False}),
        Field("vocab_size", f"{at}vocab_size"),
        Field("hidden_size", f"{stack}width"),
        Field("intermediate_size", f"{stack}ffn"),
        Field("num_hidden_layers", f"{stack}layers"),
        Field("num_attention_heads", f"{stack}heads"),
        Field("max_position_embeddings", f"{stack}max_length"),
        Field("norm_eps", f"{stack}norm_eps"),
        Field("mlp_dropout", f"{stack}dropout"),
        activation("hidden_activation", f"{stack}activation"),
        Window(
            ours=stack,
            usual=lambda layer, config: layer % int(config["global_attn_every_n_layers"]) != 0,
            size="local_attention",  # theirs counts both sides, without the token itself
            to_ours=lambda size: size // 2 + 1,
            to_theirs=lambda size: 2 * (size - 1),
            always=True,
        ),
        Rope(
            ours=stack,
            kinds=True,
            old_base="global_rope_theta",
            old_local_base="local_rope_theta",
            old_everywhere=True,
        ),
    )


def _table(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}graph.embed.tokens.weight", f"{theirs}embeddings.tok_embeddings.weight", Rows()),
        Rule(f"{ours}graph.stack.input_norm.@", f"{theirs}embeddings.norm.@"),
        *rules(
            f"{ours}graph.stack.blocks.*.",
            f"{theirs}layers.*.",
            {
                "attention_norm.@": "attn_norm.@",
                "attention.qkv.@": ("attn.Wqkv.@", Stacked()),
                "attention.out.@": "attn.Wo.@",
                "feed_forward_norm.@": "mlp_norm.@",
                ("feed_forward.gate.weight", "feed_forward.up.weight"): ("mlp.Wi.weight", Halves()),
                "feed_forward.down.@": "mlp.Wo.@",
            },
        ),
        Rule(f"{ours}graph.stack.norm.@", f"{theirs}final_norm.@"),
    )


_HEAD = (
    Fixed({"bias": False}),
    Only({"classifier_bias": False, "tie_word_embeddings": True}),
    Field("decoder_bias", "token_bias"),
    Field("norm_eps", "norm_eps"),
    activation("classifier_activation", "activation"),
)
_HEAD_TABLE = (
    Rule("graph.head.dense.@", "head.dense.@"),
    Rule("graph.head.norm.@", "head.norm.@"),
    Rule("graph.head.head.bias", "decoder.bias", Rows()),
)
_DEFAULTS = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "max_position_embeddings": 8192,
    "norm_eps": 1e-5,
    "mlp_dropout": 0.0,
    "hidden_activation": "gelu",
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160_000.0,
    "local_rope_theta": 10_000.0,
    "decoder_bias": True,
    "classifier_activation": "gelu",
    "classifier_pooling": "cls",
}
_POOLING = {"cls": "first", "mean": "mean"}
_TASK = (  # every head has the layer that guesses masked tokens, too
    Only({"classifier_bias": False, "norm_eps": 1e-5}),
    activation("classifier_activation", "transform"),
    Fixed({"transform_norm": True}),
)


def _task(at: str, head: str) -> tuple[Rule, ...]:
    """The layer before a decision, which is at ``at``, and the decision itself."""
    norm, dense = Rule(f"{at}transform.norm.@", "head.norm.@"), Rule(f"{at}transform.dense.@", "head.dense.@")
    return dense, norm, Rule(f"{head}.@", "classifier.@")


ARCHITECTURES = (
    Architecture(
        "modernbert",
        "ModernBertModel",
        ENCODER,
        (*_parts(""), Fixed({"token_types": 0, "pooler": False})),
        _table("", ""),
        _DEFAULTS,
        prefix="model.",
        ignored=(r"head\..*", r"decoder\..*"),
    ),
    Architecture(
        "modernbert",
        "ModernBertForMaskedLM",
        MASKED,
        (*_parts("encoder."), Fixed({"encoder.token_types": 0}), *_HEAD),
        (*_table("graph.encoder.", "model."), *_HEAD_TABLE),
        _DEFAULTS,
        prefix="model.",
        copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    ),
    *heads(
        "modernbert",
        "ModernBert",
        (
            (*_parts("encoder."), Fixed({"encoder.token_types": 0})),
            _table("encoder.", "model."),
        ),
        classify=(
            (
                *_TASK,
                Field("classifier_pooling", "pooling", _POOLING.__getitem__, {v: k for k, v in _POOLING.items()}.get),
            ),
            _task("", "head"),
        ),
        tag=(_TASK, _task("head.", "head.head")),
        answer=(_TASK, _task("", "head")),
        defaults=_DEFAULTS,
    ),
)
