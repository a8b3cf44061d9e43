"""A folder belongs to one run, one process, and one kind of end."""

from __future__ import annotations

import csv
import shutil
import threading

import pytest
import torch

import nemolet as nl
from nemolet.data import Corpus, TokenizerSpec
from nemolet.errors import TrainingError
from nemolet.training import Optim, Schedule, Training, fit
from nemolet.training.callbacks import ExponentialAverage
from nemolet.training.placement import stored_weights
from nemolet.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def corpus(poem, tmp_path_factory):
    return prepared(poem, str(tmp_path_factory.mktemp("tokens")))


def prepared(path, cache, **settings):
    options = {"sequence_length": 16, "batch_size": 4, **settings}
    return Corpus(path=str(path), cache=cache, **options).prepare(TokenizerSpec("char"))


def run(corpus, folder, *, width=16, optim=None, **training):
    torch.manual_seed(0)
    vocab = corpus.tokenizer.vocab_size
    options = {"max_steps": 4, "valid_every": 2, "checkpoint_every": 2, "log_every": 1, "loggers": (), **training}
    return fit(
        nl.language.CausalLM(vocab_size=vocab, layers=1, width=width, heads=2, context=16),
        nl.language.CrossEntropy(),
        corpus,
        folder=folder,
        optim=optim or Optim(lr=1e-2),
        schedule=Schedule("linear", warmup_steps=2, min_ratio=0.0),
        training=Training(progress=False, **options),
    )


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(corpus, folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 32}, "model.width: 16 -> 32"),
        ({"optim": Optim(lr=1e-5)}, "optim.lr: 0.01 -> 1e-05"),
        ({"optim": Optim("muon", lr=1e-2)}, "optim.name: adamw -> muon"),
        ({"accumulate": 2}, "trainer.accumulate: 1 -> 2"),
    ],
)
def test_a_folder_goes_on_only_with_its_own_settings(corpus, folder, change, words):
    with pytest.raises(TrainingError, match="belongs to another run") as caught:
        run(corpus, folder, max_steps=8, **change)
    assert words in str(caught.value)
    assert "another name" in str(caught.value)


def test_a_folder_goes_on_only_with_its_own_text(poem, folder, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(poem.read_text()[::-1])
    with pytest.raises(TrainingError, match=r"data\.tokens"):
        run(prepared(other, str(tmp_path)), folder, max_steps=8)
    with pytest.raises(TrainingError, match=r"data\.tokens"):
        run(prepared(poem, str(tmp_path), batch_size=2), folder, max_steps=8)


def test_a_run_may_be_made_longer_and_kept_otherwise(corpus, folder):
    result = run(corpus, folder, max_steps=6, keep_checkpoints=3, log_every=2)
    assert result.steps == 6


@pytest.mark.parametrize("break_link", [lambda link: link.unlink(), lambda link: link.resolve().unlink()])
def test_a_lost_last_checkpoint_is_no_reason_to_begin_anew(corpus, folder, break_link):
    break_link(folder / "checkpoints" / "last")
    rows = (folder / "metrics.csv").read_text()
    with pytest.raises(TrainingError, match="which checkpoint is the last") as caught:
        run(corpus, folder, max_steps=8)
    assert "ln -sfn step_0000000" in str(caught.value)
    assert (folder / "metrics.csv").read_text() == rows


def test_two_runs_do_not_share_a_folder(corpus, folder):
    with RunFolder(folder).locked(), pytest.raises(TrainingError, match="another run is at work"):
        run(corpus, folder, max_steps=8)
    assert run(corpus, folder, max_steps=5).steps == 5


def test_a_run_that_was_stopped_early_has_ended(corpus, tmp_path):
    first = run(corpus, tmp_path, optim=Optim(lr=3.0), max_steps=40, patience=1)
    assert first.steps < 40
    again = run(corpus, tmp_path, optim=Optim(lr=3.0), max_steps=40, patience=1)
    assert (again.steps, again.valid) == (first.steps, first.valid)


def test_the_archive_may_hold_the_best_weights(corpus, tmp_path):
    result = run(corpus, tmp_path, max_steps=4, archive="best", ema=0.5, keep_checkpoints=3)
    best = (tmp_path / "checkpoints" / "best").resolve()
    assert holds_average(best, nl.load(result.archive).model.state_dict())
    first = tmp_path / "checkpoints" / "step_00000002.ckpt"
    read = stored_weights(first, averaged=ExponentialAverage(0.5).state_key)
    assert holds_average(first, {name: read(name) for name, _ in nl.load(result.archive).model.named_parameters()})
    assert not holds_average(first, nl.load(result.archive).model.state_dict())


def holds_average(checkpoint, weights):
    saved = torch.load(checkpoint, weights_only=True)["callbacks"]
    average = next(state["average"] for name, state in saved.items() if name.startswith("ExponentialAverage"))
    names = [name for name in weights if f"graph.model.{name}" in average]
    assert names
    return all(torch.equal(weights[name], average[f"graph.model.{name}"]) for name in names)


def test_the_recorded_learning_rate_is_that_of_the_step(finished):
    with (finished / "metrics.csv").open() as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file) if row["learning_rate"]]
    schedule = Schedule("linear", warmup_steps=2, min_ratio=0.0)
    assert rates == pytest.approx([1e-2 * schedule.factor(step, 4) for step in range(4)])


def test_training_runs_in_any_thread(corpus, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(corpus, tmp_path)))
    thread.start()
    thread.join()
    assert results[0].steps == 4
