"""Labelled texts for training: what every source of examples does, whatever is labelled."""

from __future__ import annotations

import abc
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from nemolet.data.batches import Batching, BucketLoader, PassLoader, Sample, typical_sizes
from nemolet.data.corpus import TokenizerSpec
from nemolet.data.encoding import Empty, TextEncoding, TooLong
from nemolet.data.prepared import Progress, Unit, digest, lasting
from nemolet.data.records import Record
from nemolet.data.sources import Piece
from nemolet.errors import ConfigError, DataError, nearest
from nemolet.rules import Checked
from nemolet.tokenizers import Tokenizer

Known = Mapping[str, Sequence[str]]  # names that a model has to know, by the name of its argument: ``{"labels": ...}``


class Counts(NamedTuple):
    """How many examples there are for training and validation, and what was left out or cut: why, by place."""

    train: int
    valid: int
    changed: Mapping[str, str]

    @property
    def left_out(self) -> int:
        """Examples of both parts that are not used."""
        return sum(why.startswith("left out") for why in self.changed.values())

    @property
    def changes(self) -> str:
        """Of each reason how many examples it concerns, and where the first of them are."""
        told = []
        for why, count in Counter(self.changed.values()).most_common():
            places = [place for place, reason in self.changed.items() if reason == why][:3]
            told.append(f"; {count:,} {why}: {', '.join(places)}" + (", ..." if count > 3 else ""))
        return "".join(told)


@dataclass(frozen=True, kw_only=True)
class Examples(Checked, abc.ABC):
    """Settings and steps that all sources of examples share (abstract).

    Args:
        path: the file of examples.
        valid_path: examples for validation; None sets part of ``path`` aside.
        valid_fraction: how much is set aside: every so many-th example.
        batch_size: examples per rank and step.
        context: most tokens of a text.
        too_long: what happens to longer ones: ``"error"``, ``"truncate"`` or ``"skip"``.
        empty: what happens to a text without words: ``"error"`` or ``"skip"``.
        seed: of the order; None for 0, or for the seed of a run.
    """

    path: str
    valid_path: str | None = None
    valid_fraction: float = 0.1
    batch_size: int = 32
    context: int = 256
    too_long: TooLong = "error"
    empty: Empty = "error"
    seed: int | None = None

    __buildable__ = True
    FREE: ClassVar[tuple[str, ...]] = ("path", "valid_path")
    CONFIG_RULES = (
        ("batch_size >= 1 and context >= 2", "batch_size is at least 1, context at least 2"),
        ("valid_fraction > 0 and valid_fraction < 1", "valid_fraction is a share between 0 and 1"),
    )
    PORTS: ClassVar[Mapping[str, Any]]  # the entries of a batch and their types

    @abc.abstractmethod
    def read(self, path: str) -> Iterable[Record]:
        """The examples of a file, each with its place."""

    @abc.abstractmethod
    def texts(self, record: Record) -> Iterable[str]:
        """The texts of an example, from which a tokenizer may learn."""

    @abc.abstractmethod
    def encode(self, record: Record, encoding: TextEncoding, known: Known) -> Iterable[Sample]:
        """Samples of an example; none where it is left out."""

    def names(self, records: Sequence[Record]) -> dict[str, list[str]]:
        """What these examples can be labelled with, by the name of the model's argument."""
        return {}

    def settings(self, records: Sequence[Record]) -> dict[str, str]:
        """What else a model takes from these examples, by the name of its argument."""
        return {}

    def strangers(self, record: Record, known: Known) -> Iterable[str]:
        """Labels of an example that are not known."""
        return ()

    def arrange(self, samples: Sequence[Sample]) -> list[Sample]:
        """Put samples together before they are batched; by default each stays as it is."""
        return list(samples)

    @property
    def typical(self) -> dict[str, int]:
        """Sizes of a batch."""
        return typical_sizes(self.PORTS, batch_size=self.batch_size, length=self.context)

    def prepare(
        self, tokenizer: TokenizerSpec | Tokenizer, *, progress: Progress | None = None, split: bool = True
    ) -> PreparedExamples:
        """Read, check, split and tokenise.

        Args:
            tokenizer: one, or what to make one of.
            progress: not used; examples are few.
            split: set a part aside for validation; otherwise all examples are for training and for validation.

        Raises:
            DataError: for bad input, naming file and line.
        """
        train = list(self.read(self.path))
        valid = list(self.read(self.valid_path)) if self.valid_path and split else None
        known, settings = self.names(train), self.settings(train)
        if valid is None:
            train, valid = _split(train, self.valid_fraction, self.path) if split else (train, train)
        self._check_labels([*train, *(valid if valid is not train else ())], known)
        chosen = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.make(_Texts(self, train))
        encoding = TextEncoding(chosen, self.context, self.too_long, self.empty)
        made = [[(record, list(self.encode(record, encoding, known))) for record in part] for part in (train, valid)]
        parts = [[sample for _, samples in part for sample in samples] for part in made]
        counts = Counts(len(train), len(valid), encoding.changed)
        if not all(parts):
            raise DataError(
                "no example is left",
                where=self.path if not parts[0] else self.valid_path or f"{self.path}, the part for validation",
                expected=f"some of at most {self.context} tokens, with words",
                found=f"{len(train) + len(valid):,} examples{counts.changes}",
                fix="set a larger data.context if the model can read it, or data.too_long=truncate",
            )
        kept, aside = (tuple(self.arrange(part)) for part in parts)
        measured = tuple(record for record, samples in made[1] if samples)
        return PreparedExamples(self, chosen, kept, aside, known, counts, settings, measured)

    def with_names(self, model: Any) -> Examples:
        """The same source, with the label sets of a model that knows them.

        Raises:
            ConfigError: where the settings say other ones.
        """
        mine = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        names = {name: tuple(model_names) for name, model_names in _names_of(model).items() if name in mine}
        for name, theirs in names.items():
            if mine[name] is not None and tuple(mine[name]) != theirs:
                raise ConfigError(
                    "the model has other names",
                    where=f"data.{name}",
                    expected=", ".join(theirs),
                    found=", ".join(mine[name]),
                    fix="leave them to the model, or put a new head on it with task=...",
                )
        return dataclasses.replace(self, **names)  # type: ignore[arg-type]

    def _check_labels(self, records: Sequence[Record], known: Known) -> None:
        wrong = [(record.where, label) for record in records for label in self.strangers(record, known)]
        if wrong:
            places = "\n".join(f"{where}: {label!r}" for where, label in wrong[:10])
            expected = [name for names in known.values() for name in names]
            close = nearest(wrong[0][1], expected)
            raise DataError(
                f"{len(wrong)} labels are not in the label set",
                where=wrong[0][0],
                expected="one of " + ", ".join(expected[:20]) + (", ..." if len(expected) > 20 else ""),
                found=places + ("\n..." if len(wrong) > 10 else ""),
                fix=f"did you mean {close!r}?" if close else "correct them, or name all labels in the settings",
            )


def _names_of(model: Any) -> dict[str, Sequence[str]]:
    return {name: getattr(model, name) for name in ("labels", "intents", "slots") if hasattr(model, name)}


def _split(records: list[Record], fraction: float, path: str) -> tuple[list[Record], list[Record]]:
    """Every so many-th example is set aside."""
    aside = [int((i + 1) * fraction) > int(i * fraction) for i in range(len(records))]
    parts = [r for r, a in zip(records, aside) if not a], [r for r, a in zip(records, aside) if a]
    if not all(parts):
        raise DataError(
            "too few examples to set some aside",
            where=path,
            expected=f"more than {int(1 / fraction)}",
            found=len(records),
            fix="set data.valid_path, or a larger data.valid_fraction",
        )
    return parts


@dataclass(frozen=True)
class _Texts:
    """The texts of examples as documents, for training a tokenizer."""

    source: Examples
    records: Sequence[Record]

    def pieces(self) -> Iterator[Piece]:
        for record in self.records:
            yield from (Piece(text, last=True) for text in self.source.texts(record) if text)


@dataclass(frozen=True)
class PreparedExamples:
    """Samples with their tokenizer, ready to be learned from (final).

    Args:
        source: where they come from.
        tokenizer: that made their ids.
        train: samples for training.
        valid: samples for validation.
        known: names of what they are labelled with.
        counts: of examples, with what was left out.
        settings: what else a model takes from them.
        measured: the examples that the samples for validation were made of.
    """

    source: Examples
    tokenizer: Tokenizer
    train: tuple[Sample, ...]
    valid: tuple[Sample, ...]
    known: Known
    counts: Counts
    settings: Mapping[str, str]
    measured: tuple[Record, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The entries of a batch."""
        return tuple(self.source.PORTS)

    @property
    def unit(self) -> Unit:
        """Progress is counted in tokens, padding included."""
        return Unit("tokens")

    @property
    def sizes(self) -> dict[str, Any]:
        """What a model has to know: the size of the vocabulary, the names of labels, and how they are used."""
        names = {name: list(names) for name, names in self.known.items()}
        return {"vocab_size": self.tokenizer.vocab_size, **names, **self.settings}

    @property
    def summary(self) -> str:
        """For a card."""
        names = "".join(f", {len(values)} {name}" for name, values in self.known.items())
        return f"{self.source.path} ({self.counts.train:,} examples{names}{self.counts.changes})"

    @property
    def identity(self) -> dict[str, Any]:
        """Settings and samples."""
        return {**lasting(self.source), "train": digest(self.train), "valid": digest(self.valid)}

    def derived(self, valid_loss: float) -> dict[str, float]:
        """A loss per label has no second name."""
        return {}

    def train_loader(self, *, rank: int = 0, ranks: int = 1) -> BucketLoader:
        """Batches without end."""
        return BucketLoader(self._batching(self.train, rank, ranks), seed=self.source.seed or 0)

    def valid_loader(self, *, rank: int = 0, ranks: int = 1, max_batches: int | None = None) -> PassLoader:
        """Every example for validation once."""
        return PassLoader(self._batching(self.valid, rank, ranks), max_batches=max_batches)

    def _batching(self, samples: Sequence[Sample], rank: int, ranks: int) -> Batching:
        return Batching(samples, self.source.PORTS, batch_size=self.source.batch_size, rank=rank, ranks=ranks)
