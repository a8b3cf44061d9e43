"""A whole run: what its folder holds, and that its numbers are right."""

from __future__ import annotations

import csv
import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch
import yaml

import nemolet as nl
from nemolet.data import Corpus, TokenizerSpec
from nemolet.errors import TrainingError
from nemolet.training import Optim, Schedule, Training, fit, score, training_graph
from nemolet.training.throughput import flops_per_entry, peak_flops
from nemolet.training.watch import first_bad_module


@pytest.fixture(scope="module")
def corpus(poem, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("tokens"))
    return Corpus(path=str(poem), sequence_length=16, batch_size=4, cache=cache).prepare(TokenizerSpec("char"))


def make_model(corpus, **kwargs):
    torch.manual_seed(0)
    return nl.language.CausalLM(
        vocab_size=corpus.tokenizer.vocab_size, layers=1, width=16, heads=2, context=16, **kwargs
    )


def run(corpus, folder, model=None, config=None, **training):
    options = {
        "max_steps": 30,
        "valid_every": 10,
        "log_every": 5,
        "checkpoint_every": 10,
        "loggers": (),
        "progress": False,
        **training,
    }
    return fit(
        model or make_model(corpus),
        nl.language.CrossEntropy(),
        corpus,
        folder=folder,
        optim=Optim(lr=1e-2),
        schedule=Schedule(warmup_steps=5),
        training=Training(**options),
        seed=1,
        config=config,
    )


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return run(corpus, folder, config={"seed": 1, "model": {"width": 16}}, loggers=("tensorboard",))


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_folder_holds_everything(finished):
    names = {p.name for p in finished.folder.iterdir()}
    assert {"config.yaml", "git.txt", "metrics.csv", "loss.svg", "model.nemolet", "checkpoints", "tensorboard"} <= names
    assert yaml.safe_load((finished.folder / "config.yaml").read_text()) == {"seed": 1, "model": {"width": 16}}
    assert list((finished.folder / "tensorboard").glob("events.*"))
    assert ElementTree.fromstring((finished.folder / "loss.svg").read_text()).tag.endswith("svg")


def test_the_model_has_learned_and_says_so(finished, corpus):
    losses = [float(r["valid_loss"]) for r in rows(finished.folder) if r["valid_loss"]]
    assert len(losses) == 3
    assert losses[-1] < losses[0] < math.log(corpus.tokenizer.vocab_size)
    assert finished.valid_loss == pytest.approx(losses[-1])
    assert finished.valid["bits_per_byte"] == pytest.approx(
        losses[-1] / math.log(2)
    )  # one byte per character in this text


def test_the_archive_is_the_trained_model_with_a_card(finished, corpus):
    archive = nl.load(finished.archive)
    assert "validation loss" in archive.card
    assert f"{finished.valid_loss:.4f}" in archive.card
    graph = training_graph(archive.model, nl.language.CrossEntropy()).eval()
    assert score(graph, corpus.valid_loader()).loss == pytest.approx(finished.valid_loss, rel=1e-5)
    assert archive.tokenizer.fingerprint == corpus.tokenizer.fingerprint


def test_every_row_counts_tokens_and_seconds(finished):
    table = [r for r in rows(finished.folder) if r["train_loss"]]
    assert [int(r["step"]) for r in table] == [5, 10, 15, 20, 25, 30]
    assert [int(r["tokens"]) for r in table] == [s * 64 for s in (5, 10, 15, 20, 25, 30)]
    walls = [float(r["wall_seconds"]) for r in table]
    assert walls == sorted(walls)
    assert all(
        float(r["tokens_per_second"]) > 0 and 0 < float(r["mfu"]) < 1.5 and float(r["memory_mb"]) > 50 for r in table
    )
    assert all(float(r["gradient_norm"]) > 0 for r in table)


def test_early_stopping_stops(corpus, tmp_path):
    model = make_model(corpus)
    options = Training(
        max_steps=200, valid_every=5, log_every=5, checkpoint_every=50, loggers=(), progress=False, patience=2
    )
    result = fit(
        model,
        nl.language.CrossEntropy(),
        corpus,
        folder=tmp_path,
        optim=Optim(lr=1e-12),
        training=options,
        schedule=Schedule("constant", warmup_steps=0),
    )
    assert result.steps < 60
    assert result.archive.exists()


def test_the_average_is_the_average(corpus, tmp_path):
    """Against the definition, from checkpoints of a run without it."""
    import pytorch_lightning as pl

    class Keep(pl.Callback):
        def __init__(self):
            self.weights = []

        def on_train_start(self, trainer, module):
            self.on_train_batch_end(trainer, module)

        def on_train_batch_end(self, trainer, module, *unused):
            self.weights.append([p.detach().clone() for p in module.parameters()])

    keep = Keep()
    fit(
        make_model(corpus),
        nl.language.CrossEntropy(),
        corpus,
        folder=tmp_path,
        optim=Optim(lr=1e-2),
        schedule=Schedule(warmup_steps=5),
        training=Training(max_steps=20, valid_every=7, checkpoint_every=20, ema=0.8, loggers=(), progress=False),
        callbacks=[keep],
    )
    average = [w.clone() for w in keep.weights[0]]
    for step, weights in enumerate(keep.weights[1:], start=1):
        decay = min(0.8, step / (step + 9))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights)]
    model = nl.load(tmp_path / "model.nemolet").model
    for found, expected, last in zip(model.parameters(), average, keep.weights[-1]):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, last)


def test_compiling_changes_nothing(corpus, tmp_path, monkeypatch):
    steps_compiled = []

    def backend(compiled, inputs):
        steps_compiled.append(len(compiled.graph.nodes))
        return compiled.forward

    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self: setattr(
            self, "_compiled_call_impl", torch.compile(self._call_impl, backend=backend, fullgraph=True)
        ),
    )
    one = run(corpus, tmp_path / "a", max_steps=10)
    two = run(corpus, tmp_path / "b", max_steps=10, compile=True)
    assert max(steps_compiled) > 50  # the whole model, not single functions of it
    assert two.valid_loss == pytest.approx(one.valid_loss, rel=1e-4)
    assert set(nl.load(two.archive).model.state_dict()) == set(nl.load(one.archive).model.state_dict())


def test_documents_are_told_apart_in_training(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"short document {i}"}) for i in range(300)))
    data = Corpus(path=str(path), sequence_length=16, batch_size=4, cache=str(tmp_path / "c")).prepare(
        TokenizerSpec("byte")
    )
    assert "segments" in next(iter(data.train_loader()))
    assert run(data, tmp_path / "run").steps == 30


def test_arithmetic_of_a_step_is_that_of_the_formula(corpus):
    width, layers, vocab, length, ffn = 16, 1, corpus.tokenizer.vocab_size, 16, 64
    model = make_model(corpus, gated=False, norm="layer", activation="gelu", ffn_width=ffn)
    graph = training_graph(model, nl.language.CrossEntropy())
    found = flops_per_entry(graph, {k: torch.zeros(1, length, dtype=torch.long) for k in ("tokens", "labels")})
    matrices = layers * (4 * width * width + 2 * width * ffn) + width * vocab
    attention = layers * 2 * length * width
    assert found == pytest.approx(3 * 2 * (matrices + attention), rel=0.01)
    assert next(model.parameters()).device.type == "cpu"
    assert peak_flops(torch.device("cpu")) > 1e8


@pytest.mark.parametrize("fast", [True, False])
def test_slow_products_in_bfloat16_are_told(corpus, tmp_path, monkeypatch, capsys, fast):
    monkeypatch.setattr("nemolet.training.experiment.has_products", lambda dtype: fast)
    run(corpus, tmp_path / "run", precision="bf16-mixed", max_steps=1, accelerator="cpu")
    assert ("trainer.precision=32" in capsys.readouterr().out) is not fast


def test_fp16_needs_a_gpu(corpus, tmp_path):
    if torch.cuda.is_available():
        assert run(corpus, tmp_path, precision="16-mixed").steps == 30
    else:
        with pytest.raises(TrainingError, match="16-mixed needs a GPU"):
            run(corpus, tmp_path, precision="16-mixed", accelerator="auto")


def test_a_bad_gradient_names_its_module():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net(torch.ones(1, 2)).sum().backward()
    net[1].weight.grad.fill_(math.inf)
    net[0].weight.grad.fill_(math.inf)
    assert first_bad_module(net, lambda: net(torch.ones(1, 2))) == "1: gradient of weight"
