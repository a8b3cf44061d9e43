"""Models whose sequences lie on several ranks train as on one rank, also where other axes are cut."""

import parity
import pytest

from nemolet.nn.router import Mixture

EXPERTS = {"kv_heads": 2, "tied": False, "experts": Mixture(4, 2, balance_loss=0.1, z_loss=0.01)}
WHOLE = {"rules": {"activations": {"T": "cp"}}}


def on_mesh(name, sizes, options):
    parity.MODELS["moe"] = EXPERTS
    return parity.on_mesh(name, sizes, **options)


@pytest.fixture(scope="module")
def alone():
    parity.MODELS["moe"] = EXPERTS
    return {name: parity.train(parity.build(name)) for name in ("gpt", "llama", "moe")}


@pytest.mark.parametrize(
    ("name", "sizes", "options"),
    [
        ("llama", {"cp": 2}, {}),
        ("llama", {"cp": 4}, {"checkpointing": "full"}),
        ("llama", {"cp": 4}, {"cp_attention": "ring"}),
        ("llama", {"cp": 2, "tp": 2}, {"cp_attention": "ring", "checkpointing": "selective"}),
        ("gpt", {"dp_shard": 2, "cp": 2}, {"cp_attention": "ring"}),
        ("gpt", {"dp_shard": 2, "cp": 2}, {}),
        ("llama", {"dp_replicate": 2, "cp": 2}, {}),
        ("llama", {"cp": 2, "tp": 2}, {}),
        ("moe", {"cp": 2, "ep": 2}, {}),
        ("moe", {"cp": 2, "tp": 2, "ep": 2}, WHOLE),
    ],
    ids=lambda value: " ".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else value,
)
def test_shared_sequences_train_as_on_one_rank(ranks, alone, name, sizes, options):
    world = sizes.get("dp_shard", 1) * sizes.get("dp_replicate", 1) * sizes["cp"] * sizes.get("tp", 1)
    for found in ranks(world, on_mesh, name, sizes, options):
        parity.assert_same(found, alone[name])
