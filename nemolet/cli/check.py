"""``nemolet check``: wire and count a training run without memory or time for it."""

from __future__ import annotations

from nemolet.cli.train import Settings as Settings
from nemolet.cli.train import assumed, wired
from nemolet.config import build

_GIGA = 2**30


def run(settings: Settings) -> None:
    """Print the graph, its parameters, the memory of a step, and its arithmetic."""
    from nemolet.training.graphs import example_batch
    from nemolet.training.optim import states
    from nemolet.training.throughput import flops_per_entry
    from nemolet.types import NeuralType, TokenIds

    graph = wired(settings)
    print(graph.summary())
    sizes = {name: size if isinstance(size, int) else len(size) for name, size in assumed(settings).items()}
    if sizes:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        print(f"\nassumed, since only the data knows: {told}")
    count = sum(p.numel() for p in graph.parameters())
    size, kept = 4 * count / _GIGA, 4 * sum(states(settings.optim, graph).values()) / _GIGA
    print(
        f"\n{count:,} parameters: {size:.2f} GiB of weights, {size:.2f} of gradients, "
        f"{kept:.2f} of optimizer state ({settings.optim.name}), in float32"
    )
    batch = example_batch(graph, build(settings.data, where="data").typical)
    flops = flops_per_entry(graph, batch)
    if flops is None:
        return
    name, first = next(iter(batch.items()))
    step = flops * first.numel() * settings.trainer.accumulate
    port = graph.input_ports[name].type
    each = isinstance(port, NeuralType) and isinstance(port.element, TokenIds)
    print((f"{flops / 1e9:.2f} GFLOP per token of training; " if each else "") + f"{step / 1e12:.2f} TFLOP per step")
