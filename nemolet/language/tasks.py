"""What all task models of text share: reading raw texts in batches, and saying what they are trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from nemolet.data.batches import Sample, collate
from nemolet.data.encoding import as_list
from nemolet.data.prepared import Batch
from nemolet.errors import DataError, DeclarationError
from nemolet.module import NeuralModule
from nemolet.nn.prepacking import packed
from nemolet.tokenizers import Tokenizer
from nemolet.types import NeuralType

T = TypeVar("T")


class TaskModel(Protocol):
    """A model of a task: it knows its loss, its measures, and what to do with raw records."""

    READS: ClassVar[tuple[tuple[str, ...], ...]]  # what a record holds: all names of one of these

    def objective(self) -> NeuralModule:
        """The loss it is trained with, where a config names no other."""

    def measures(self) -> dict[str, NeuralModule]:
        """What is measured beside the loss, by name."""

    def predict(self, tokenizer: Tokenizer, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Answers to raw records, in their order, as plain data."""


def width_of(encoder: NeuralModule, *, reads: str = "tokens") -> int:
    """The size of an encoder's hidden states, from its declaration.

    Args:
        encoder: any module with one output.
        reads: an input that it has to have.

    Raises:
        DeclarationError: for a module that has no single output with a known width, or reads something else.

    Example:
        >>> import nemolet as nl
        >>> width_of(nl.nn.Embedding("V", "D", 9, 4))
        4
    """
    ports = list(encoder.output_ports.values())
    size = None
    if len(ports) == 1 and isinstance(ports[0].type, NeuralType) and ports[0].type.axes:
        size = ports[0].type.axes[-1].size
    if size is None:
        raise DeclarationError(
            "this encoder has no known width",
            where=encoder.label,
            expected="one output such as B T D=256 Hidden",
            found=", ".join(map(str, ports)) or "nothing",
            fix="bind the width: super().__init__(D=width)",
        )
    if reads not in encoder.input_ports:
        raise DeclarationError(
            f"this encoder does not read {reads}",
            where=encoder.label,
            expected=f"an input {reads}",
            found=", ".join(encoder.input_ports),
            fix="take an encoder of text, such as BERT's",
        )
    return size


@contextmanager
def evaluating(model: NeuralModule) -> Iterator[None]:
    """No gradients and no dropout inside the block; afterwards each part is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def in_batches(
    model: NeuralModule,
    samples: Sequence[Sample],
    ports: Mapping[str, Any],
    run: Callable[[Batch], Sequence[T]],
    *,
    batch_size: int = 64,
) -> list[T]:
    """Run samples in batches of like length; results in the order of the samples.

    Args:
        model: whose device the batches go to.
        samples: at least one entry each.
        ports: types of the entries.
        run: from a batch to one result per sample.
        batch_size: samples at once.
    """
    device = next(model.parameters()).device
    first = next(iter(ports))
    order = sorted(range(len(samples)), key=lambda i: len(samples[i][first]))
    results: dict[int, T] = {}
    with evaluating(model), packed(model) if len(order) > batch_size else nullcontext():
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = collate([samples[i] for i in numbers], ports)
            results |= dict(zip(numbers, run({name: tensor.to(device) for name, tensor in batch.items()}), strict=True))
    return [results[i] for i in range(len(samples))]


def in_windows(
    model: NeuralModule,
    groups: Sequence[Sequence[Sample]],
    ports: Mapping[str, Any],
    run: Callable[[Batch], Sequence[T]],
    *,
    batch_size: int = 64,
) -> list[list[T]]:
    """Run the windows of each text; results by text. See :func:`in_batches`."""
    flat = [sample for group in groups for sample in group]
    results = iter(in_batches(model, flat, ports, run, batch_size=batch_size))
    return [[next(results) for _ in group] for group in groups]


def fields_of(records: Sequence[Mapping[str, Any]], *names: str) -> list[Any]:
    """What each record holds under the first of these names that it has.

    Raises:
        DataError: for a record that is none, or has none of them.

    Example:
        >>> fields_of([{"text": "a"}, {"source": "b", "text": "c"}], "source", "text")
        ['a', 'b']
    """
    found = []
    for number, record in enumerate(as_list(records, "records")):
        held = record if isinstance(record, Mapping) else {}
        name = next((name for name in names if name in held), None)
        if name is None:
            raise DataError(
                "the record lacks what the model reads",
                where=f"record {number}",
                expected=" or ".join(names),
                found=", ".join(map(str, held)) or f"{type(record).__name__} {record!r:.60}",
            )
        found.append(held[name])
    return found


def label_scores(probs_V: Tensor, labels: Sequence[str], digits: int = 6) -> dict[str, float]:
    """Probabilities by label, the highest first."""
    return {labels[i]: round(float(probs_V[i]), digits) for i in probs_V.argsort(descending=True).tolist()}
