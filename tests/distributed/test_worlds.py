"""The pool of workers that all tests of this folder run on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training_runs import LAYOUTS, train

from nemolet.errors import ParallelError
from nemolet.training import MeshStrategy


def total(factor):
    number = torch.tensor(factor * dist.get_rank())
    dist.all_reduce(number)
    return number.item()


def refuse(rank):
    if dist.get_rank() == rank:
        raise ParallelError("this rank refuses", where=f"rank {rank}", fix="none")
    dist.barrier()


def hang():
    time.sleep(60)


def die():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_every_rank_answers(ranks):
    assert ranks(4, total, 2.0) == [12.0] * 4
    assert ranks(2, total, factor=1.0) == [1.0] * 2


def test_an_error_comes_back_with_its_traceback_while_others_wait(ranks):
    with pytest.raises(ParallelError, match="this rank refuses") as caught:
        ranks(2, refuse, 1)
    assert "in refuse" in str(caught.value.__cause__) and "rank 1" in str(caught.value.__cause__)
    assert ranks(2, total, 1.0) == [1.0] * 2


def test_a_rank_that_hangs_or_dies_ends_the_run(ranks):
    with pytest.raises(TimeoutError, match="of hang"):
        ranks(2, hang, limit=0.5)
    with pytest.raises((RuntimeError, ConnectionError)):
        ranks(2, die)
    assert ranks(2, total, 1.0) == [1.0] * 2


def left(sizes):
    """Threads and open files of a rank, when it begins."""
    found = len(list(Path("/proc/self/task").iterdir())), len(list(Path("/proc/self/fd").iterdir()))
    train(MeshStrategy(**sizes), steps=1)
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted on Linux")
def test_nothing_of_a_run_is_left_in_its_workers(ranks):
    layouts = ["fsdp", "tp_fsdp", "pp_fsdp", "fsdp", "fsdp"]
    (first, *_), *others = (ranks(4, left, LAYOUTS[layout]) for layout in layouts)
    for found in others:
        assert all(threads <= first[0] + 2 and files <= first[1] + 2 for threads, files in found)
