"""Sources of conversations: answers to learn, and pairs of answers of which one is preferred."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nemolet.data.batches import Sample
from nemolet.data.chat import Learned, encode_chat, lint
from nemolet.data.chat_template import ChatTemplate, Message
from nemolet.data.encoding import TextEncoding
from nemolet.data.examples import Examples, Known
from nemolet.data.ports import LabelsBS
from nemolet.data.records import Record, read_records
from nemolet.errors import DataError
from nemolet.types import IGNORED, LabelsBT, PositionsBT, SegmentsBT, TokenIdsBS, TokenIdsBT


@dataclass(frozen=True, kw_only=True)
class Instructions(Examples):
    """Conversations whose answers are learned: JSON lines (final).

    A record holds ``messages`` with ``role`` and ``content``; or a ``prompt`` and a ``response``; or, as in
    self-instruct, an ``instruction`` and ``instances`` of ``input`` and ``output``. Short conversations are packed
    into one sequence, where each sees only itself.

    Args:
        template: how a conversation is written down: Jinja, or ``"plain"`` or ``"chatml"``; null for the template that
            the model came with, or else the plain one.
        template_tokens: special tokens by the names that the template has for them; null for those of the tokenizer.
        pack: whether several conversations share a sequence.
    """

    template: str | None = None
    template_tokens: dict[str, str] | None = None
    pack: bool = True

    PORTS: ClassVar = {"tokens": TokenIdsBT, "labels": LabelsBT, "segments": SegmentsBT, "positions": PositionsBT}

    def read(self, path: str) -> Iterable[Record]:
        for where, values in read_records(path, {}):
            for messages in conversations(values, where):
                yield Record(where, {"messages": messages})

    def texts(self, record: Record) -> Iterable[str]:
        said = [message.get("content") for message in record.values["messages"] if isinstance(message, Mapping)]
        return [content for content in said if isinstance(content, str)]

    def encode(self, record: Record, encoding: TextEncoding, known: Known) -> Iterable[Sample]:
        template = ChatTemplate(self.template or "plain", self.template_tokens or {})
        chat = fitted(record.values["messages"], encoding, record.where, template)
        if chat is not None:
            count = len(chat.tokens)
            yield {
                "tokens": chat.tokens,
                "labels": chat.labels(IGNORED),
                "segments": [1] * count,
                "positions": list(range(count)),
            }

    def arrange(self, samples: Sequence[Sample]) -> list[Sample]:
        return packed(samples, self.context) if self.pack else list(samples)


@dataclass(frozen=True, kw_only=True)
class Preferences(Examples):
    """A prompt with a better and a worse answer: JSON lines with ``prompt``, ``chosen`` and ``rejected`` (final).

    The prompt is a text or a list of messages.

    Args:
        template: how a conversation is written down, as above.
        template_tokens: likewise.
    """

    template: str | None = None
    template_tokens: dict[str, str] | None = None

    PORTS: ClassVar = {
        "tokens": TokenIdsBT,
        "labels": LabelsBT,
        "rejected_tokens": TokenIdsBS,
        "rejected_labels": LabelsBS,
    }

    def read(self, path: str) -> Iterable[Record]:
        return read_records(path, {"prompt": (str, list), "chosen": str, "rejected": str})

    def texts(self, record: Record) -> Iterable[str]:
        return [record.values["chosen"], record.values["rejected"]]

    def encode(self, record: Record, encoding: TextEncoding, known: Known) -> Iterable[Sample]:
        prompt = record.values["prompt"]
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        template = ChatTemplate(self.template or "plain", self.template_tokens or {})
        answers = [[*before, {"role": "assistant", "content": record.values[k]}] for k in ("chosen", "rejected")]
        better, worse = (fitted(messages, encoding, record.where, template) for messages in answers)
        if better is not None and worse is not None:
            yield {
                "tokens": better.tokens,
                "labels": better.labels(IGNORED),
                "rejected_tokens": worse.tokens,
                "rejected_labels": worse.labels(IGNORED),
            }


def conversations(values: Any, where: str) -> list[list[Message]]:
    """The conversations of a record in any of the known forms.

    Raises:
        DataError: for a record in none of them.

    Example:
        >>> conversations({"prompt": "Hi", "response": "Hello"}, "here")
        [[{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]]
    """
    held = values if isinstance(values, Mapping) else {}
    if isinstance(held.get("messages"), list) and held["messages"]:
        return [held["messages"]]
    if isinstance(held.get("prompt"), str) and isinstance(held.get("response"), str):
        return [_exchange(held["prompt"], held["response"])]
    instances = held.get("instances")
    whole = isinstance(instances, list) and all(isinstance(one, Mapping) and "output" in one for one in instances)
    if isinstance(held.get("instruction"), str) and whole and instances:
        asked = held["instruction"]
        return [
            _exchange(f"{asked}\n\n{one['input']}" if one.get("input") else asked, one["output"]) for one in instances
        ]
    raise DataError(
        "the record is no conversation",
        where=where,
        expected="messages; or prompt and response; or instruction and instances, each with an output",
        found=", ".join(map(str, held)) or f"{type(values).__name__} {values!r:.60}",
    )


def _exchange(prompt: str, response: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def fitted(messages: Sequence[Message], encoding: TextEncoding, where: str, template: ChatTemplate) -> Learned | None:
    """Ids of a conversation that was checked, no longer than the context; None where it is left out.

    Raises:
        DataError: for a conversation that is too long, empty, or fails :func:`nemolet.data.chat.lint`.
    """
    if encoding.leaves_out(" ".join(str(m.get("content", "")) for m in messages if isinstance(m, Mapping)), where):
        return None
    chat = encode_chat(encoding.tokenizer, messages, where, template=template)
    if not encoding.fits(len(chat.tokens), where):
        return None
    kept = Learned(chat.tokens[: encoding.context], chat.learned[: encoding.context])
    lint(encoding.tokenizer, kept, where, cut=len(kept.tokens) < len(chat.tokens))
    return kept


def packed(samples: Sequence[Sample], length: int) -> list[Sample]:
    """Put samples into sequences of at most ``length``, the longest first, each where it fits best.

    Segments are numbered within a sequence; positions begin anew.

    Example:
        >>> one = {"tokens": [5, 6], "labels": [6, -100], "segments": [1, 1], "positions": [0, 1]}
        >>> packed([one, one, one], 4)[0]["segments"]
        [1, 1, 2, 2]
    """
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda s: -len(s["tokens"])):
        size = len(sample["tokens"])
        fitting = [index for index, free in enumerate(room) if free >= size]
        if fitting:
            best = min(fitting, key=room.__getitem__)
            rows[best].append(sample)
            room[best] -= size
        else:
            rows.append([sample])
            room.append(length - size)
    return [
        {
            "tokens": [t for s in row for t in s["tokens"]],
            "labels": [t for s in row for t in s["labels"]],
            "segments": [n for n, s in enumerate(row, 1) for _ in s["tokens"]],
            "positions": [p for s in row for p in s["positions"]],
        }
        for row in rows
    ]
