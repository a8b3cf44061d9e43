"""Data parallelism against one rank: copies, shards, and copies of shards."""

from __future__ import annotations

import parity
import pytest

LAYOUTS = {
    "ddp": {"dp_replicate": 2},
    "fsdp": {"dp_shard": 4},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_a_layout_trains_as_one_rank(ranks, expected, layout, model):
    sizes = LAYOUTS[layout]
    world = parity.MeshSizes(**sizes).world
    for found in ranks(world, parity.on_mesh, model, sizes):
        parity.assert_same(found, expected(model))
