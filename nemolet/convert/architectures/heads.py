"""Encoders with the head of a task: classes of a text, tags of its words, an answer within it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemolet.convert.architecture import Architecture
from nemolet.convert.fields import Config, Fixed, Part, get, put
from nemolet.convert.mapping import Rule
from nemolet.errors import ConversionError


@dataclass(frozen=True)
class Labels(Part):
    """Names of labels, in the order of their numbers."""

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        names = theirs["id2label"] or {i: f"LABEL_{i}" for i in range(theirs.get("num_labels") or 2)}
        if len(names) < 2:
            raise ConversionError(
                "this head gives one number and no classes",
                where="config.json: id2label",
                expected="two labels or more",
                found=", ".join(map(str, names.values())),
            )
        ours["labels"] = [names[number] for number in sorted(names, key=int)]

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        theirs["id2label"] = {str(number): name for number, name in enumerate(ours["labels"])}
        theirs["label2id"] = {name: number for number, name in enumerate(ours["labels"])}


@dataclass(frozen=True)
class Problem(Part):
    """Whether a text has one label, or any number of them."""

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        kind = theirs["problem_type"]
        if kind == "regression":
            raise ConversionError(
                "heads of regression are not read", where="config.json: problem_type", expected="classes", found=kind
            )
        ours["multi_label"] = kind == "multi_label_classification"

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        kind = "multi_label_classification" if get(ours, "multi_label", False) else "single_label_classification"
        theirs["problem_type"] = kind


@dataclass(frozen=True)
class Reads(Part):
    """How much is read: as much as the encoder can."""

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        put(ours, "context", get(ours, "encoder.stack.max_length"))

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        """It is the encoder's."""


def heads(
    model_type: str,
    family: str,
    body: tuple[Part, ...],
    table: tuple[Rule, ...],
    classifier: Part,
    rules: tuple[Rule, ...],
    defaults: Mapping[str, Any],
    *,
    ignored: tuple[str, ...] = (),
) -> tuple[Architecture, ...]:
    """The classes of transformers for three tasks, on one encoder.

    Args:
        model_type: of the encoder.
        family: what the names of the classes begin with.
        body: the config of the encoder, which is our argument ``encoder``.
        table: its tensors.
        classifier: how a classifier makes one vector of a text.
        rules: tensors of a classifier beside those of the encoder.
        defaults: what a missing key means.
        ignored: tensors that are not read.
    """
    encoder, usual = (*body, Reads()), {**defaults, "problem_type": None, "id2label": None}

    def one(task: str, target: str, parts: tuple[Part, ...], head: tuple[Rule, ...]) -> Architecture:
        name, unsaid = f"{family}For{task}", ("context", "max_tokens", "dropout")
        found = (*table, *head)
        return Architecture(
            model_type, name, f"nemolet.language.{target}", parts, found, usual, ignored=ignored, unsaid=unsaid
        )

    return (
        one("SequenceClassification", "TextClassifier", (*encoder, Labels(), Problem(), classifier), rules),
        one(
            "TokenClassification",
            "TokenClassifier",
            (*encoder, Labels(), Fixed({"crf": False})),
            (Rule("head.head.@", "classifier.@"),),
        ),
        one("QuestionAnswering", "QuestionAnswerer", encoder, (Rule("head.@", "qa_outputs.@"),)),
    )
