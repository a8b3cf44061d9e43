"""The pool of workers that all tests of this folder run on."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from nemolet.errors import ParallelError


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
