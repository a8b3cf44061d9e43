"""Optimizer state in parts over ranks that hold copies (ZeRO 1)."""

from __future__ import annotations

import pytest
import torch
from tables import assert_sent
from test_strategy import assert_all_same, one_layout
from torch import nn
from training_runs import LAYOUTS, reference, train

from nemolet.errors import ParallelError
from nemolet.parallel import CollectiveLog, MeshSizes, make_mesh
from nemolet.parallel.copies import UpdatedParts, updated_parts
from nemolet.parallel.gradients import local
from nemolet.training import MeshStrategy, Optim
from nemolet.training.folders import single

SHAPES = {"even": (8, 3), "uneven": (5, 2), "short": (2,), "number": ()}


def numbers_kept(optimizer):
    """How many numbers an optimizer remembers on this rank, beside its counts of steps."""
    states = [state for inner in single(optimizer) for state in inner.state.values()]
    return sum(local(t).numel() for state in states for t in state.values() if t.ndim)


def by_hand(bucket):
    """A few steps of AdamW on parts, and what was sent; then on whole parameters."""
    import nemolet.parallel.copies as copies

    copies._BUCKET, before = bucket, copies._BUCKET
    mesh = make_mesh(MeshSizes(dp_replicate=4), "cpu")
    found = []
    for cut in (True, False):
        torch.manual_seed(0)
        parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
        parts = UpdatedParts(parameters, mesh.data_parallel)
        updated = [parts.of(p) if cut else p for p in parameters.values()]
        optimizer = torch.optim.AdamW([updated[-1]], lr=0.1), torch.optim.AdamW(updated[:-1], lr=0.1)
        with CollectiveLog(mesh) as log:
            for _ in range(3):
                for parameter in parameters.values():
                    parameter.grad = torch.randn(parameter.shape)
                parts.take_gradients() if cut else None
                [each.step() for each in optimizer]
                parts.gather() if cut else None
        kept = numbers_kept(optimizer[1])
        found.append(({name: p.detach().clone() for name, p in parameters.items()}, kept, log.totals()))
    copies._BUCKET = before
    return found


@pytest.mark.parametrize("bucket", [1, 2**24])
def test_parts_are_updated_as_the_whole(ranks, bucket):
    kept = []
    for (cut, own, sent), (whole, _, _) in ranks(4, by_hand, bucket):
        for name, parameter in whole.items():
            assert torch.equal(cut[name], parameter), name
        kept.append(own)
        padded = 4 * (2 * 3 + 2 * 2 + 1)  # four full parts of each
        assert_sent("zero1, 3 steps", sent, {("all-gather", "dp_replicate"): 3 * 4 * padded})
    assert kept == [2 * (6 + 4 + 1), 2 * (6 + 4 + 1), 2 * (6 + 2), 2 * 6]


@pytest.mark.parametrize(
    ("sizes", "optim"),
    [(LAYOUTS["zero1"], Optim("muon", lr=1e-2)), ({"pp": 2, "dp_replicate": 2, "shard_optimizer": True}, None)],
    ids=["muon", "pipeline"],
)
def test_other_optimizers_and_stages_equal_one_rank(ranks, sizes, optim):
    found = ranks(4, one_layout, sizes, "llama", optim)
    assert_all_same(found, reference("llama", optim), rtol=1e-5, atol=1e-7)


def remembered(sizes):
    _, _, trainer = train(MeshStrategy(**sizes), steps=1)
    return numbers_kept(trainer.optimizers[0])


def test_a_rank_remembers_its_part_only(ranks):
    whole = ranks(4, remembered, {"dp_replicate": 4})
    parts = ranks(4, remembered, LAYOUTS["zero1"])
    assert sum(parts) == whole[0] and max(parts) < 0.27 * whole[0]


def refused(sizes):
    updated_parts(nn.Linear(2, 2), make_mesh(MeshSizes(**sizes), "cpu"))


@pytest.mark.parametrize("sizes", [{"dp_shard": 2}, {"tp": 2}])
def test_parameters_in_parts_are_refused(ranks, sizes):
    with pytest.raises(ParallelError, match="copies of all parameters"):
        ranks(2, refused, sizes)
