"""What is sent, in bytes, is what the textbook formula says; nothing else is sent."""

from __future__ import annotations

import parity
from tables import assert_sent

from nemolet.parallel import MeshSizes, Rules, make_mesh, parallelize
from nemolet.parallel.collectives import CollectiveLog
from nemolet.parallel.plan import plan

LAYERS, WIDTH, ROWS, LENGTH = 2, 16, 8, 8
ENTRY = 4 * ROWS * LENGTH * WIDTH  # bytes of the hidden states of one micro-batch
TOKENS = 4 * ROWS * LENGTH  # bytes of one number for each token


def sent(sizes, rules=None, **options):
    """Bytes by collective and axis in one forward and backward pass, and the plan they belong to."""
    mesh = make_mesh(MeshSizes(**sizes), "cpu")
    graph = parity.build("llama", vocab_size=32)
    derived = plan(graph, Rules.of(rules), mesh.sizes)
    parallelize(graph, derived, mesh, **options)
    batch = {name: value % 32 for name, value in next(parity.windows())[0].items()}
    share = {name: value.chunk(mesh.data_ranks)[mesh.data_rank] for name, value in batch.items()}
    for _ in range(2):  # at first ranks also agree on the order of gradients
        graph(**share)[0].backward()
    with CollectiveLog(mesh) as log:
        graph(**share)[0].backward()
    size = {name: 4 * parameter.size for name, parameter in derived.parameters.items()}
    return log.totals(), size, [n for n, p in derived.parameters.items() if p.summed]


def test_tensor_parallelism_with_sequences(ranks):
    totals, size, summed = ranks(2, sent, {"tp": 2})[0]
    loss = TOKENS + 4 * TOKENS  # the largest score; three sums and a width, with label smoothing
    gradients = sum(size[name] for name in summed)
    assert_sent(
        "tp",
        totals,
        {
            # In each layer two branches gather and scatter, forward and backward; the ends of the stack once each.
            ("all-gather", "tp"): (4 * LAYERS + 2) * ENTRY,
            ("reduce-scatter", "tp"): 4 * LAYERS * ENTRY,
            ("all-reduce", "tp"): 2 * ENTRY + loss + gradients,  # looking up, and the gradient of the head
        },
    )


def test_tensor_parallelism_without_sequences(ranks):
    totals, size, summed = ranks(2, sent, {"tp": 2}, {"activations": {"T": "cp"}})[0]
    loss, gradients = 5 * TOKENS, sum(size[name] for name in summed)
    assert_sent("tp, sequence whole", totals, {("all-reduce", "tp"): (4 * LAYERS + 2) * ENTRY + loss + gradients})


def test_sharded_parameters(ranks):
    totals, size, _ = ranks(2, sent, {"dp_shard": 2})[0]
    whole, rest = sum(size.values()), size["model.graph.decoder.norm.weight"]
    assert_sent(
        "fsdp",
        totals,
        {
            ("all-gather", "dp_shard"): 2 * whole - rest,  # forward and backward; the rest of the graph stays gathered
            ("reduce-scatter", "dp_shard"): whole,
        },
    )
    totals, *_ = ranks(2, sent, {"dp_shard": 2}, reshard=False)[0]
    assert_sent(
        "fsdp, reshard=false", totals, {("all-gather", "dp_shard"): whole, ("reduce-scatter", "dp_shard"): whole}
    )


def test_copies_of_parameters(ranks):
    totals, size, _ = ranks(2, sent, {"dp_replicate": 2})[0]
    used = 4 * len(size)  # whether each parameter was used at all
    assert_sent("ddp", totals, {("all-reduce", "dp_replicate"): sum(size.values()) + used})


def test_copies_of_shards(ranks):
    totals, size, _ = ranks(4, sent, {"dp_replicate": 2, "dp_shard": 2})[0]
    whole, rest = sum(size.values()), size["model.graph.decoder.norm.weight"]
    assert_sent(
        "hsdp",
        totals,
        {
            ("all-gather", "dp_shard"): 2 * whole - rest,
            ("reduce-scatter", "dp_shard"): whole,
            ("all-reduce", "dp_replicate"): whole / 2,
        },
    )
