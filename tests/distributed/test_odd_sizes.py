"""Sizes that nothing divides: the same numbers as on one rank, or an error that says what to change."""

from __future__ import annotations

import parity
import pytest
import torch
import torch.distributed as dist
from test_pipeline import check
from test_pipeline import train as train_pipeline

from nemolet.errors import ParallelError
from nemolet.parallel import MeshSizes, make_mesh, parallelize
from nemolet.parallel.context import own_context
from nemolet.parallel.plan import plan

ODD = {"width": 18, "heads": 3, "kv_heads": 3, "ffn_width": 25, "vocab_size": 33}  # 3 divides some, 2 and 4 few


@pytest.mark.parametrize(
    ("model", "sizes", "changes"),
    [
        ("llama", {"dp_shard": 4}, ODD),
        ("gpt", {"dp_shard": 3}, {**ODD, "width": 20, "heads": 2, "kv_heads": 2}),  # rows are 3, 3 and 2
        ("gpt", {"dp_replicate": 3}, ODD),
        ("llama", {"tp": 2, "dp_shard": 2}, {**ODD, "width": 20, "heads": 2, "kv_heads": 2, "ffn_width": 26}),
        ("padded", {"tp": 3}, {**ODD, "width": 18, "ffn_width": 27, "pad_vocab_to": 8}),  # 14, 14 and 12 rows
    ],
    ids=["fsdp", "fsdp of three", "ddp of three", "tp and fsdp", "tp of three"],
)
def test_what_does_not_divide_trains_as_on_one_rank(ranks, expected, model, sizes, changes):
    rules = {"activations": {"T": "cp"}} if sizes.get("tp") == 3 else None  # 8 tokens are not 3 parts
    for found in ranks(MeshSizes(**sizes).world, parity.on_mesh, model, sizes, changes, rules=rules):
        parity.assert_same(found, expected(model, **changes))


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"pp": 3}, {}),  # 4 layers
        ({"pp": 4}, {"microbatches": 2}),  # 2 accumulated batches, each whole: fewer than stages
        ({"pp": 2, "dp_shard": 2}, {"microbatches": 1}),
        ({"pp": 3}, {"microbatches": 6, "layers": [2, 1, 1]}),
    ],
    ids=str,
)
def test_stages_and_micro_batches_that_do_not_divide(ranks, sizes, options):
    alone = parity.train(parity.build("llama", layers=4))
    check(ranks(MeshSizes(**sizes).world, train_pipeline, "llama", sizes, options), alone)


def few_rows(sizes, rows):
    """Gradients of a batch of which some ranks have fewer rows, one of them nothing that counts."""
    mesh = make_mesh(MeshSizes(**sizes), "cpu")
    graph = parity.build("llama")
    parallelize(graph, plan(graph, sizes=mesh.sizes), mesh)
    batch = next(parity.windows())[0]
    share = {name: value[:rows].tensor_split(mesh.data_ranks)[mesh.data_rank] for name, value in batch.items()}
    if len(share["tokens"]) == 0:  # what loaders give a rank that has nothing left
        share = {"tokens": batch["tokens"][:1], "labels": torch.full_like(batch["labels"][:1], -100)}
    loss, count = graph(**share)
    loss.backward()
    total = torch.stack((loss.detach(), count.float()))
    dist.all_reduce(total, group=mesh.axis("dp_replicate", "dp_shard").get_group())
    return total, {name: parity.whole(p.grad) for name, p in graph.named_parameters()}


@pytest.mark.parametrize("sizes", [{"dp_shard": 4}, {"dp_replicate": 4}, {"dp_shard": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize("rows", [3, 1])
def test_a_rank_without_rows_adds_nothing(ranks, sizes, rows):
    graph = parity.build("llama")
    loss, count = graph(**{name: value[:rows] for name, value in next(parity.windows())[0].items()})
    loss.backward()
    for total, gradients in ranks(4, few_rows, sizes, rows):
        torch.testing.assert_close(total, torch.stack((loss.detach(), count.float())))
        for name, parameter in graph.named_parameters():
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5 * scale, msg=name)


def attempt(sizes, changes):
    mesh = make_mesh(MeshSizes(**sizes), "cpu")
    graph = parity.build("llama", **changes)
    parallelize(graph, plan(graph, sizes=mesh.sizes), mesh)
    batch = {name: value[:, :6] for name, value in next(parity.windows())[0].items()}
    if mesh.sizes.cp > 1:
        batch = own_context(batch, graph.input_ports, mesh.axis("cp").get_group())
    graph(**batch)


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ({"tp": 2}, {"ffn_width": 25}, r"tp does not divide F(.|\n)*model\.ffn_width"),
        ({"tp": 4}, {"heads": 6, "kv_heads": 2, "width": 24}, r"model\.heads|kv_heads=replicate"),
        ({"tp": 4}, {"heads": 4, "kv_heads": 4}, r"data\.sequence_length"),  # 6 tokens, cut along T
        ({"cp": 2}, {}, r"data\.sequence_length"),  # 6 tokens are not 4 pieces
        ({"cp": 2, "tp": 2}, {}, r"data\.sequence_length"),
    ],
    ids=["ffn", "heads", "sequence and tp", "sequence and cp", "sequence, cp and tp"],
)
def test_what_cannot_be_is_refused_with_what_to_change(ranks, sizes, changes, message):
    with pytest.raises(ParallelError, match=message):
        ranks(MeshSizes(**sizes).world, attempt, sizes, changes)
