"""Sources of pairs of texts: alike in meaning, or a text and its translation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from nemolet.data.batches import Sample
from nemolet.data.encoding import TextEncoding
from nemolet.data.examples import Examples, Known
from nemolet.data.records import Record, SideBySide, read_records, read_squad
from nemolet.errors import DataError
from nemolet.types import LabelsBT, MaskBS, MaskBT, TokenIdsBS, TokenIdsBT


@dataclass(frozen=True, kw_only=True)
class SimilarTexts(Examples):
    """Pairs that belong together: JSON lines, or the questions and texts of a SQuAD file (``.json``; final).

    Args:
        text_key: where the first text lies in a record.
        other_key: where the second lies.
    """

    text_key: str = "text"
    other_key: str = "other"

    PORTS: ClassVar = {
        "tokens": TokenIdsBT,
        "mask": MaskBT,
        "other_tokens": TokenIdsBS,
        "other_mask": MaskBS,
    }

    def read(self, path: str) -> Iterable[Record]:
        if path.endswith(".json"):
            for where, values in read_squad(path):
                yield Record(where, {self.text_key: values["question"], self.other_key: values["context"]})
        else:
            yield from read_records(path, {self.text_key: str, self.other_key: str})

    def texts(self, record: Record) -> Iterable[str]:
        return [record.values[self.text_key], record.values[self.other_key]]

    def encode(self, record: Record, encoding: TextEncoding, known: Known) -> Iterable[Sample]:
        one, other = (encoding.text(text, record.where) for text in self.texts(record))
        if one is not None and other is not None:
            yield {"tokens": one, "other_tokens": other}


@dataclass(frozen=True, kw_only=True)
class ParallelTexts(Examples):
    """Texts and their translations, or summaries: two files side by side, or JSON lines (final).

    The tokens of the target begin with ``start``; its labels are the same tokens one step ahead, and the end.

    Args:
        target: the file whose lines belong to those of ``path``; None where ``path`` holds JSON lines.
        valid_target: the same for ``valid_path``.
        start: the token before a target; None for that of the model, or else for where documents begin.
        source_key: where the source lies in a record of JSON lines.
        target_key: where the target lies.
    """

    target: str | None = None
    valid_target: str | None = None
    start: int | None = None
    source_key: str = "source"
    target_key: str = "target"

    FREE = (*Examples.FREE, "target", "valid_target")
    PORTS: ClassVar = {"source": TokenIdsBS, "source_mask": MaskBS, "tokens": TokenIdsBT, "labels": LabelsBT}

    def read(self, path: str) -> Iterable[Record]:
        beside = self.target if path == self.path else self.valid_target
        if beside is not None:
            yield from SideBySide(path, beside).records()
            return
        for where, values in read_records(path, {self.source_key: str, self.target_key: str}):
            yield Record(where, {"source": values[self.source_key], "target": values[self.target_key]})

    def texts(self, record: Record) -> Iterable[str]:
        return [record.values["source"], record.values["target"]]

    def encode(self, record: Record, encoding: TextEncoding, known: Known) -> Iterable[Sample]:
        source = encoding.text(record.values["source"], record.where)
        target = encoding.text(record.values["target"], record.where)
        end = encoding.tokenizer.eos_id
        if end is None:
            raise DataError(
                "the tokenizer has no end-of-text token",
                where="tokenizer",
                expected="a token that ends a translation",
                fix="choose tokenizer=sentencepiece",
            )
        if source is not None and target is not None:
            labels = target if target[-1] == end else [*target[: encoding.context - 1], end]
            begun = self.start is None and labels[0] == encoding.tokenizer.bos_id
            start = labels.pop(0) if begun else end if self.start is None else self.start
            yield {"source": source, "tokens": [start, *labels[:-1]], "labels": labels}

    def with_names(self, model: Any) -> ParallelTexts:
        """The same source, with targets that begin as those of the model."""
        return self if self.start is not None else replace(self, start=getattr(model, "start", None))
