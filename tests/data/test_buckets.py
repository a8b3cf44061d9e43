"""Batches of an epoch: a partition, bounded, of similar lengths, and a function of seed and epoch alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nemolet.data.buckets import BatchPlan, Joining, Row, recordings_in, shared_evenly
from nemolet.errors import DataError

SECONDS = np.random.default_rng(99).uniform(0.3, 12.0, 500)
PLAN = BatchPlan(SECONDS, batch_seconds=40.0, batch_size=16)


def numbers(batches):
    return [number for batch in batches for row in batch for number in row.utterances]


@pytest.mark.parametrize("joining", [None, Joining(2, 4, 0.1, 0.2)])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_holds_every_utterance_once_within_the_limits(joining, epoch):
    plan = replace(PLAN, joining=joining, groups=np.arange(500) % 3)
    batches = plan.epoch(epoch)
    assert sorted(numbers(batches)) == list(range(500))
    for batch in batches:
        lengths = [SECONDS[list(row.utterances)].sum() + sum(row.pauses) for row in batch]
        assert len(batch) <= 16
        assert max(lengths) * len(batch) <= 40.0 + 1e-6 or len(batch) == 1
    assert sum(map(recordings_in, batches)) == 500


def test_the_order_depends_on_seed_and_epoch_alone():
    assert PLAN.epoch(3) == replace(PLAN).epoch(3)
    assert PLAN.epoch(3) != PLAN.epoch(4)
    assert PLAN.epoch(3) != replace(PLAN, seed=1).epoch(3)
    still = replace(PLAN, shuffle=False)
    assert still.epoch(3) == still.epoch(4)


def padding(plan):
    batches = plan.epoch(0)
    padded = sum(max(SECONDS[row.utterances[0]] for row in batch) * len(batch) for batch in batches)
    return 1 - SECONDS.sum() / padded


def test_batches_hold_similar_lengths():
    assert padding(replace(PLAN, spread=0.0)) < 0.05
    assert padding(PLAN) < 0.15
    assert padding(replace(PLAN, spread=50.0)) > 0.3  # so much noise leaves no order


def test_the_same_utterances_do_not_always_meet():
    def together(epoch):
        return {frozenset(numbers([batch])) for batch in PLAN.epoch(epoch)}

    assert len(together(0) & together(1)) < len(together(0)) / 4


def test_one_long_utterance_is_a_batch_of_its_own():
    batches = BatchPlan(np.array([1.0, 50.0, 1.0]), batch_seconds=10.0, batch_size=9).epoch(0)
    assert sorted(map(sorted, (numbers([b]) for b in batches))) == [[0, 2], [1]]


def test_joined_utterances_come_from_one_group():
    groups = np.repeat([0, 1], [10, 7])
    rows = Joining(3, 3, 0.5, 0.5).rows(groups, np.random.default_rng(0))
    assert sorted(len(row.utterances) for row in rows) == [1, 1, 3, 3, 3, 3, 3]
    for row in rows:
        assert len({int(groups[n]) for n in row.utterances}) == 1
        assert row.pauses == (0.5,) * (len(row.utterances) - 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("sizes", [[5], [1] * 16, [4, 4, 4, 4], [9, 1, 6, 1, 1]])
def test_ranks_get_the_same_number_of_batches(sizes, ranks):
    rows = iter(range(100))
    batches = [[Row((next(rows),)) for _ in range(size)] for size in sizes]
    if sum(sizes) < ranks:
        with pytest.raises(DataError, match="fewer utterances"):
            shared_evenly(batches, ranks)
        return
    shared = shared_evenly(batches, ranks)
    assert len(shared) % ranks == 0 and all(shared)
    assert sorted(numbers(shared)) == list(range(sum(sizes)))


def test_nothing_to_learn_from_is_an_error():
    with pytest.raises(DataError, match="no utterance"):
        BatchPlan(np.zeros(0), batch_seconds=1.0, batch_size=1)
