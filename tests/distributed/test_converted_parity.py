"""Every architecture that is read from Hugging Face trains, cut by tensor and by sample, as on one rank.

Nothing is said about any of them: their plans follow from the axes that their layers declare.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import parity
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import nemolet as nl
from nemolet.convert.reading import read
from nemolet.data.ports import ScoresB
from nemolet.language.losses import TokenLoss
from nemolet.parallel import MeshSizes, make_mesh, parallelize
from nemolet.parallel.plan import plan
from nemolet.training.graphs import training_graph
from nemolet.types import HiddenBTD, LabelsBT

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))

from tiny_models import LETTERS, MODELS, VOCAB, save

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SIZES = MeshSizes(dp_shard=2, tp=2)
ROWS, LENGTH, FRAMES = 4, 8, 44  # 900 samples make 44 frames


class HiddenLoss(nl.NeuralModule):
    """A loss for encoders without a head: each label names a feature that should be the largest."""

    def __init__(self, width: int) -> None:
        super().__init__(D=width)
        self.width = width
        self.scores = nl.language.CrossEntropy()

    def forward(self, hidden: HiddenBTD, labels: LabelsBT) -> TokenLoss:
        inside = labels.where(labels < 0, labels % self.width)
        return self.scores(hidden, inside)  # type: ignore[no-any-return]


class RewardLoss(nl.NeuralModule):
    """A loss for single rewards: in that of pairs, what both gradients share cancels, and their rounding does not."""

    def forward(self, rewards: ScoresB) -> TokenLoss:
        return TokenLoss(F.softplus(rewards).sum(), torch.tensor(len(rewards)))


def build(folder: Path) -> nl.Graph:
    """The training graph of a folder, without dropout; masks are inputs, so padding is there too."""
    model = read(folder).model.train()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    if isinstance(model, nl.language.RewardModel):
        return training_graph(model, RewardLoss(), fields=["mask"])
    encoder = isinstance(model, nl.language.TextEncoder | nl.speech.WaveEncoder)
    loss = HiddenLoss(model.width) if encoder else nl.language.CrossEntropy()
    return training_graph(model, loss, fields=["mask", "source_mask"])


def batch(inputs: list[str]) -> dict[str, Tensor]:
    """Rows of different lengths for whatever a graph reads."""
    numbers = torch.Generator().manual_seed(3)
    made = {}
    length = FRAMES if "lengths" in inputs or "audio" in inputs else LENGTH
    keep = torch.arange(length) < torch.tensor([[length], [length - 3], [length - 1], [length // 2]])
    for name in ("source", "tokens", "labels"):
        made[name] = torch.randint(4, VOCAB, (ROWS, length), generator=numbers)
    made["labels"] = made["labels"].masked_fill(~keep, -100)
    made["source_mask"], made["mask"] = keep.flip(0), keep
    made["spectrogram"] = torch.randn(ROWS, 40, 10, generator=numbers)
    made["audio"] = torch.randn(ROWS, 900, generator=numbers)
    made["audio_lengths"] = made["lengths"] = torch.tensor([900, 880, 890, 600])
    if "lengths" in inputs:
        made["spectrogram"] = made["audio"][..., None]
    if "audio" in inputs:  # a letter for each frame: what single alignments share in CTC's gradient cancels
        made["labels"] = made["labels"].where(~keep, made["labels"] % LETTERS["vocab_size"])
    return {name: value for name, value in made.items() if name in inputs}


def gradients(graph: nl.Graph, rank: int = 0, ranks: int = 1) -> parity.Trained:
    """The loss and all gradients of one batch, of which data-parallel ranks see their rows."""
    share = {name: value.chunk(ranks)[rank] for name, value in batch([*graph.input_ports]).items()}
    loss, count = graph(**share)
    loss.backward()
    parameters = dict(graph.named_parameters())
    found = {name: parity.whole(p.grad) for name, p in parameters.items() if p.grad is not None}
    total = torch.stack((loss.detach(), count.float()))
    if ranks > 1:
        dist.all_reduce(total)  # each row several times, loss and count alike
    return parity.Trained([(total[0] / total[1]).item()], [found], dict.fromkeys(parameters, total))


def on_mesh(folders: dict[str, Path]) -> dict[str, parity.Trained | str]:
    """All architectures, one after the other; runs on every rank."""
    mesh = make_mesh(SIZES, "cpu")
    found: dict[str, parity.Trained | str] = {}
    for name, folder in folders.items():
        graph = build(folder)
        derived = plan(graph, sizes=mesh.sizes)
        parallelize(graph, derived, mesh)
        found[name] = gradients(graph, mesh.data_rank, mesh.data_ranks)
        cut = {axis for parameter in derived.parameters.values() for axis in parameter.shards}
        assert cut == {"tp", "fsdp"}, name
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    pytest.importorskip("transformers")
    home = tmp_path_factory.mktemp("models")
    return {name: save(name, home / name) for name in MODELS}


@pytest.fixture(scope="module")
def found(folders, ranks):
    return ranks(SIZES.world, on_mesh, folders)


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_trains_on_four_ranks_as_on_one(name, folders, found):
    expected = gradients(build(folders[name]))
    assert expected.gradients[0], "nothing was learned"
    for of_rank in found:
        assert of_rank[name].gradients[0].keys() == expected.gradients[0].keys()
        parity.assert_same(of_rank[name], expected)
