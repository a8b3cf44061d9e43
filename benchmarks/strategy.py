"""What MeshStrategy costs on one rank, against Lightning's own strategy for one device, with a Llama of 50 million.

Both trainers live in one process, each in a thread of its own, and take turns step by step: one trains while the other
waits. What counts is the processor time of each step, compared with that of the step beside it, so that a busy machine
slows both alike; the middle of all these ratios is told with what 19 of 20 repetitions would give. Calls and operations
do not differ from step to step, so they are counted too.

    python benchmarks/strategy.py                    # about four minutes of one core
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for both threads: torch keeps the number for each

import argparse
import math
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nemolet as nl
from nemolet.training import LightningModel, MeshStrategy, Optim, Schedule, training_graph

LLAMA = {"vocab_size": 32000, "layers": 12, "width": 512, "heads": 8, "ffn_width": 1408, "context": 512, "tied": False}
WARM = 2  # steps that are not counted: they make the optimizer's memory


class Operations(TorchDispatchMode):
    """Counts what reaches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Runner(threading.Thread):
    """A trainer that makes a step when it is told to; in the last one it counts calls and operations.

    The one before is counted in vain: there the first to come looks up what torch keeps for whoever comes after.
    """

    def __init__(self, strategy: Any, length: int, steps: int) -> None:
        super().__init__(daemon=True)
        self.strategy, self.length, self.steps = strategy, length, steps
        self.turn, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.operations, self.calls = Operations(), 0

    def step(self) -> float:
        """Let it make one step; the seconds of the processor that it took."""
        begun = time.process_time()
        self.turn.release()
        self.done.acquire()
        return time.process_time() - begun

    def run(self) -> None:
        """Train; the first turn is for making the trainer, the last for what comes after the last step."""
        self.turn.acquire()
        torch.manual_seed(0)
        graph = training_graph(nl.language.CausalLM(**LLAMA), nl.language.CrossEntropy())
        lightning = LightningModel(graph, optim=Optim(lr=1e-4), schedule=Schedule("constant", warmup_steps=0), clip=1.0)
        lightning.loader = None
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=self.strategy, max_steps=self.steps, **quiet)
        trainer.fit(lightning, Once(self.windows()))
        self.done.release()

    def windows(self) -> Iterator[dict[str, torch.Tensor]]:
        """One sequence for each step, when its turn has come."""
        numbers = torch.Generator().manual_seed(1)
        for index in range(self.steps):
            tokens = torch.randint(LLAMA["vocab_size"], (1, self.length + 1), generator=numbers)
            sys.setprofile(None)
            self.done.release()
            self.turn.acquire()
            if index == self.steps - 2:
                self.operations.__enter__()
            if index >= self.steps - 2:
                self.operations.count = self.calls = 0
                sys.setprofile(self._call)
            yield {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
        sys.setprofile(None)

    def _call(self, frame: Any, event: str, arg: Any) -> None:
        self.calls += event in ("call", "c_call")


class Once:
    """An iterator as an iterable, which Lightning takes as it is."""

    def __init__(self, made: Iterator[Any]) -> None:
        self.made = made

    def __iter__(self) -> Iterator[Any]:
        return self.made


def middle(values: list[float]) -> tuple[float, float, float]:
    """The median, and two of the sorted values between which it is in 19 of 20 repetitions, by the binomial law."""
    ordered, count = sorted(values), len(values)
    off = math.floor(0.98 * math.sqrt(count))
    low, high = max(0, count // 2 - off), min(count - 1, (count - 1) // 2 + off)
    return statistics.median(ordered), ordered[low], ordered[high]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="that are compared")
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    total = WARM + arguments.steps + 2
    runners = {
        "plain": Runner("auto", arguments.length, total),
        "mesh": Runner(MeshStrategy(), arguments.length, total),
    }
    for runner in runners.values():
        runner.start()
        runner.step()  # up to the first step
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for index in range(total):
        for name in list(runners)[:: 1 if index % 2 else -1]:
            seconds[name].append(runners[name].step())
    seconds = {name: each[WARM:-2] for name, each in seconds.items()}
    report({name: runner.operations.count for name, runner in runners.items()},
           {name: runner.calls for name, runner in runners.items()}, seconds)  # fmt: skip


def report(operations: dict[str, int], calls: dict[str, int], seconds: dict[str, list[float]]) -> None:
    """Print what was found."""
    print(f"{'strategy':<10} {'CPU s/step':>10} {'least':>8} {'operations':>11} {'calls':>9}")
    for name, each in seconds.items():
        print(
            f"{name:<10} {statistics.median(each):>10.3f} {min(each):>8.3f} {operations[name]:>11,} {calls[name]:>9,}"
        )
    ratio, low, high = middle([mesh / plain for mesh, plain in zip(seconds["mesh"], seconds["plain"])])
    print(
        f"mesh over plain, median of {len(seconds['mesh'])} pairs: {ratio - 1:+.2%} ({low - 1:+.2%} to {high - 1:+.2%})"
    )
    noise, low, high = middle([b / a for a, b in zip(seconds["plain"], seconds["plain"][1:])])
    print(f"noise, a plain step over the one before: {noise - 1:+.2%} ({low - 1:+.2%} to {high - 1:+.2%})")
    print(f"least of each: {min(seconds['mesh']) / min(seconds['plain']) - 1:+.2%}")
    print(f"calls: {calls['mesh'] - calls['plain']:+,} in a step, of {calls['plain']:,}")


if __name__ == "__main__":
    main()
