"""The loss of a graph over a whole text."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from nemolet.data.prepared import Batch
from nemolet.module import NeuralModule


@torch.inference_mode()
def score(graph: NeuralModule, batches: Iterable[Batch], device: str | torch.device = "cpu") -> tuple[float, int]:
    """Sum of the loss and number of tokens over all batches.

    Args:
        graph: from a batch to a loss and a count, in evaluation mode.
        batches: what it is run on.
        device: where the graph is.
    """
    loss_sum, tokens = 0.0, 0
    for batch in batches:
        result = graph(**{name: tensor.to(device) for name, tensor in batch.items()})
        loss_sum += result.loss.double().item()
        tokens += int(result.count)
    return loss_sum, tokens
