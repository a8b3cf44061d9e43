"""What training needs of data, whatever it holds: text, speech, or pairs of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from nemolet.tokenizers import Tokenizer

if TYPE_CHECKING:
    from nemolet.data.corpus import TokenizerSpec

Batch = dict[str, Tensor]
Progress = Callable[[str, int], Callable[[int], Any]]  # (what, total bytes) -> update(bytes)


class DummyBatch(dict[str, Tensor]):
    """A batch for a rank that has none left: it keeps step with the others, and nothing in it counts (final)."""


class Loader(Protocol):
    """An endless stream of batches that knows where it stands.

    The state right after a batch was handed out is where a run goes on that has used this batch.
    """

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Unit:
    """What progress is counted in.

    Args:
        name: plural, as a column of ``metrics.csv``.
        size: how many entries of the first tensor of a batch make one.

    Example:
        >>> Unit("seconds", 16000).count(48000)
        3.0
    """

    name: str = "tokens"
    size: float = 1.0

    def count(self, entries: int) -> float:
        """Units that so many entries are; whole ones where an entry is one."""
        return entries if self.size == 1 else entries / self.size


class Source(Protocol):
    """The settings of some data, from which a config builds it."""

    @property
    def seed(self) -> int | None:
        """Of the order; None for that of the run. A dataclass field, since a run replaces it."""

    @property
    def typical(self) -> Mapping[str, int]:
        """Sizes of the axes of one rank's batch, by letter, for counting work without reading anything."""

    def prepare(self, tokenizer: TokenizerSpec | Tokenizer, *, progress: Progress | None = None) -> Prepared:
        """Read, check and split; raises DataError for bad input, naming file and line."""


class Prepared(Protocol):
    """Data that is ready to be learned from.

    The entries of a batch have the names of the inputs of the graph that is trained: the model's and the loss's.
    """

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Goes into the archive."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The entries of a batch."""

    @property
    def unit(self) -> Unit:
        """What progress is counted in."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """What a model has to know of its data, by the name of its argument: ``{"vocab_size": 512}``."""

    @property
    def summary(self) -> str:
        """What the data is, in a line of text for the model's card."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What tells this data from other data, as plain data: a run goes on only with the same."""

    def derived(self, valid_loss: float) -> Mapping[str, float]:
        """Further names for a validation loss, such as bits per byte."""

    def train_loader(self, *, rank: int = 0, ranks: int = 1) -> Loader:
        """Batches without end, those of one rank of several."""

    def valid_loader(self, *, rank: int = 0, ranks: int = 1, max_batches: int | None = None) -> Iterable[Batch]:
        """Every sample for validation once; the same number of batches on every rank."""


def lasting(source: Any) -> dict[str, Any]:
    """The settings of a source by name, without its ``FREE`` ones: where it lies and how fast it is read.

    Example:
        >>> @dataclass(frozen=True)
        ... class Lines:
        ...     path: str
        ...     workers: int = 1
        ...     FREE = ("workers",)
        >>> lasting(Lines("a.txt"))
        {'path': 'a.txt'}
    """
    free = getattr(source, "FREE", ())
    settings = {field.name: getattr(source, field.name) for field in fields(source) if field.name not in free}
    return {name: lasting(value) if is_dataclass(value) else value for name, value in settings.items()}


def digest(items: Sequence[Any], *, most: int = 4096) -> str:
    """Sixteen digits that tell sequences apart: their length, and all items or, of many, some spread evenly.

    Example:
        >>> digest(["a", "b"]) == digest(["a", "c"])
        False
    """
    made = hashlib.sha256(str(len(items)).encode())
    for number in range(min(most, len(items))):
        made.update(repr(items[number * len(items) // min(most, len(items))]).encode())
    return made.hexdigest()[:16]
