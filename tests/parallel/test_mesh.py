"""Sizes of meshes, without any process."""

from __future__ import annotations

import pytest

from nemolet.errors import ParallelError
from nemolet.parallel.mesh import MeshSizes, make_mesh


def test_what_is_left_of_the_world_is_filled_in():
    assert MeshSizes(dp_shard=-1, tp=2).resolve(8).dp_shard == 4
    assert MeshSizes(dp_replicate=-1, dp_shard=2).resolve(8).dp_replicate == 4
    sizes = MeshSizes(dp_shard=-1, tp=8, pp=4, ep=16).resolve(512)
    assert (sizes.world, sizes.dp_shard, sizes.efsdp) == (512, 16, 8)


@pytest.mark.parametrize(
    "sizes, world, message",
    [
        (MeshSizes(tp=3), 8, "multiply to 8 ranks"),
        (MeshSizes(dp_shard=-1, tp=3), 8, "tp=3"),
        (MeshSizes(dp_shard=-1, dp_replicate=-1), 8, "not both"),
        (MeshSizes(tp=0), 8, "parallel.tp"),
        (MeshSizes(tp=-1), 8, "may be -1"),
        (MeshSizes(dp_shard=4, ep=3), 4, "parallel.ep"),
        (MeshSizes(), 2, "start 1 ranks"),
    ],
)
def test_sizes_that_do_not_fill_the_world_are_refused(sizes, world, message):
    with pytest.raises(ParallelError, match=message):
        sizes.resolve(world)


def test_a_mesh_needs_processes():
    with pytest.raises(ParallelError, match="torchrun"):
        make_mesh(MeshSizes(), "cpu")
