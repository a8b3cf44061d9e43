"""Batches of samples that differ in length: padded as their types say, and loaders of them that resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemolet.data.buckets import pooled
from nemolet.data.prepared import Batch, DummyBatch
from nemolet.errors import DataError
from nemolet.types import IGNORED, Axis, Labels, Mask, NeuralType

Sample = Mapping[str, Any]  # numbers, and arrays whose axes after the batch are those of the port


def port_type(alias: Any) -> NeuralType:
    """The type inside an alias such as ``TokenIdsBT``.

    Example:
        >>> from nemolet.types import LabelsB
        >>> str(port_type(LabelsB))
        'B Labels(vocab=V)'
    """
    found: NeuralType = next(arg for arg in get_args(alias) if isinstance(arg, NeuralType))
    return found


def collate(samples: Sequence[Sample], ports: Mapping[str, Any]) -> Batch:
    """Stack samples; shorter ones are filled up, labels with :data:`IGNORED`, masks with False, the rest with 0.

    Args:
        samples: at least one; a mask that they do not hold is True where the other entry of its axes is.
        ports: types of the entries by name, as ``forward`` methods are annotated.

    Example:
        >>> from nemolet.types import LabelsB, MaskBT, TokenIdsBT
        >>> ports = {"tokens": TokenIdsBT, "mask": MaskBT, "labels": LabelsB}
        >>> batch = collate([{"tokens": [5], "labels": 1}, {"tokens": [6, 7], "labels": 0}], ports)
        >>> batch["tokens"].tolist(), batch["mask"].tolist(), batch["labels"].tolist()
        ([[5, 0], [6, 7]], [[True, False], [True, True]], [1, 0])
    """
    batch: Batch = {}
    for name, alias in ports.items():
        declared = port_type(alias)
        if isinstance(declared.element, Mask) and name not in samples[0]:
            lengths = torch.tensor([len(sample[_measured(ports, name)]) for sample in samples])
            batch[name] = torch.arange(int(lengths.max())) < lengths[:, None]
            continue
        values = [np.asarray(sample[name]) for sample in samples]
        batch[name] = _stacked(values, _filling(declared))
    return batch


def _measured(ports: Mapping[str, Any], mask: str) -> str:
    """The entry whose length a mask tells: the first of the same axes."""
    axes = port_type(ports[mask]).axes
    return next(name for name, alias in ports.items() if name != mask and port_type(alias).axes == axes)


def _filling(declared: NeuralType) -> int:
    return IGNORED if isinstance(declared.element, Labels) else 0


def _stacked(values: Sequence[NDArray[Any]], filling: int) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(value.shape for value in values))]
    stack = np.full((len(values), *shape), filling, values[0].dtype if values[0].dtype.kind in "fb" else np.int64)
    if not shape:
        return torch.from_numpy(np.array(values, stack.dtype))
    for row, value in zip(stack, values):
        row[tuple(slice(size) for size in value.shape)] = value
    return torch.from_numpy(stack)


class Batching:
    """How samples are put into batches (final).

    Args:
        samples: at least one.
        ports: types of the entries.
        batch_size: samples per rank.
        rank: of this process.
        ranks: number of processes.
    """

    def __init__(
        self, samples: Sequence[Sample], ports: Mapping[str, Any], *, batch_size: int, rank: int = 0, ranks: int = 1
    ) -> None:
        if not samples:
            raise DataError(
                "there are no examples", where="data", expected="at least one", fix="see data.empty and data.too_long"
            )
        self.samples, self.ports, self.batch_size, self.rank, self.ranks = samples, ports, batch_size, rank, ranks
        first = next(name for name, alias in ports.items() if len(port_type(alias).axes) > 1)
        self.lengths = np.array([len(sample[first]) for sample in samples])
        self.together = batch_size * ranks

    def batch(self, numbers: NDArray[np.int64]) -> Batch:
        """This rank's share of the samples with these numbers."""
        return collate([self.samples[number] for number in numbers[self.rank :: self.ranks]], self.ports)


class BucketLoader:
    """An endless stream of shuffled batches; those of one batch are about as long (final).

    A pass is a function of the seed and its number, so the state is how many batches were handed out.

    Args:
        batching: of the samples.
        seed: of the order.
        pool: how many batches are sorted by length together.
    """

    def __init__(self, batching: Batching, *, seed: int = 0, pool: int = 50) -> None:
        self.batching, self.seed, self.pool = batching, seed, pool
        self.number = 0

    def __iter__(self) -> Iterator[Batch]:
        plan: list[NDArray[np.int64]] = []
        planned = -1
        while True:
            size = -(-len(self.batching.samples) // self.batching.together)
            epoch, index = divmod(self.number, size)
            if epoch != planned:
                random = np.random.default_rng([self.seed, epoch])
                plan = pooled(self.batching.lengths, self.batching.together, random, pool=self.pool)
                planned = epoch
            self.number += 1
            yield self.batching.batch(plan[index])

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader stood."""
        self.number = int(state["number"])


class PassLoader:
    """Each sample once, the shortest first; every rank takes the same number of steps, some with a dummy batch (final).

    Args:
        batching: of the samples.
        max_batches: stop after so many steps; None for one whole pass.
    """

    def __init__(self, batching: Batching, *, max_batches: int | None = None) -> None:
        self.batching = batching
        steps = -(-len(batching.samples) // batching.together)
        self.steps = steps if max_batches is None else min(steps, max_batches)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        order = np.argsort(self.batching.lengths, kind="stable")
        for step in range(self.steps):
            numbers = order[step * self.batching.together : (step + 1) * self.batching.together]
            if self.batching.rank < len(numbers):
                yield self.batching.batch(numbers)
            else:
                yield DummyBatch(collate([self.batching.samples[numbers[0]]], self.batching.ports))


def typical_sizes(ports: Mapping[str, Any], *, batch_size: int, length: int) -> dict[str, int]:
    """Sizes of a batch's axes by letter: as many samples as asked, all times as long as asked."""
    letters: set[Axis] = {axis for alias in ports.values() for axis in port_type(alias).axes}
    return {axis.letter: batch_size if axis.letter == "B" else length for axis in letters if axis.letter in "BTSU"}
