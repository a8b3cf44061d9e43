"""What is measured over several ranks is what one rank measures, also where some have nothing left."""

from __future__ import annotations

import pytest
import torch

import nemolet as nl
from nemolet.data import SimilarTexts
from nemolet.data.batches import Batching, PassLoader
from nemolet.data.prepared import DummyBatch
from nemolet.language import NgramEncoder, SentenceEmbedder
from nemolet.language.preference import PreferenceLoss, PreferredShare
from nemolet.training import training_graph
from nemolet.training.evaluation import sums_of
from nemolet.types import TokenIdsBT


def totals(graph, loaders):
    """As training adds them up: over batches, then over ranks."""
    found = {}
    steps = {len(list(loader)) for loader in loaders}
    assert len(steps) == 1
    for loader in loaders:
        for batch in loader:
            with torch.no_grad():
                for name, value in sums_of(graph(**batch), batch).items():
                    found[name] = found.get(name, 0.0) + value.item()
    return found


def loaders_of(samples, ports, ranks):
    return [PassLoader(Batching(samples, ports, batch_size=2, rank=rank, ranks=ranks)) for rank in range(ranks)]


def embedder():
    torch.manual_seed(0)
    model = SentenceEmbedder(encoder=NgramEncoder(vocab_size=20, width=8, buckets=16))
    return training_graph(model, model.objective(), model.measures(), fields=tuple(SimilarTexts.PORTS)).eval()


@pytest.mark.parametrize("samples", [5, 9, 12])
@pytest.mark.parametrize("ranks", [2, 4])
def test_pairs_without_labels_are_counted_once(samples, ranks):
    generator = torch.Generator().manual_seed(samples)
    pairs = [
        {name: torch.randint(20, (4,), generator=generator).tolist() for name in ("tokens", "other_tokens")}
        for _ in range(samples)
    ]
    graph = embedder()
    found = totals(
        graph,
        [PassLoader(Batching(pairs, SimilarTexts.PORTS, batch_size=2, rank=r, ranks=ranks)) for r in range(ranks)],
    )
    assert found["count"] == samples
    assert found["nearest_whole"] == samples


class Preferences(nl.NeuralModule):
    """Rewards that are the first token."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, tokens: TokenIdsBT) -> nl.language.preference.Preferred:
        return nl.language.preference.Preferred(tokens[:, 0].float(), torch.ones(len(tokens)))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_loss_over_samples_is_that_of_one_rank(ranks):
    graph = training_graph(Preferences(), PreferenceLoss(), {"preferred": PreferredShare()}, fields=("tokens",))
    samples = [{"tokens": [n]} for n in range(7)]
    ports = {"tokens": TokenIdsBT}
    found = totals(
        graph, [PassLoader(Batching(samples, ports, batch_size=2, rank=r, ranks=ranks)) for r in range(ranks)]
    )
    rewards = torch.arange(7.0)
    expected = -torch.nn.functional.logsigmoid(0.1 * (rewards - 1)).sum()
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert (found["count"], found["preferred_part"], found["preferred_whole"]) == (7, 5, 7)


def test_a_filler_stays_one_when_it_is_moved():
    from lightning_utilities.core.apply_func import apply_to_collection

    batch = DummyBatch(tokens=torch.zeros(1, 2))
    assert isinstance(apply_to_collection(batch, torch.Tensor, lambda tensor: tensor.to("cpu")), DummyBatch)
