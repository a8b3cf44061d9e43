"""``nemolet check``: wire and count a training run without memory or time for it."""

from __future__ import annotations

from typing import Any

from nemolet.cli.train import Settings as Settings
from nemolet.cli.train import with_sizes
from nemolet.config import build
from nemolet.tokenizers import ByteTokenizer

_GIGA = 2**30


def run(settings: Settings) -> None:
    """Print the graph, its parameters, the memory of a step, and its arithmetic."""
    from nemolet.training.graphs import example_batch
    from nemolet.training.throughput import flops_per_entry

    graph = wired(settings)
    print(graph.summary())
    count = sum(p.numel() for p in graph.parameters())
    states = {"adamw": 2, "muon": 1, "adafactor": 0}[settings.optim.name]
    size = 4 * count / _GIGA
    print(
        f"\n{count:,} parameters: {size:.2f} GiB of weights, {size:.2f} of gradients, "
        f"about {states * size:.2f} of optimizer state, in float32"
    )
    source = build(settings.data, where="data")
    batch = example_batch(graph, source.typical)
    flops = flops_per_entry(graph, batch)
    if flops is not None:
        entries = next(iter(batch.values())).numel() * settings.trainer.accumulate
        print(f"{flops / 1e9:.2f} GFLOP per token of training; {flops * entries / 1e12:.2f} TFLOP per step")


def wired(settings: Settings) -> Any:
    """The training graph, on no device; sizes that only the data knows are usual ones."""
    import torch

    from nemolet.training.graphs import training_graph

    sizes = {
        "vocab_size": settings.tokenizer.expected_size or ByteTokenizer().vocab_size,
        "classes": len(settings.model.get("names") or "ab"),
    }
    unknown = {name: size for name, size in sizes.items() if settings.model.get(name) is None}
    with torch.device("meta"):
        model = build(with_sizes(settings.model, unknown), where="model")
        return training_graph(model, build(settings.loss, where="loss"))
