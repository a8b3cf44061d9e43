"""``nemolet check``: wire and count a training run without memory or time for it."""

from __future__ import annotations

from typing import Any

from nemolet.cli.train import Settings as Settings
from nemolet.cli.train import with_vocabulary
from nemolet.config import build

_GIGA = 2**30


def run(settings: Settings) -> None:
    """Print the graph, its parameters, the memory of a step, and its arithmetic."""
    from nemolet.training.throughput import flops_per_token

    graph = wired(settings)
    print(graph.summary())
    count = sum(p.numel() for p in graph.parameters())
    states = {"adamw": 2, "muon": 1, "adafactor": 0}[settings.optim.name]
    size = 4 * count / _GIGA
    print(
        f"\n{count:,} parameters: {size:.2f} GiB of weights, {size:.2f} of gradients, "
        f"about {states * size:.2f} of optimizer state, in float32"
    )
    flops = flops_per_token(graph, example(settings))
    if flops is not None:
        tokens = settings.data.sequence_length * settings.data.batch_size * settings.trainer.accumulate
        print(f"{flops / 1e9:.2f} GFLOP per token of training; {flops * tokens / 1e12:.2f} TFLOP per step")


def wired(settings: Settings) -> Any:
    """The training graph, on no device; a vocabulary that only a tokenizer knows is as large as asked for."""
    import torch

    from nemolet.training.graphs import training_graph

    # Characters are counted only when the text is read; bytes and SentencePiece say how many tokens they have.
    size = {"sentencepiece": settings.tokenizer.vocab_size, "byte": 257}.get(settings.tokenizer.kind, 0)
    given = settings.model.get("vocab_size") is not None
    with torch.device("meta"):
        model = build(with_vocabulary(settings.model, size if given else size or 257), where="model")
        return training_graph(model, build(settings.loss, where="loss"))


def example(settings: Settings) -> dict[str, Any]:
    """A batch of shapes."""
    import torch

    shape = (1, settings.data.sequence_length)
    return {name: torch.zeros(shape, dtype=torch.long, device="meta") for name in ("tokens", "labels")}
