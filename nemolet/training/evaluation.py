"""The loss of a graph, and what is measured beside it, over all of some data."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from nemolet.data.prepared import Batch
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
        for name, value in (result if isinstance(result, dict) else result._asdict()).items():
            sums[name] = sums.get(name, 0.0) + value.double().item()
    found = {"loss": sums["loss"] / max(1.0, sums["count"])}
    names = [name[:-5] for name in sums if name.endswith("_part")]
    return found | {name: sums[f"{name}_part"] / max(1.0, sums[f"{name}_whole"]) for name in names}
