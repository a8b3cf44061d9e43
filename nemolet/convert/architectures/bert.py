"""BERT, RoBERTa, DistilBERT and ELECTRA: the same encoder under other names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemolet.convert.architecture import Architecture
from nemolet.convert.architectures.heads import heads
from nemolet.convert.fields import Config, Field, Fixed, Only, Part, activation, get, put
from nemolet.convert.mapping import Rule, rules
from nemolet.convert.operations import Heads, Rows
from nemolet.nn.feed_forward import ActivationName

ENCODER, MASKED = "nemolet.language.TextEncoder", "nemolet.language.MaskedLM"
_CONSTANTS = (r".*position_ids",)
_OTHER_HEADS = (r".*\.pooler\..*", r"cls\.seq_relationship\..*", r"discriminator_predictions\..*")


@dataclass(frozen=True)
class RobertaPositions(Part):
    """The first position is the one after that of padding, and padding is not counted."""

    ours: str

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        offset = int(theirs["pad_token_id"]) + 1
        put(ours, f"{self.ours}positions", {"offset": offset, "skip_padding": True})
        put(ours, f"{self.ours}max_length", int(theirs["max_position_embeddings"]) - offset)

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        offset = get(ours, f"{self.ours}positions.offset")
        theirs["pad_token_id"] = offset - 1
        theirs["max_position_embeddings"] = get(ours, f"{self.ours}max_length") + offset


def _at_least_one(types: int) -> int:
    if types < 1:
        raise ValueError("there are no token types")
    return types


def _body(at: str) -> tuple[Part, ...]:
    """What all have in common; ``at`` is where the encoder is among our arguments."""
    stack = f"{at}stack."
    return (
        Fixed(
            {
                **({f"{at}_target_": ENCODER} if at else {}),
                f"{stack}_target_": "nemolet.nn.Encoder",
                f"{stack}norm": "layer",
                f"{stack}gated": False,
                f"{stack}position": "learned",
                f"{stack}bias": True,
                f"{stack}residual": {"order": "post", "input_norm": True},
            }
        ),
        Field("vocab_size", f"{at}vocab_size"),
    )


def _sizes(at: str) -> tuple[Part, ...]:
    stack = f"{at}stack."
    return (
        *_body(at),
        Only({"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}),
        Field("hidden_size", f"{stack}width"),
        Field("intermediate_size", f"{stack}ffn"),
        Field("num_hidden_layers", f"{stack}layers"),
        Field("num_attention_heads", f"{stack}heads"),
        Field("type_vocab_size", f"{at}token_types", to_theirs=_at_least_one),
        Field("layer_norm_eps", f"{stack}norm_eps"),
        Field("hidden_dropout_prob", f"{stack}dropout"),
        activation("hidden_act", f"{stack}activation"),
    )


def _bert(at: str) -> tuple[Part, ...]:
    return *_sizes(at), Field("max_position_embeddings", f"{at}stack.max_length")


def _roberta(at: str) -> tuple[Part, ...]:
    return *_sizes(at), RobertaPositions(f"{at}stack.")


@dataclass(frozen=True)
class EntryWidth(Part):
    """Size of the embeddings, where it is not that of the model."""

    ours: str

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        size = theirs["embedding_size"]
        put(ours, f"{self.ours}input_width", None if size == theirs["hidden_size"] else size)

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        theirs["embedding_size"] = get(ours, f"{self.ours}input_width", None) or get(ours, f"{self.ours}width")


def _electra(at: str) -> tuple[Part, ...]:
    return *_bert(at), EntryWidth(f"{at}stack.")


def _distil(at: str) -> tuple[Part, ...]:
    stack = f"{at}stack."
    return (
        *_body(at),
        Fixed({f"{at}token_types": 0, f"{stack}norm_eps": 1e-12}),
        Field("dim", f"{stack}width"),
        Field("hidden_dim", f"{stack}ffn"),
        Field("n_layers", f"{stack}layers"),
        Field("n_heads", f"{stack}heads"),
        Field("max_position_embeddings", f"{stack}max_length"),
        Field("dropout", f"{stack}dropout"),
        activation("activation", f"{stack}activation"),
    )


def _head(act: str | None, eps: str | None) -> tuple[Part, ...]:
    """The head repeats the activation and the norm of the body, or always has the same."""
    return (
        activation(act, "activation") if act else Fixed({"activation": "gelu"}),
        Field(eps, "norm_eps") if eps else Fixed({"norm_eps": 1e-12}),
    )


_LAYER = {
    "attention.qkv.@": (
        ("attention.self.query.@", "attention.self.key.@", "attention.self.value.@"),
        Heads(),
    ),
    "attention.out.@": "attention.output.dense.@",
    "attention_norm.@": "attention.output.LayerNorm.@",
    "feed_forward.up.@": "intermediate.dense.@",
    "feed_forward.down.@": "output.dense.@",
    "feed_forward_norm.@": "output.LayerNorm.@",
}
_DISTIL_LAYER = {
    "attention.qkv.@": (("attention.q_lin.@", "attention.k_lin.@", "attention.v_lin.@"), Heads()),
    "attention.out.@": "attention.out_lin.@",
    "attention_norm.@": "sa_layer_norm.@",
    "feed_forward.up.@": "ffn.lin1.@",
    "feed_forward.down.@": "ffn.lin2.@",
    "feed_forward_norm.@": "output_layer_norm.@",
}


def _table(ours: str, theirs: str, model_type: str, *, pooler: bool = True) -> tuple[Rule, ...]:
    distil = model_type == "distilbert"
    layers, layer = ("transformer.layer.*.", _DISTIL_LAYER) if distil else ("encoder.layer.*.", _LAYER)
    return (
        Rule(f"{ours}graph.embed.tokens.weight", f"{theirs}embeddings.word_embeddings.weight", Rows()),
        Rule(f"{ours}graph.embed.types.weight", f"{theirs}embeddings.token_type_embeddings.weight"),
        Rule(f"{ours}graph.stack.position.weight", f"{theirs}embeddings.position_embeddings.weight"),
        Rule(f"{ours}graph.stack.input_norm.@", f"{theirs}embeddings.LayerNorm.@"),
        Rule(f"{ours}graph.stack.input_proj.@", f"{theirs}embeddings_project.@"),
        *rules(f"{ours}graph.stack.blocks.*.", f"{theirs}{layers}", layer),
        *([Rule(f"{ours}pooler.@", f"{theirs}pooler.dense.@")] if pooler else []),
    )


def _head_table(dense: str, norm: str, bias: str) -> tuple[Rule, ...]:
    return (
        Rule("graph.head.dense.@", f"{dense}.@"),
        Rule("graph.head.norm.@", f"{norm}.@"),
        Rule("graph.head.head.bias", bias, Rows()),
    )


_BERT_HEAD = _head_table(
    "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"
)
_ROBERTA_HEAD = _head_table("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
_DISTIL_HEAD = _head_table("vocab_transform", "vocab_layer_norm", "vocab_projector.bias")
_ELECTRA_HEAD = _head_table("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias")


_BERT = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "hidden_act": "gelu",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": {**_BERT, "vocab_size": 50265, "pad_token_id": 1},
    "electra": {
        **_BERT,
        "embedding_size": 128,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
    },
    "distilbert": {
        "vocab_size": 30522,
        "dim": 768,
        "hidden_dim": 3072,
        "n_layers": 6,
        "n_heads": 12,
        "max_position_embeddings": 512,
        "dropout": 0.1,
        "activation": "gelu",
    },
}


# The weight of the embedding and the bias of the head under the names of a layer that has both.
_COPIES = {
    "bert": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    "roberta": {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    "distilbert": {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    "electra": {"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
}


def _encoder(model_type: str, name: str, parts: tuple[Part, ...], *, pooler: bool) -> Architecture:
    return Architecture(
        model_type,
        name,
        ENCODER,
        (*parts, Fixed({"pooler": pooler})),
        _table("", "", model_type),
        _DEFAULTS[model_type],
        prefix=f"{model_type}.",
        ignored=(*_CONSTANTS, *_OTHER_HEADS, r"cls\..*", r"lm_head\..*", r"generator_.*", r"vocab_.*"),
        bodies_of=("ElectraForPreTraining",) if model_type == "electra" else (),
    )


def _masked(
    model_type: str, name: str, parts: tuple[Part, ...], head: tuple[Part, ...], rows: tuple[Rule, ...]
) -> Architecture:
    prefix = f"{model_type}."
    return Architecture(
        model_type,
        name,
        MASKED,
        (*parts, *head, Only({"tie_word_embeddings": True})),
        (*_table("graph.encoder.", prefix, model_type), *rows),
        _DEFAULTS[model_type],
        prefix=prefix,
        ignored=(*_CONSTANTS, *_OTHER_HEADS),
        copies=_COPIES[model_type],
        bodies_of=("BertForPreTraining",) if model_type == "bert" else (),
    )


def _tasks(
    model_type: str, family: str, parts: tuple[Part, ...], activation: ActivationName, dense: str, classes: str
) -> tuple[Architecture, ...]:
    """The heads of tasks; a classifier has a layer ``dense`` before its ``classes``."""
    head = (Rule("transform.dense.@", f"{dense}.@"), Rule("head.@", f"{classes}.@"))
    plain = (Fixed({"transform": None}),)
    return heads(
        model_type,
        family,
        (parts, _table("encoder.", f"{model_type}.", model_type, pooler=False)),
        classify=((Fixed({"pooling": "first", "transform": activation, "transform_norm": False}),), head),
        tag=(plain, (Rule("head.head.@", "classifier.@"),)),
        answer=(plain, (Rule("head.@", "qa_outputs.@"),)),
        defaults=_DEFAULTS[model_type],
        ignored=(r".*position_ids", r".*\.pooler\..*"),
    )


_USUAL = _head("hidden_act", "layer_norm_eps")
ARCHITECTURES = (
    _encoder("bert", "BertModel", _bert(""), pooler=True),
    _masked("bert", "BertForMaskedLM", _bert("encoder."), _USUAL, _BERT_HEAD),
    _encoder("roberta", "RobertaModel", _roberta(""), pooler=True),
    _masked("roberta", "RobertaForMaskedLM", _roberta("encoder."), _head(None, "layer_norm_eps"), _ROBERTA_HEAD),
    _encoder("distilbert", "DistilBertModel", _distil(""), pooler=False),
    _masked("distilbert", "DistilBertForMaskedLM", _distil("encoder."), _head("activation", None), _DISTIL_HEAD),
    _encoder("electra", "ElectraModel", _electra(""), pooler=False),
    _masked("electra", "ElectraForMaskedLM", _electra("encoder."), _head(None, "layer_norm_eps"), _ELECTRA_HEAD),
    *_tasks("bert", "Bert", _bert("encoder."), "tanh", "bert.pooler.dense", "classifier"),
    *_tasks("roberta", "Roberta", _roberta("encoder."), "tanh", "classifier.dense", "classifier.out_proj"),
    *_tasks("distilbert", "DistilBert", _distil("encoder."), "relu", "pre_classifier", "classifier"),
    *_tasks("electra", "Electra", _electra("encoder."), "gelu", "classifier.dense", "classifier.out_proj"),
)
