"""Spans in sequences of tags, and how many of them were found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nemolet.data.ports import LabelsBU, LogitsBUV, LogitsPV
from nemolet.data.schemes import ENDING, OUTSIDE, SINGLE, tag_of
from nemolet.language.crf import likeliest_chain
from nemolet.metrics import Share
from nemolet.module import NeuralModule
from nemolet.types import IGNORED


class TagSpan(NamedTuple):
    """Words from ``start`` up to ``end`` that form one thing."""

    label: str
    start: int
    end: int


def spans_of(tags: Sequence[str]) -> list[TagSpan]:
    """The spans that tags describe, in whatever scheme, read as conlleval reads them.

    A span ends before another kind, a mark of a beginning or of a single word, and behind a mark of an end; a tag that
    continues nothing begins a span.

    Example:
        >>> spans_of(["B-city", "I-city", "O", "I-year"])
        [TagSpan(label='city', start=0, end=2), TagSpan(label='year', start=3, end=4)]
    """
    spans: list[TagSpan] = []
    start, before = -1, tag_of(OUTSIDE)
    for index, tag in enumerate(map(tag_of, [*tags, OUTSIDE])):
        ends = before.mark in ENDING + SINGLE or tag.kind != before.kind or tag.mark in OUTSIDE + "B" + SINGLE
        if start >= 0 and ends:
            spans.append(TagSpan(before.kind, start, index))
            start = -1
        if start < 0 and tag.mark != OUTSIDE:
            start = index
        before = tag
    return spans


class SpanScore(NamedTuple):
    """How many spans were right, were predicted, and are there."""

    right: int
    predicted: int
    gold: int

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 where there is nothing."""
        return 2 * self.right / max(1, self.predicted + self.gold)


def span_score(predicted: Iterable[Sequence[str]], gold: Iterable[Sequence[str]]) -> SpanScore:
    """Count the spans of many sentences.

    Example:
        >>> span_score([["B-a", "I-a", "O"]], [["B-a", "O", "B-b"]])
        SpanScore(right=0, predicted=1, gold=2)
    """
    counts = [0, 0, 0]
    for ours, theirs in zip(predicted, gold, strict=True):
        mine, real = set(spans_of(ours)), set(spans_of(theirs))
        for index, spans in enumerate((mine & real, mine, real)):
            counts[index] += len(spans)
    return SpanScore(*counts)


def decode_tags(logits_BUV: Tensor, transitions_PV: Tensor | None, lengths_B: Tensor) -> Tensor:
    """The likeliest tags, each for itself or as a chain where there are transitions."""
    if transitions_PV is None:
        return logits_BUV.argmax(-1)
    return likeliest_chain(logits_BUV.float(), transitions_PV.float(), lengths_B)


class SpanF1(NeuralModule):
    """F1 of spans, as the quotient of twice the right ones by the predicted and the real ones (final).

    Args:
        labels: the tags.

    Shape: logits_BUV, labels_BU, transitions_PV -> scalar, scalar.

    Example:
        >>> metric = SpanF1(labels=["O", "B-a", "I-a"])
        >>> metric(torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]), torch.tensor([[1, 2]]))
        Share(part=tensor(2), whole=tensor(2))
    """

    def __init__(self, *, labels: Sequence[str]) -> None:
        super().__init__(V=len(labels))
        self.labels = tuple(labels)

    def forward(self, logits: LogitsBUV, labels: LabelsBU, transitions: LogitsPV | None = None) -> Share:
        valid_BU = labels != IGNORED
        tags_BU = decode_tags(logits, transitions, valid_BU.sum(1))
        rows = [
            ([self.labels[t] for t in row[keep].tolist()], [self.labels[t] for t in gold[keep].tolist()])
            for row, gold, keep in zip(tags_BU, labels, valid_BU)
        ]
        score = span_score([ours for ours, _ in rows], [gold for _, gold in rows])
        device = logits.device
        return Share(
            torch.tensor(2 * score.right, device=device), torch.tensor(score.predicted + score.gold, device=device)
        )
