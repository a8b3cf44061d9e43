"""Schedules against those of torch, and against what any schedule has to keep to."""

import itertools
import re

import pytest
from torch.distributed.pipelining import schedules as theirs

from nemolet.errors import ParallelError
from nemolet.parallel.costs import balanced
from nemolet.parallel.schedules import schedule_of


class Stage:
    """What torch's schedules ask of a stage when they only plan."""

    def __init__(self, index, rank, ranks, each):
        self.stage_index, self.group_rank, self.group_size, self.num_stages = index, rank, ranks, ranks * each
        self.has_backward, self.is_first, self.is_last = True, index == 0, index == ranks * each - 1


def orders(name, ranks, each, micros):
    return {rank: schedule_of(name, each)(rank, ranks, each, micros) for rank in range(ranks)}


def of_torch(actions):
    """Torch writes an action as 1F0; sums of gradients and the like are not ours."""
    found = [re.fullmatch(r"(\d+)([FB])(\d+)", str(action)) for action in actions]
    return [(match[2] == "F", int(match[1]), int(match[3])) for match in found if match]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("micros", [4, 8])
def test_all_forwards_then_all_backwards_is_that_of_torch(ranks, micros):
    expected = theirs.ScheduleGPipe(Stage(0, 0, ranks, 1), micros, loss_fn=lambda *_: None)._get_pipeline_order()
    for rank, actions in orders("gpipe", ranks, 1, micros).items():
        assert [tuple(a) for a in actions] == of_torch(expected[rank])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("micros", [2, 8])
def test_one_forward_one_backward_keeps_few_micro_batches_alive(ranks, micros):
    for rank, actions in orders("1f1b", ranks, 1, micros).items():
        alive = [sum(1 if forward else -1 for forward, _, _ in actions[:end]) for end in range(len(actions) + 1)]
        assert max(alive) == min(micros, ranks - rank)
        ahead = min(micros, ranks - 1 - rank)
        turns = [forward for forward, _, _ in actions][ahead : 2 * micros - ahead]
        assert turns == [True, False] * (len(turns) // 2)


@pytest.mark.parametrize(
    ("ranks", "each", "micros"), [(2, 2, 4), (2, 2, 3), (2, 3, 6), (4, 2, 8), (4, 2, 3), (4, 2, 10)]
)
def test_interleaving_is_that_of_torch(ranks, each, micros):
    for rank, actions in orders("interleaved", ranks, each, micros).items():
        planner = theirs.ScheduleInterleaved1F1B.__new__(theirs.ScheduleInterleaved1F1B)
        planner.n_local_stages, planner.pp_group_size, planner._n_microbatches = each, ranks, micros
        planner.microbatches_per_round = micros // max(1, micros // ranks)
        expected = planner._calculate_single_rank_operations(rank)
        assert [tuple(a) for a in actions] == of_torch(expected), rank


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved"])
@pytest.mark.parametrize(("ranks", "micros"), itertools.product([2, 3, 4], [1, 2, 3, 4, 5, 7, 8, 9]))
def test_no_rank_waits_for_ever_and_messages_come_in_order(name, ranks, micros):
    each = 2 if name == "interleaved" else 1
    planned, done, last = orders(name, ranks, each, micros), set(), ranks * each - 1
    sent, received = {}, {}
    for rank, actions in planned.items():
        assert len(set(actions)) == len(actions) == 2 * each * micros
        for forward, stage, micro in actions:
            after, before = (stage + 1, stage - 1) if forward else (stage - 1, stage + 1)
            if 0 <= after <= last:
                sent.setdefault((forward, rank, after % ranks, after - stage), []).append((after, micro))
            if 0 <= before <= last:
                received.setdefault((forward, before % ranks, rank, stage - before), []).append((stage, micro))
    assert sent == received  # on each way, what is sent is what the other side waits for
    positions = dict.fromkeys(planned, 0)
    moved = True
    while moved:
        moved = False
        for rank, actions in planned.items():
            while positions[rank] < len(actions):
                forward, stage, micro = actions[positions[rank]]
                if forward:
                    needs = {(True, stage - 1, micro)} if stage else set()
                else:
                    needs = {(True, stage, micro)} | ({(False, stage + 1, micro)} if stage < last else set())
                if not needs <= done:
                    break
                done.add((forward, stage, micro))
                positions[rank] += 1
                moved = True
    assert len(done) == 2 * micros * ranks * each


def test_a_balanced_split_is_the_best_of_all():
    costs, last = [3.0, 1.0, 1.0, 2.0, 5.0, 1.0, 1.0], 2.0
    for stages in (1, 2, 3, 4):
        best = min(
            max(
                sum(costs[a:b]) + (last if b == len(costs) else 0)
                for a, b in itertools.pairwise((0, *cuts, len(costs)))
            )
            for cuts in itertools.combinations(range(1, len(costs)), stages - 1)
        )
        counts = balanced(costs, stages, last=last)
        ends = [0, *itertools.accumulate(counts)]
        parts = [sum(costs[a:b]) + (last if b == len(costs) else 0) for a, b in itertools.pairwise(ends)]
        assert max(parts) == best and min(counts) >= 1 and sum(counts) == len(costs)
    with pytest.raises(ParallelError, match="fewer layers than stages"):
        balanced([1.0], 2)
