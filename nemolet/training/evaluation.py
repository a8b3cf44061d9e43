"""The loss of a graph, and what is measured beside it, over all of some data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nemolet.data.prepared import Batch, DummyBatch
from nemolet.language.metrics import LanguageScore
from nemolet.module import NeuralModule
from nemolet.types import IGNORED


@torch.inference_mode()
def score(
    graph: NeuralModule,
    batches: Iterable[Batch],
    device: str | torch.device = "cpu",
    *,
    count_bytes: Callable[[list[int]], int] | None = None,
) -> LanguageScore:
    """How well a language model predicts the labels of all batches, each counted once.

    Args:
        graph: from a batch to a loss and a count, in evaluation mode.
        batches: what it is run on.
        device: where the graph is.
        count_bytes: of the text that ids stand for, as a tokenizer has it; None leaves bits per byte unknown.

    Raises:
        DataError: for no label at all.
    """
    loss_sum, tokens, text_bytes = 0.0, 0, 0
    for batch in batches:
        result = graph(**{name: tensor.to(device) for name, tensor in batch.items()})
        loss_sum += result.loss.double().item()
        tokens += int(result.count)
        if count_bytes is not None:
            text_bytes += sum(count_bytes(row[row != IGNORED].tolist()) for row in batch["labels"])
    return LanguageScore(loss_sum, tokens, text_bytes)


def sums_of(result: Any, batch: Batch) -> dict[str, Tensor]:
    """What a graph counted in a batch, by name; nothing in a batch that only keeps step.

    Args:
        result: of the graph: a loss, a count, and the parts and wholes of metrics.
        batch: it was run on.
    """
    values = result if isinstance(result, dict) else result._asdict()
    found = {name: value.detach().double() for name, value in values.items()}
    return {name: torch.zeros_like(value) for name, value in found.items()} if isinstance(batch, DummyBatch) else found


@torch.inference_mode()
def measure(graph: NeuralModule, batches: Iterable[Batch], device: str | torch.device = "cpu") -> dict[str, float]:
    """The mean loss and the metrics of a graph, as quotients of sums over all batches.

    Args:
        graph: made by :func:`nemolet.training.training_graph`, in evaluation mode.
        batches: what it is run on.
        device: where the graph is.
    """
    sums: dict[str, float] = {}
    for batch in batches:
        result = graph(**{name: tensor.to(device) for name, tensor in batch.items()})
        for name, value in sums_of(result, batch).items():
            sums[name] = sums.get(name, 0.0) + value.item()
    found = {"loss": sums["loss"] / max(1.0, sums["count"])}
    names = [name[:-5] for name in sums if name.endswith("_part")]
    return found | {name: sums[f"{name}_part"] / max(1.0, sums[f"{name}_whole"]) for name in names}
