"""Sources of labelled texts: classes, intents with slots, tagged words, answered questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nemolet.data.batches import Sample
from nemolet.data.encoding import Span, TextEncoding, as_text, split_words
from nemolet.data.examples import Examples, Known
from nemolet.data.ports import ClassesB, LabelsBU, LabelsBV, PlacesB, WordsBU
from nemolet.data.records import Record, read_columns, read_records, read_squad
from nemolet.data.schemes import scheme_of
from nemolet.errors import DataError
from nemolet.types import LabelsB, MaskBT, TokenIdsBT

NO_ANSWER = 0  # the token of a window that stands for no answer in it, as in BERT


@dataclass(frozen=True, kw_only=True)
class LabelledTexts(Examples):
    """Texts with a class each: JSON lines (final).

    Args:
        text_key: where the text lies in a record.
        label_key: where its class lies.
        labels: all classes, in the order of their numbers; None for those of the training data.
        without: classes whose examples are left out.

    Example:
        >>> source = LabelledTexts(path="train.jsonl", batch_size=16)
        >>> source.typical["B"]
        16
    """

    text_key: str = "text"
    label_key: str = "label"
    labels: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()

    PORTS: ClassVar = {"tokens": TokenIdsBT, "mask": MaskBT, "labels": LabelsB}

    def read(self, path: str) -> Iterable[Record]:
        records = read_records(path, {self.text_key: str, self.label_key: str})
        return [record for record in records if record.values[self.label_key] not in self.without]

    def texts(self, record: Record) -> Iterable[str]:
        return [record.values[self.text_key]]

    def names(self, records: Sequence[Record]) -> dict[str, list[str]]:
        return {"labels": list(self.labels or sorted({r.values[self.label_key] for r in records}))}

    def strangers(self, record: Record, known: Known) -> Iterable[str]:
        label = record.values[self.label_key]
        return () if label in known["labels"] else (label,)

    def encode(self, record: Record, encoding: TextEncoding, known: Known) -> Iterable[Sample]:
        tokens = encoding.text(record.values[self.text_key], record.where)
        if tokens is not None:
            yield {"tokens": tokens, "labels": known["labels"].index(record.values[self.label_key])}


@dataclass(frozen=True, kw_only=True)
class MultiLabelledTexts(Examples):
    """Texts with any number of labels each: JSON lines with a list (final).

    Args:
        text_key: where the text lies in a record.
        label_key: where the list of its labels lies.
        labels: all labels, in the order of their numbers; None for those of the training data.
    """

    text_key: str = "text"
    label_key: str = "labels"
    labels: tuple[str, ...] | None = None

    PORTS: ClassVar = {"tokens": TokenIdsBT, "mask": MaskBT, "labels": LabelsBV}

    def read(self, path: str) -> Iterable[Record]:
        return read_records(path, {self.text_key: str, self.label_key: list})

    def texts(self, record: Record) -> Iterable[str]:
        return [record.values[self.text_key]]

    def names(self, records: Sequence[Record]) -> dict[str, list[str]]:
        return {"labels": list(self.labels or sorted({str(n) for r in records for n in r.values[self.label_key]}))}

    def strangers(self, record: Record, known: Known) -> Iterable[str]:
        return [str(label) for label in record.values[self.label_key] if label not in known["labels"]]

    def encode(self, record: Record, encoding: TextEncoding, known: Known) -> Iterable[Sample]:
        tokens = encoding.text(record.values[self.text_key], record.where)
        if tokens is not None:
            yield {"tokens": tokens, "labels": [int(n in record.values[self.label_key]) for n in known["labels"]]}


@dataclass(frozen=True, kw_only=True)
class IntentsAndSlots(Examples):
    """Requests with an intent and a tag for each word: JSON lines (final).

    Args:
        text_key: where the words lie in a record, with spaces between them.
        tags_key: where their tags lie, in the same way: ``O``, ``B-...`` and ``I-...``, or another of :data:`SCHEMES`.
        intent_key: where the intent lies.
        intents: all intents; None for those of the training data.
        slots: all tags; None for those of the training data.
    """

    text_key: str = "text"
    tags_key: str = "tags"
    intent_key: str = "intent"
    intents: tuple[str, ...] | None = None
    slots: tuple[str, ...] | None = None

    PORTS: ClassVar = {
        "tokens": TokenIdsBT,
        "mask": MaskBT,
        "words": WordsBU,
        "labels": LabelsBU,
        "classes": ClassesB,
    }

    def read(self, path: str) -> Iterable[Record]:
        for where, values in read_records(path, dict.fromkeys((self.text_key, self.tags_key, self.intent_key), str)):
            words, tags = values[self.text_key].split(), values[self.tags_key].split()
            _check_tags(words, tags, where)
            yield Record(where, {"words": words, "tags": tags, "intent": values[self.intent_key]})

    def texts(self, record: Record) -> Iterable[str]:
        return [" ".join(record.values["words"])]

    def names(self, records: Sequence[Record]) -> dict[str, list[str]]:
        return {
            "intents": list(self.intents or sorted({r.values["intent"] for r in records})),
            "slots": list(self.slots or tag_set(records)),
        }

    def settings(self, records: Sequence[Record]) -> dict[str, str]:
        return {"scheme": scheme_of(r.values["tags"] for r in records)}

    def strangers(self, record: Record, known: Known) -> Iterable[str]:
        values = record.values
        wrong = [tag for tag in values["tags"] if tag not in known["slots"]]
        return wrong + [values["intent"]] * (values["intent"] not in known["intents"])

    def encode(self, record: Record, encoding: TextEncoding, known: Known) -> Iterable[Sample]:
        for sample in _tagged(record, encoding, known["slots"]):
            yield {**sample, "classes": known["intents"].index(record.values["intent"])}


@dataclass(frozen=True, kw_only=True)
class TaggedWords(Examples):
    """Sentences with a tag for each word: CoNLL and its relatives (final).

    Args:
        word_column: column of the word, from 0.
        tag_column: column of the tag: ``O``, ``B-...`` and ``I-...``, or another of :data:`SCHEMES`.
        labels: all tags; None for those of the training data.
    """

    word_column: int = 0
    tag_column: int = 1
    labels: tuple[str, ...] | None = None

    PORTS: ClassVar = {"tokens": TokenIdsBT, "mask": MaskBT, "words": WordsBU, "labels": LabelsBU}

    def read(self, path: str) -> Iterable[Record]:
        return read_columns(path, word=self.word_column, tag=self.tag_column)

    def texts(self, record: Record) -> Iterable[str]:
        return [" ".join(record.values["words"])]

    def names(self, records: Sequence[Record]) -> dict[str, list[str]]:
        return {"labels": list(self.labels or tag_set(records))}

    def settings(self, records: Sequence[Record]) -> dict[str, str]:
        return {"scheme": scheme_of(r.values["tags"] for r in records)}

    def strangers(self, record: Record, known: Known) -> Iterable[str]:
        return [tag for tag in record.values["tags"] if tag not in known["labels"]]

    def encode(self, record: Record, encoding: TextEncoding, known: Known) -> Iterable[Sample]:
        return _tagged(record, encoding, known["labels"])


@dataclass(frozen=True, kw_only=True)
class Questions(Examples):
    """Questions whose answers are pieces of a text: SQuAD 1.1 and 2.0 (final).

    A text that is too long with its question is read in windows that overlap by half. A window without the answer is
    an example, too: its answer is its first token.
    """

    PORTS: ClassVar = {"tokens": TokenIdsBT, "mask": MaskBT, "readable": MaskBT, "starts": PlacesB, "ends": PlacesB}

    def read(self, path: str) -> Iterable[Record]:
        return read_squad(path)

    def texts(self, record: Record) -> Iterable[str]:
        return [record.values["question"], record.values["context"]]

    def encode(self, record: Record, encoding: TextEncoding, known: Known) -> Iterable[Sample]:
        for window in windows(record.values["question"], record.values["context"], encoding, record.where):
            sample = {"tokens": window.tokens, "readable": window.readable}
            places = None
            for answer in record.values["answers"][:1]:
                places = window.places(answer["start"], answer["start"] + len(answer["text"]))
            starts, ends = places or (NO_ANSWER, NO_ANSWER)
            yield {**sample, "starts": starts, "ends": ends}


@dataclass(frozen=True)
class Window:
    """A question and a part of a text, as ids."""

    tokens: list[int]
    readable: list[bool]  # True where an answer may lie
    spans: list[Span | None]  # the word of the text that each id belongs to

    def places(self, start: int, end: int) -> tuple[int, int] | None:
        """First and last id of the characters from ``start`` to ``end``, or None where they are not all here."""
        inside = [i for i, span in enumerate(self.spans) if span and span.end > start and span.start < end]
        if not inside:
            return None
        first, last = self.spans[inside[0]], self.spans[inside[-1]]
        whole = first is not None and last is not None and first.start <= start and last.end >= end
        return (inside[0], inside[-1]) if whole else None


def windows(question: str, context: str, encoding: TextEncoding, where: str) -> list[Window]:
    """A question beside each part of a text that it does not fit together with.

    Raises:
        DataError: for a question that leaves no room for the text, or an empty one.
    """
    _, end = encoding.tokenizer.marks
    asked = encoding.text(question, where) or []
    asked = asked and [*asked[: len(asked) - len(end)], *encoding.tokenizer.between]
    words = split_words(as_text(context, where))
    if not words or not asked:
        encoding.text(context, where)
        return []
    pieces = [
        encoding.tokenizer.encode(f" {w.text}" if w.start and context[w.start - 1].isspace() else w.text) for w in words
    ]
    room = encoding.context - len(asked) - len(end)
    if room < 8:
        raise DataError(
            "the question leaves no room for the text",
            where=where,
            expected=f"at most {encoding.context - 8 - len(end)} tokens",
            found=len(asked),
            fix="set a larger data.context",
        )
    made = []
    for first, last in _stretches([len(piece) for piece in pieces], room):
        part = [token for piece in pieces[first:last] for token in piece][:room]
        owners = [w for w, p in zip(words[first:last], pieces[first:last]) for _ in p][:room]
        made.append(
            Window(
                [*asked, *part, *end],
                [False] * len(asked) + [True] * len(part) + [False] * len(end),
                [*[None] * len(asked), *owners, *[None] * len(end)],
            )
        )
    return made


def _stretches(sizes: Sequence[int], room: int) -> list[tuple[int, int]]:
    """First and last words of windows that hold at most ``room`` tokens and overlap by about half.

    Example:
        >>> _stretches([2, 2, 2, 2, 2], 6)
        [(0, 3), (1, 4), (2, 5)]
    """
    made = []
    first = 0
    while True:
        last, taken = first, 0
        while last < len(sizes) and (taken + sizes[last] <= room or last == first):
            taken, last = taken + sizes[last], last + 1
        made.append((first, last))
        if last == len(sizes):
            return made
        step, first = sizes[first], first + 1
        while step + sizes[first] <= room // 2:
            step, first = step + sizes[first], first + 1


def tag_set(records: Iterable[Record]) -> list[str]:
    """The tags of examples, ``O`` first."""
    found = {tag for record in records for tag in record.values["tags"]}
    return (["O"] if "O" in found else []) + sorted(found - {"O"})


def _tagged(record: Record, encoding: TextEncoding, tags: Sequence[str]) -> Iterable[Sample]:
    words = encoding.words(record.values["words"], record.where)
    if words is not None:
        labels = [tags.index(record.values["tags"][number]) for number in words.numbers]
        yield {"tokens": words.ids, "words": words.firsts, "labels": labels}


def _check_tags(words: Sequence[Any], tags: Sequence[Any], where: str) -> None:
    if len(words) != len(tags):
        raise DataError(
            "each word needs one tag",
            where=where,
            expected=f"{len(words)} tags",
            found=len(tags),
            fix="separate words and tags by single spaces",
        )
