"""Encoders with the head of a task: classes of a text, tags of its words, an answer within it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemolet.convert.architecture import Architecture
from nemolet.convert.fields import Config, Fixed, Part, get, put
from nemolet.convert.mapping import Rule
from nemolet.convert.operations import LeftOut
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


Tables = tuple[tuple[Part, ...], tuple[Rule, ...]]  # a config and its tensors


def heads(
    model_type: str,
    family: str,
    encoder: Tables,
    *,
    classify: Tables,
    tag: Tables,
    answer: Tables,
    defaults: Mapping[str, Any],
    ignored: tuple[str, ...] = (),
) -> tuple[Architecture, ...]:
    """The classes of transformers for three tasks, on one encoder.

    Args:
        model_type: of the encoder.
        family: what the names of the classes begin with.
        encoder: which is our argument ``encoder``.
        classify: what a classifier has beside it.
        tag: what a tagger has.
        answer: what finds answers.
        defaults: what a missing key means.
        ignored: tensors that are not read.
    """
    usual = {**defaults, "problem_type": None, "id2label": None}

    def one(task: str, target: str, head: Tables, *labels: Part) -> Architecture:
        return Architecture(
            model_type,
            f"{family}For{task}",
            f"nemolet.language.{target}",
            (*encoder[0], Fixed({"encoder.pooler": False}), Reads(), *labels, *head[0]),
            (*encoder[1], *head[1], Rule("encoder.pooler.@", (), LeftOut())),
            usual,
            ignored=ignored,
            unsaid=("context", "max_tokens", "encoder.pooler"),
        )

    return (
        one("SequenceClassification", "TextClassifier", classify, Labels(), Problem()),
        one("TokenClassification", "TokenClassifier", tag, Labels(), Fixed({"crf": False})),
        one("QuestionAnswering", "QuestionAnswerer", answer),
    )
