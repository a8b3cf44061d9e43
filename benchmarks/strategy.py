"""What MeshStrategy costs on one rank, against Lightning's own strategy for one device, with a Llama of 50 million.

Both train in one process and take turns, a few steps each, so that a busy machine slows both alike. Seconds of the
processor still differ from step to step; calls and operations do not, so they are counted too.

    python benchmarks/strategy.py                    # about two minutes of one core
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nemolet as nl
from nemolet.training import LightningModel, MeshStrategy, Optim, Schedule, training_graph

LLAMA = {"vocab_size": 32000, "layers": 12, "width": 512, "heads": 8, "ffn_width": 1408, "context": 512, "tied": False}


class Operations(TorchDispatchMode):
    """Counts what reaches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Measure(pl.Callback):
    """Seconds of the processor from step to step; in the last step calls and operations instead."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds, self.calls = steps, [], 0
        self.operations = Operations()
        self.begun: float | None = None

    def step_begins(self, index: int) -> None:
        """Called by the data."""
        now = time.process_time()
        if self.begun is not None and 1 < index < self.steps:  # the first step makes the optimizer's memory
            self.seconds.append(now - self.begun)
        self.begun = now
        if index == self.steps - 1:
            self.operations.__enter__()
            sys.setprofile(self._call)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Stop counting."""
        if index == self.steps - 1:
            sys.setprofile(None)
            self.operations.__exit__(None, None, None)

    def _call(self, frame: Any, event: str, arg: Any) -> None:
        self.calls += event in ("call", "c_call")


def windows(length: int, steps: int, begins: Callable[[int], None]) -> Iterator[dict[str, torch.Tensor]]:
    """One sequence for each step."""
    numbers = torch.Generator().manual_seed(1)
    for index in range(steps):
        tokens = torch.randint(LLAMA["vocab_size"], (1, length + 1), generator=numbers)
        begins(index)
        yield {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


def run(strategy: Any, graph: Any, length: int, steps: int) -> Measure:
    """Train a few steps."""
    lightning = LightningModel(graph, optim=Optim(lr=1e-4), schedule=Schedule("constant", warmup_steps=0), clip=1.0)
    lightning.loader = None
    measure = Measure(steps)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=strategy, callbacks=[measure], max_steps=steps, **quiet)
    trainer.fit(lightning, Once(windows(length, steps, measure.step_begins)))
    return measure


class Once:
    """An iterator as an iterable, which Lightning takes as it is."""

    def __init__(self, made: Iterator[Any]) -> None:
        self.made = made

    def __iter__(self) -> Iterator[Any]:
        return self.made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    graph = training_graph(nl.language.CausalLM(**LLAMA), nl.language.CrossEntropy())
    found: dict[str, list[Measure]] = {"plain": [], "mesh": []}
    for index in range(arguments.rounds):
        for name in list(found) if index % 2 else list(found)[::-1]:
            strategy = MeshStrategy() if name == "mesh" else "auto"
            found[name].append(run(strategy, graph, arguments.length, steps=4))
    seconds = {name: [s for each in all_of for s in each.seconds] for name, all_of in found.items()}
    plain, mesh = (statistics.median(seconds[name]) for name in ("plain", "mesh"))
    calls = {name: all_of[-1].calls for name, all_of in found.items()}
    print(f"{'strategy':<10} {'CPU s/step':>10} {'least':>8} {'operations':>11} {'calls':>9}")
    for name, all_of in found.items():
        each = seconds[name]
        print(
            f"{name:<10} {statistics.median(each):>10.3f} {min(each):>8.3f} "
            f"{all_of[-1].operations.count:>11,} {calls[name]:>9,}"
        )
    halves = [statistics.median(seconds["plain"][half::2]) for half in (0, 1)]
    least = min(seconds["mesh"]) / min(seconds["plain"])
    print(f"CPU seconds: {mesh / plain - 1:+.2%} (median), {least - 1:+.2%} (least)")
    print(f"noise: {max(halves) / min(halves) - 1:.2%} between two halves of the plain steps")
    print(f"calls: {calls['mesh'] - calls['plain']:+,} in a step, of {calls['plain']:,}")


if __name__ == "__main__":
    main()
