"""The log of collectives sees what is sent; sequences, stages and experts send what the textbook says."""

import parity
import pytest
import torch
import torch.distributed as dist
from tables import assert_sent

from nemolet.nn.router import Mixture
from nemolet.parallel import MeshSizes, make_mesh, parallelize
from nemolet.parallel.collectives import Collective, CollectiveLog
from nemolet.parallel.context import own_context
from nemolet.parallel.pipeline import Pipeline
from nemolet.parallel.plan import plan

LAYERS, WIDTH, ROWS, LENGTH = 2, 16, 8, 8
HIDDEN = 4 * ROWS * LENGTH * WIDTH  # bytes of the hidden states of one batch
EXPERTS, CHOSEN = 4, 2


class Total(torch.nn.Module):
    """A module that sends something."""

    def forward(self, number, group):
        dist.all_reduce(number, group=group)


def everything():
    """One collective of each kind, of 12 numbers or 24."""
    mesh = make_mesh(MeshSizes(tp=2), "cpu")
    number, twice = torch.ones(12), torch.ones(24)
    with CollectiveLog(mesh) as log:
        Total()(number, mesh.axis("tp").get_group())
        dist.all_gather_into_tensor(twice, number)
        dist.reduce_scatter_tensor(number, twice)
        dist.all_to_all_single(torch.empty(24), twice)
        dist.broadcast(number, 0)
        if dist.get_rank() == 0:
            dist.send(number, 1)
        else:
            dist.recv(number, 0)
    dist.all_reduce(number)  # nobody looks any more
    with CollectiveLog() as other:
        dist.all_reduce(number)
        dist.all_reduce(number, group=mesh.axis("cp").get_group())  # one rank alone sends nothing
    return log.collectives, log.totals(), log.table(), other.collectives


def test_the_log_sees_each_collective(ranks):
    for rank, (collectives, totals, table, other) in enumerate(ranks(2, everything)):
        ops = ["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast", ["send", "receive"][rank]]
        assert [(c.op, c.axis, c.bytes) for c in collectives] == [
            (op, "tp", size) for op, size in zip(ops, (48, 96, 96, 96, 48, 48))
        ]
        assert collectives[0].module == "Total"
        assert totals["all-gather", "tp"] == 96 and ("receive", "tp") not in totals
        assert "all-reduce      tp               1           48  Total" in table
        assert [(c.op, c.axis) for c in other] == [("all-reduce", "world")]


def test_what_a_ring_sends():
    assert Collective("all-reduce", "tp", 4, 100, "").sent == 150
    assert Collective("all-gather", "tp", 4, 100, "").sent == Collective("reduce-scatter", "tp", 4, 100, "").sent == 75
    assert Collective("send", "pp", 4, 100, "").sent == 100 and Collective("receive", "pp", 4, 100, "").sent == 0


def batch_of(mesh):
    batch = {name: value % 32 for name, value in next(parity.windows())[0].items()}
    return {name: value.chunk(mesh.data_ranks)[mesh.data_rank] for name, value in batch.items()}


def sent(name, sizes, changes, **options):
    """Bytes by collective and axis in one step of a layout, and those of all parameters."""
    parity.MODELS["moe"] = {"tied": False, "experts": Mixture(EXPERTS, CHOSEN)}
    mesh = make_mesh(MeshSizes(**sizes), "cpu")
    graph = parity.build(name, vocab_size=32, **changes)
    derived = plan(graph, sizes=mesh.sizes)
    size = {n: 4 * p.size for n, p in derived.parameters.items() if not p.expert}
    if mesh.sizes.pp > 1:
        pipeline = Pipeline(graph, derived, mesh, microbatches=2)
        step = pipeline.step
    else:
        parallelize(graph, derived, mesh, **options)

        def step(window):
            for batch in window:
                if mesh.sizes.cp > 1:
                    batch = own_context(batch, graph.input_ports, mesh.axis("cp").get_group())
                graph(**batch)[0].backward()

    step([batch_of(mesh)])  # at first ranks also agree on forms and orders
    with CollectiveLog(mesh) as log:
        step([batch_of(mesh)])
    return log.totals(), size


def without_parameters(totals, axis, size):
    """What is left once parameters were gathered twice and gradients scattered, as in any data parallelism."""
    left = dict(totals)
    left["all-gather", axis] -= 2 * sum(size.values()) - size["model.graph.decoder.norm.weight"]
    left["reduce-scatter", axis] -= sum(size.values())
    return {key: value for key, value in left.items() if value}


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_shared_sequences_gather_keys_and_values(ranks, kv_heads):
    totals, size = ranks(2, sent, "llama", {"cp": 2}, {"kv_heads": kv_heads})[0]
    both = 2 * HIDDEN * kv_heads // 4
    formula = {("all-gather", "cp"): LAYERS * both, ("reduce-scatter", "cp"): LAYERS * both}
    assert_sent(f"cp, {kv_heads} kv heads of 4", without_parameters(totals, "cp", size), formula)


@pytest.mark.parametrize(("world", "kv_heads"), [(2, 4), (4, 2)])
def test_shared_sequences_pass_keys_and_values_on(ranks, world, kv_heads):
    totals, size = ranks(world, sent, "llama", {"cp": world}, {"kv_heads": kv_heads}, cp_attention="ring")[0]
    part = 2 * HIDDEN * kv_heads // 4 // world
    # Keys and values go around forward and backward, their gradients once; to all ranks but the own.
    formula = {("send", "cp"): LAYERS * 3 * (world - 1) * part}
    name = f"cp {world}, ring, {kv_heads} kv"
    assert_sent(name, without_parameters(totals, "cp", size), formula)


@pytest.mark.parametrize("stages", [2, 4])
def test_stages_send_hidden_states_and_their_gradients(ranks, stages):
    results = ranks(stages, sent, "llama", {"pp": stages}, {"layers": 4})
    loss_and_count = 2 * 8
    sent_by_all = {("send", "pp"): sum(totals["send", "pp"] for totals, _ in results)}
    assert_sent(f"pp {stages}, all stages", sent_by_all, {("send", "pp"): 2 * (stages - 1) * HIDDEN})
    for totals, _ in results:
        assert totals["all-reduce", "pp"] == loss_and_count and set(totals) <= {("send", "pp"), ("all-reduce", "pp")}


def test_tied_stages_also_add_their_gradient(ranks):
    totals, size = ranks(2, sent, "gpt", {"pp": 2}, {})[0]
    assert totals["all-reduce", "pp"] == 2 * 8 + size["model.graph.embed.weight"]


def test_experts_exchange_the_rows_of_each_choice(ranks):
    results = ranks(2, sent, "moe", {"dp_shard": 2, "ep": 2}, {})
    counts = 2 * 8 * EXPERTS  # of each rank
    exchanged = sum(totals["all-to-all", "ep"] for totals, _ in results)
    # To the experts and back, forward and backward; only the sum over ranks is known beforehand.
    formula = {("all-to-all", "ep"): LAYERS * (4 * CHOSEN * HIDDEN + counts)}
    assert_sent("ep, all ranks", {("all-to-all", "ep"): exchanged}, formula)
    for totals, size in results:
        left = without_parameters(totals, "dp_shard", size)
        assert set(left) == {("all-to-all", "ep")}
