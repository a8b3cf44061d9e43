"""The training step: exact means over tokens, clipping, precision, and numbers that are none."""

from __future__ import annotations

import copy
import math
import os

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import nemolet as nl
from nemolet.errors import TrainingError
from nemolet.training import LightningModel, Optim, Schedule, training_graph


def make_graph(dtype=torch.float32):
    torch.manual_seed(0)
    model = nl.language.CausalLM(vocab_size=13, layers=2, width=16, heads=2, context=32)
    return training_graph(model, nl.language.CrossEntropy()).to(dtype)


def ragged(count, seed=1):
    """Micro-batches with very different numbers of labels."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index in range(count):
        tokens = torch.randint(13, (2, 9), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[:, 1 + index % 7 :] = -100
        batches.append({"tokens": tokens[:, :-1], "labels": labels})
    return batches


def train(lightning, steps, **kwargs):
    trainer = pl.Trainer(
        max_steps=len(steps),
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **kwargs,
    )
    trainer.fit(lightning, _Steps(steps))
    return trainer


class _Steps:
    def __init__(self, steps):
        self.steps = steps

    def __iter__(self):
        return iter(self.steps)


def bare_loop(graph, steps, *, clip, lr=1e-2):
    """The same training in plain torch: one mean over all tokens of a step."""
    optimizer = Optim(lr=lr).make(graph)
    for window in steps:
        sums = [graph(**micro) for micro in window]
        (sum(s.loss for s in sums) / sum(s.count for s in sums)).backward()
        if clip:
            nn.utils.clip_grad_norm_(graph.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_accumulation_is_exact_over_tokens(clip):
    micro = ragged(12)
    windows = [micro[i : i + 4] for i in range(0, 12, 4)]
    whole = [[{k: torch.cat([m[k] for m in w]) for k in w[0]}] for w in windows]
    results = []
    for steps in (windows, whole):
        graph = make_graph(
            torch.float64
        )  # Adam turns rounding of tiny gradients into steps; here only the mean is tested
        train(
            LightningModel(graph, optim=Optim(lr=1e-2), schedule=Schedule("constant", warmup_steps=0), clip=clip), steps
        )
        results.append(graph)
    reference = make_graph(torch.float64)
    bare_loop(reference, windows, clip=clip)
    for split, joined, plain in zip(*(g.parameters() for g in (*results, reference))):
        torch.testing.assert_close(split, joined, rtol=0, atol=1e-6)
        torch.testing.assert_close(split, plain, rtol=0, atol=1e-6)


def test_the_naive_mean_would_be_wrong():
    """The test above can fail: means of micro-batches give another update."""
    micro = ragged(4)
    exact, naive = make_graph(), make_graph()
    sums = [exact(**m) for m in micro]
    (sum(s.loss for s in sums) / sum(s.count for s in sums)).backward()
    for m in micro:
        s = naive(**m)
        (s.loss / s.count / len(micro)).backward()
    gaps = [(a.grad - b.grad).norm() / a.grad.norm() for a, b in zip(exact.parameters(), naive.parameters())]
    assert max(gaps) > 0.05


def test_a_step_without_labels_changes_nothing_but_decay():
    batch = ragged(1)[0]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    graph = make_graph()
    before = copy.deepcopy(graph.state_dict())
    train(LightningModel(graph, optim=Optim(weight_decay=0.0), watch=1), [[batch]])
    assert all(torch.equal(v, before[k]) for k, v in graph.state_dict().items())


def test_validation_is_weighted_by_tokens():
    graph = make_graph()
    batches = ragged(5)
    lightning = LightningModel(graph)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(lightning, _Steps(batches), verbose=False)
    with torch.no_grad():
        sums = [graph(**b) for b in batches]
    expected = sum(s.loss.item() for s in sums) / sum(s.count.item() for s in sums)
    assert float(trainer.callback_metrics["valid_loss"]) == pytest.approx(expected, rel=1e-6)
    unweighted = sum(s.loss.item() / s.count.item() for s in sums) / 5
    assert abs(unweighted - expected) > 1e-4


def test_bf16_mixed_keeps_float32_weights_and_learns():
    graph, batch = make_graph(), ragged(1)[0]
    first = graph(**batch).loss.item()
    train(
        LightningModel(graph, optim=Optim(lr=1e-2), schedule=Schedule("constant", warmup_steps=0)),
        [[batch]] * 20,
        precision="bf16-mixed",
    )
    assert {p.dtype for p in graph.parameters()} == {torch.float32}
    assert graph(**batch).loss.item() < 0.5 * first


def test_activation_checkpointing_changes_no_update():
    graphs = []
    for checkpointing in ("none", "full", "every_2"):
        torch.manual_seed(0)
        model = nl.language.CausalLM(
            vocab_size=13, layers=2, width=16, heads=2, context=32, dropout=0.2, checkpointing=checkpointing
        )
        graph = training_graph(model, nl.language.CrossEntropy())
        torch.manual_seed(1)
        train(LightningModel(graph), [[m] for m in ragged(3)])
        graphs.append(graph)
    for a, b, c in zip(*(g.parameters() for g in graphs)):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_graph_without_a_loss_is_refused():
    model = nl.language.CausalLM(vocab_size=5, layers=1, width=4, heads=1)
    with pytest.raises(TrainingError, match="one output of type Loss"):
        LightningModel(model)


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (
            lambda g: g.model.graph.decoder.blocks[1].feed_forward.parameters().__next__().data.fill_(math.nan),
            r"decoder.blocks.1.feed_forward",
        ),
        (lambda g: g.model.graph.embed.weight.data.mul_(1e38), r"first in model"),
    ],
)
def test_a_bad_number_stops_training_and_names_the_module(break_it, text):
    graph = make_graph()
    break_it(graph)
    before = copy.deepcopy(graph.state_dict())
    with pytest.raises(TrainingError, match=text) as caught:
        train(LightningModel(graph), [[ragged(1)[0]]])
    assert "step 0" in str(caught.value)
    for name, value in graph.state_dict().items():  # stopped before the update spoils the rest
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def _rank(rank, port, folder):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    graph, micro = make_graph(torch.float64), ragged(12)
    steps = [[micro[i + rank * 2], micro[i + rank * 2 + 1]] for i in range(0, 12, 4)]
    lightning = LightningModel(graph, optim=Optim(lr=1e-2), schedule=Schedule("constant", warmup_steps=0), clip=0.05)
    trainer = pl.Trainer(
        max_steps=3,
        accelerator="cpu",
        devices=2,
        num_nodes=1,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(lightning, _Steps(steps))
    if rank == 0:
        torch.save({k: v.clone() for k, v in graph.state_dict().items()}, folder / "weights.pt")


@pytest.mark.distributed
def test_two_ranks_equal_one(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(r, port, tmp_path)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    micro = ragged(12)
    reference = make_graph(torch.float64)
    bare_loop(reference, [micro[i : i + 4] for i in range(0, 12, 4)], clip=0.05)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, expected in reference.state_dict().items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-6)
