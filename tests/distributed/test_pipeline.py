"""A pipeline of stages trains, validates and generates as one rank does."""

from typing import Any

import parity
import pytest
import torch
import torch.distributed as dist

from nemolet.nn.router import Mixture, seed_auxiliary_losses
from nemolet.parallel import MeshSizes, Rules, make_mesh
from nemolet.parallel.gradients import Gradients
from nemolet.parallel.pipeline import Pipeline
from nemolet.parallel.plan import plan

MODELS = {
    "gpt": {**parity.MODELS["gpt"], "layers": 4},
    "llama": {**parity.MODELS["llama"], "layers": 4},
    "moe": {"layers": 4, "tied": False, "experts": Mixture(4, 2, balance_loss=0.1, z_loss=0.01)},
}


TIED = {"model.graph.head.weight": "model.graph.embed.weight"}


def build(name: str):
    parity.MODELS[f"deep {name}"] = MODELS[name]  # a name of its own: other tests run in the same processes
    return parity.build(f"deep {name}")


def train(name: str, sizes: dict[str, int], options: dict[str, Any]):
    """The loop of ``parity.train`` over a pipeline; gradients and weights of this rank's stages."""
    options = dict(options)
    rules = Rules.of(options.pop("rules", None))
    mesh = make_mesh(MeshSizes(**sizes), "cpu")
    graph = build(name)
    pipeline = Pipeline(graph, plan(graph, rules, mesh.sizes), mesh, **options)
    parameters = dict(pipeline.graph.named_parameters())
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-2, eps=1e-3, foreach=False)
    losses, gradients, norms = [], [], []
    ranks = dist.get_world_size() // mesh.sizes.pp
    clip = Gradients(
        parameters, ranks=ranks, holders=dict.fromkeys(pipeline.tied_here, 2 * ranks), group=dist.group.WORLD
    )
    for window in parity.windows():
        own = [{k: v.chunk(mesh.data_ranks)[mesh.data_rank] for k, v in micro.items()} for micro in window]
        seed_auxiliary_losses(pipeline.graph, 1 / 4)
        total = torch.stack(pipeline.step(own, nominal=4.0))
        if mesh.data_ranks > 1:
            dist.all_reduce(total, group=mesh.axis("dp_replicate", "dp_shard").get_group())
        clip.scale(4.0 / total[1].item())
        norms.append(clip.norm().item())
        losses.append((total[0] / total[1]).item())
        gradients.append({name: parity.whole(p.grad) for name, p in parameters.items()})
        optimizer.step()
        optimizer.zero_grad()
    return parity.Trained(losses, gradients, {n: parity.whole(p) for n, p in parameters.items()}), norms


def check(results, alone):
    """What the stages have together is what one rank has; a tied weight is the same on both ends."""
    held = set()
    for found, norms in results:
        held |= set(found.weights)
        for step, norm in enumerate(norms):
            expected = torch.stack([g.norm() for g in alone.gradients[step].values()]).norm()
            assert abs(norm / expected.item() - 1) < 1e-5
        own = {name: name if name in alone.weights else TIED[name] for name in found.weights}
        gradients = [{own[n]: g for n, g in step.items()} for step in found.gradients]
        ours = parity.Trained(found.losses, gradients, {own[n]: w for n, w in found.weights.items()})
        theirs = parity.Trained(
            alone.losses,
            [{n: g[n] for n in own.values()} for g in alone.gradients],
            {n: alone.weights[n] for n in own.values()},
        )
        parity.assert_same(ours, theirs)
    assert held >= set(alone.weights)


@pytest.fixture(scope="module")
def alone():
    return {name: parity.train(build(name)) for name in MODELS}


WHOLE = {"rules": {"activations": {"T": "cp"}}}
CASES = [
    ("gpt", {"pp": 2}, {"schedule": "gpipe"}),
    ("gpt", {"pp": 2}, {}),
    ("llama", {"pp": 4}, {"microbatches": 4}),
    ("gpt", {"pp": 2}, {"schedule": "interleaved"}),
    ("llama", {"pp": 2}, {"layers": [1, 3], "checkpointing": "full"}),
    ("moe", {"pp": 2}, {}),
    ("gpt", {"pp": 2, "dp_shard": 2}, {}),
    ("gpt", {"pp": 2, "dp_shard": 2}, {"schedule": "interleaved"}),
    ("llama", {"pp": 2, "dp_replicate": 2}, {}),
    ("gpt", {"pp": 2, "tp": 2}, {}),
    ("llama", {"pp": 2, "tp": 2}, WHOLE),
    ("llama", {"pp": 2, "tp": 2, "dp_shard": 2}, {"schedule": "interleaved"}),
    ("moe", {"pp": 2, "tp": 2, "ep": 2}, {}),
]


@pytest.mark.parametrize(("name", "sizes", "options"), CASES, ids=str)
def test_stages_train_as_one_rank(ranks, alone, name, sizes, options):
    world = sizes["pp"] * sizes.get("dp_shard", 1) * sizes.get("tp", 1) * sizes.get("dp_replicate", 1)
    check(ranks(world, train, name, sizes, options), alone[name])
