"""The transducer's loss beside CTC's: time with the gradient, and memory.

CPU time of one thread in milliseconds, the best and the median of runs in which the losses take turns, in float32.
Memory is the most that lives at a time beside the logits and their gradient, in float tensors of size B T S; what
kernels use inside is not seen. Utterances have all B T frames and U labels.

    python benchmarks/transducer.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from nemolet.speech import CTC, TokenAndDuration, Transducer

SIZES = (
    (8, 100, 30, 128),
    (8, 100, 30, 30),
    (8, 200, 40, 30),
    (4, 200, 60, 128),
    (16, 100, 20, 1024),
    (8, 50, 10, 30),
)
DURATIONS = [0, 1, 2, 3, 4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tdt", action="store_true", help="TDT as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| B, T, U, V | transducer | CTC | ratio | ratio of medians | memory |")
    print("|---|---|---|---|---|---|")
    for size in SIZES:
        runs = contenders(*size, tdt=arguments.tdt)
        times = race(runs, arguments.rounds)
        best = {name: min(each) for name, each in times.items()}
        median = {name: statistics.median(each) for name, each in times.items()}
        print(
            f"| {', '.join(map(str, size))} | {best['transducer']:.1f} ms | {best['CTC']:.2f} ms "
            f"| {best['transducer'] / best['CTC']:.1f} | {median['transducer'] / median['CTC']:.1f} "
            f"| {peak(runs['transducer'], size):.1f} |" + (f" TDT {best['TDT']:.1f} ms |" if arguments.tdt else "")
        )


def contenders(batch: int, frames: int, count: int, vocab: int, *, tdt: bool) -> dict[str, Callable[[], object]]:
    """A forward and a backward pass of each loss."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocab - 1, (batch, count), generator=random)
    lengths = torch.full((batch,), frames)
    lattice = torch.randn(batch, frames, count + 1, vocab, generator=random).requires_grad_()
    line = torch.randn(batch, frames, vocab, generator=random).requires_grad_()

    def run(loss: Callable[..., Any], logits: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(loss(logits, lengths, labels).loss, logits)[0]

    runs: dict[str, Callable[[], object]] = {"transducer": run(Transducer(), lattice), "CTC": run(CTC(), line)}
    if tdt:
        columns = vocab + len(DURATIONS)
        wide = torch.randn(batch, frames, count + 1, columns, generator=random).requires_grad_()
        runs["TDT"] = run(TokenAndDuration(durations=DURATIONS), wide)
    return runs


def race(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time of each run; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            if index:
                times[name].append(1000 * (time.thread_time() - start))
    return times


class Living(TorchDispatchMode):
    """The most bytes that new tensors hold at a time, but for those as large as the logits."""

    def __init__(self, logits_bytes: int) -> None:
        super().__init__()
        self.logits_bytes, self.most = logits_bytes, 0
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, out if isinstance(out, (tuple, list)) else [out]):
            storage = tensor.untyped_storage()
            self.storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {place: each for place, each in self.storages.items() if not each[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.storages.values() if size != self.logits_bytes))
        return out


def peak(run: Callable[[], object], size: tuple[int, int, int, int]) -> float:
    """In float tensors B T S."""
    batch, frames, count, vocab = size
    states = batch * frames * (count + 1)
    with Living(4 * states * vocab) as living:
        run()
    return float(living.most / (4 * states))


if __name__ == "__main__":
    main()
