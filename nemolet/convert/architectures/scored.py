"""Reward models: the decoders of language models with a head that gives one number for a text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nemolet.convert.architecture import Architecture
from nemolet.convert.architectures import gemma, gpt2, llama
from nemolet.convert.fields import Config, Inside, Part
from nemolet.convert.mapping import Rule
from nemolet.errors import ConversionError


@dataclass(frozen=True)
class OneLabel(Part):
    """The head has a single number: a classifier of transformers with one label."""

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        labels = len(theirs.get("id2label") or ()) or theirs.get("num_labels", 2)
        if labels != 1:
            raise ConversionError(
                "this classifier is no reward model",
                where="config.json: id2label",
                expected="one label",
                found=f"{labels} labels",
            )

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        theirs |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def _scored(model: Architecture) -> Architecture:
    """What a language model is with the other head."""
    return replace(
        model,
        name=re.sub("ForCausalLM|LMHeadModel", "ForSequenceClassification", model.name),
        target="nemolet.language.RewardModel",
        parts=(Inside("backbone", model.target, model.parts), OneLabel()),
        rules=(
            *(rule for rule in model.rules if rule.ours != "graph.head.weight"),
            Rule("graph.score.weight", "score.weight"),
        ),
        ignored=(*model.ignored, r"lm_head\.weight"),
    )


ARCHITECTURES = tuple(
    _scored(model)
    for model in (*gpt2.ARCHITECTURES, *llama.ARCHITECTURES, *gemma.ARCHITECTURES)
    if model.model_type != "gemma3_text"  # a class with another name
)
