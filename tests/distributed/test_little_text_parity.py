"""Encoders of little text train on tables that are cut, and on shared heads, as on one rank."""

from __future__ import annotations

import parity
import pytest
import torch
import torch.distributed as dist

from nemolet.language import NgramEncoder, SpellingEncoder, TextClassifier
from nemolet.parallel import MeshSizes, Rules, make_mesh, parallelize
from nemolet.parallel.plan import plan
from nemolet.tokenizers import ByteTokenizer
from nemolet.training.graphs import training_graph

WHOLE = {"activations": {"T": "cp"}}
SIZES = MeshSizes(dp_shard=2, tp=2)
TEXTS = ("Where is my card?", "no", "Send it to Anna, please", "I lost it")


def build(kind, layers):
    """From bytes to the loss; everything but dropout."""
    torch.manual_seed(1)
    size = {"width": 16, "buckets": 64, "neighbours": 1, "layers": layers, "heads": 4, "dropout": 0.0}
    encoder = SpellingEncoder(shapes=True, **size) if kind == "spelling" else NgramEncoder(vocab_size=258, **size)
    model = TextClassifier(encoder=encoder, labels=["a", "b", "c", "d"], dropout=0.0)
    torch.nn.init.normal_(model.head.weight)
    return training_graph(model, model.objective(), fields=["mask"])


def gradients(graph, rank=0, ranks=1):
    """The loss and all gradients of one batch, of which data-parallel ranks see their texts."""
    texts = [ByteTokenizer().encode(text) for text in TEXTS]
    longest = max(map(len, texts))
    batch = {
        "tokens": torch.tensor([ids + [0] * (longest - len(ids)) for ids in texts]),
        "mask": torch.tensor([[i < len(ids) for i in range(longest)] for ids in texts]),
        "labels": torch.tensor([0, 1, 2, 3]),
    }
    loss, count = graph(**{name: value.chunk(ranks)[rank] for name, value in batch.items()})
    loss.backward()
    total = torch.stack((loss.detach(), count.float()))
    if ranks > 1:
        dist.all_reduce(total)  # each text several times, loss and count alike
    found = {name: parity.whole(p.grad) for name, p in graph.named_parameters()}
    return parity.Trained([(total[0] / total[1]).item()], [found], dict.fromkeys(found, total))


def on_mesh(kind, layers, rules):
    """Gradients in a layout, and what is cut there."""
    mesh, graph = make_mesh(SIZES, "cpu"), build(kind, layers)
    derived = plan(graph, Rules.of(rules), mesh.sizes)
    parallelize(graph, derived, mesh)
    cut = {axis for parameter in derived.parameters.values() for axis in parameter.shards}
    return gradients(graph, mesh.data_rank, mesh.data_ranks), cut


@pytest.mark.parametrize("layers, rules", [(0, None), (1, WHOLE)], ids=["as_it_is", "with_blocks"])
@pytest.mark.parametrize("kind", ["spelling", "ngrams"])
def test_an_encoder_of_little_text_trains_as_on_one_rank(ranks, kind, layers, rules):
    expected = gradients(build(kind, layers))
    for found, cut in ranks(SIZES.world, on_mesh, kind, layers, rules):
        parity.assert_same(found, expected)
        assert cut == {"tp", "fsdp"}
