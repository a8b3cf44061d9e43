"""A Conformer with CTC trains on shared weights and shared heads as on one rank."""

from __future__ import annotations

import parity
import pytest
import torch

from nemolet.parallel import MeshSizes, Rules, make_mesh, parallelize
from nemolet.parallel.apply import gradient_sync
from nemolet.parallel.plan import plan
from nemolet.speech import CTC, CTCRecognizer, FrontEnd, LogMel, Normalize
from nemolet.speech.conformer import ConformerEncoder
from nemolet.training.graphs import training_graph

WHOLE = {"activations": {"T": "cp"}}  # convolutions look at neighbours, so every rank has whole sequences


def build():
    """From audio to the loss; everything but dropout."""
    torch.manual_seed(1)
    front_end = FrontEnd(features=LogMel(sample_rate=8000, bins=16, dither=0.0), normalize=Normalize(over="utterance"))
    encoder = ConformerEncoder(bins=16, layers=2, width=16, heads=4, ffn=32, kernel=3, dropout=0.0)
    model = CTCRecognizer(front_end=front_end, encoder=encoder, vocab_size=7)
    return training_graph(model, CTC(smoothing=0.1))


def steps():
    """Recordings of different lengths with differently many labels."""
    numbers = torch.Generator().manual_seed(2)
    for _ in range(parity.STEPS):
        lengths = torch.randint(1200, 2400, (parity.ROWS,), generator=numbers)
        audio = torch.randn(parity.ROWS, 2400, generator=numbers)
        labels = torch.randint(0, 7, (parity.ROWS, 2), generator=numbers)
        labels[:3, 1] = -100
        yield {"audio": audio, "audio_lengths": lengths, "labels": labels}


def train(graph, data_rank=0, data_ranks=1):
    parameters = dict(graph.named_parameters())
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-2, eps=1e-3, foreach=False)
    losses, gradients = [], []
    for batch in steps():
        gradient_sync(graph, True)
        loss, count = graph(**{name: value.chunk(data_ranks)[data_rank] for name, value in batch.items()})
        loss.backward()
        total = torch.stack((loss.detach(), count.detach().float()))
        if data_ranks > 1:
            total = parity._over_data(total, (data_rank, 0))
        for parameter in parameters.values():
            parameter.grad.div_(total[1].item())
        losses.append((total[0] / total[1]).item())
        gradients.append({name: parity.whole(p.grad) for name, p in parameters.items()})
        optimizer.step()
        optimizer.zero_grad()
    return parity.Trained(losses, gradients, {name: parity.whole(p) for name, p in parameters.items()})


def on_mesh(sizes):
    """Training in a layout, and how many parameters are cut by heads or features."""
    mesh, graph = make_mesh(MeshSizes(**sizes), "cpu"), build()
    chosen = plan(graph, Rules.of(WHOLE), mesh.sizes)
    parallelize(graph, chosen, mesh)
    cut = sum("tp" in p.device_mesh.mesh_dim_names and p.to_local().numel() * mesh.sizes.dp_shard < p.numel()
              for p in graph.parameters() if hasattr(p, "device_mesh"))  # fmt: skip
    return train(graph, mesh.data_rank, mesh.data_ranks), cut


@pytest.fixture(scope="module")
def alone():
    return train(build())


@pytest.mark.parametrize("sizes", [{"dp_shard": 2}, {"tp": 2}, {"dp_shard": 2, "tp": 2}], ids=str)
def test_a_conformer_trains_as_on_one_rank(ranks, alone, sizes):
    assert alone.losses[-1] < alone.losses[0]
    for found, cut in ranks(MeshSizes(**sizes).world, on_mesh, sizes):
        parity.assert_same(found, alone)
        assert cut > 0 or "tp" not in sizes
