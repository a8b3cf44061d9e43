"""A folder belongs to one run, one process, and one kind of end."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import threading

import pytest
import pytorch_lightning as pl
import torch

import nemolet as nl
from nemolet.data import Corpus, TokenizerSpec
from nemolet.errors import TrainingError
from nemolet.metrics import TokenAccuracy
from nemolet.training import Optim, Schedule, Training, fit, score, training_graph
from nemolet.training.callbacks import ExponentialAverage
from nemolet.training.placement import stored_weights
from nemolet.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def corpus(poem, tmp_path_factory):
    return prepared(poem, str(tmp_path_factory.mktemp("tokens")))


def prepared(path, cache, **settings):
    options = {"sequence_length": 16, "batch_size": 4, **settings}
    return Corpus(path=str(path), cache=cache, **options).prepare(TokenizerSpec("char"))


def run(corpus, folder, *, width=16, optim=None, model=None, loss=None, metrics=None, callbacks=(), **training):
    torch.manual_seed(0)
    vocab = corpus.tokenizer.vocab_size
    options = {"max_steps": 4, "valid_every": 2, "checkpoint_every": 2, "log_every": 1, "loggers": (), **training}
    return fit(
        model or nl.language.CausalLM(vocab_size=vocab, layers=1, width=width, heads=2, context=16),
        loss or nl.language.CrossEntropy(),
        corpus,
        metrics=metrics,
        callbacks=callbacks,
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
    with pytest.raises(TrainingError, match=r"data\.first_validation_batch\.tokens"):
        run(prepared(other, str(tmp_path)), folder, max_steps=8)
    with pytest.raises(TrainingError, match=r"data\.first_validation_batch\.tokens"):
        run(prepared(poem, str(tmp_path), batch_size=2), folder, max_steps=8)


def test_a_folder_goes_on_when_its_text_lies_elsewhere(poem, folder, tmp_path):
    moved = tmp_path / "moved.txt"
    moved.write_bytes(poem.read_bytes())
    result = run(prepared(moved, str(tmp_path)), folder, max_steps=6)
    assert result.steps == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"order": "sequential"}, "data.order: shuffled -> sequential"),
        ({"seed": 3}, "data.seed: None -> 3"),
        ({"respect_documents": False}, "data.respect_documents: True -> False"),
    ],
)
def test_a_folder_goes_on_only_in_its_own_order(poem, folder, tmp_path, change, words):
    with pytest.raises(TrainingError, match="belongs to another run") as caught:
        run(prepared(poem, str(tmp_path), **change), folder, max_steps=8)
    assert words in str(caught.value)


def test_a_changed_word_in_the_middle_is_another_text(poem, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(poem.read_text())
    run(prepared(path, str(tmp_path)), tmp_path / "run")
    text = poem.read_text()
    middle = text.index("plain", len(text) // 2)
    path.write_text(f"{text[:middle]}nails{text[middle + 5 :]}")
    with pytest.raises(TrainingError, match=r"data\.train: "):
        run(prepared(path, str(tmp_path)), tmp_path / "run", max_steps=8)


def test_where_and_how_fast_the_text_is_read_may_change(poem, folder, tmp_path):
    assert run(prepared(poem, str(tmp_path / "elsewhere"), workers=2), folder, max_steps=5).steps == 5


@pytest.fixture(scope="module")
def bases(corpus, tmp_path_factory):
    """Two archives of one shape."""
    folder = tmp_path_factory.mktemp("bases")
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = nl.language.CausalLM(vocab_size=corpus.tokenizer.vocab_size, layers=1, width=16, heads=2, context=16)
        nl.save(folder / f"{seed}.nemolet", model=model)
    return [lambda seed=seed: nl.load(folder / f"{seed}.nemolet").model.train() for seed in (1, 2)]


def test_a_finished_folder_does_not_answer_for_another_base_model(corpus, bases, tmp_path):
    one, two = bases
    first = run(corpus, tmp_path, model=one())
    assert run(corpus, tmp_path, model=one()).valid == first.valid
    with pytest.raises(TrainingError, match=r"weights\.model: \w{64} -> \w{64}"):
        run(corpus, tmp_path, model=two())


def test_a_finished_folder_does_not_answer_for_another_teacher(corpus, bases, tmp_path):
    one, two = bases
    for teacher, refused in ((two, False), (one, True)):
        model = nl.language.Distilled(student=one(), teacher=teacher())
        with pytest.raises(TrainingError, match=r"weights\.teacher") if refused else contextlib.nullcontext():
            run(corpus, tmp_path, model=model, loss=model.objective(), max_steps=2)


def test_other_metrics_are_another_run(corpus, folder):
    with pytest.raises(TrainingError, match="belongs to another run") as caught:
        run(corpus, folder, max_steps=8, metrics={"accuracy": TokenAccuracy()})
    assert "metrics: [] -> ['accuracy']" in str(caught.value)


def test_looking_at_a_finished_run_leaves_its_notes(corpus, folder):
    for name in ("config.yaml", "git.txt"):
        (folder / name).write_text("as it was trained")
    run(corpus, folder)
    assert (folder / "git.txt").read_text() == (folder / "config.yaml").read_text() == "as it was trained"


def test_a_run_that_has_ended_may_be_archived_anew(corpus, tmp_path):
    options = {"optim": Optim(lr=3.0), "max_steps": 40, "patience": 1}  # the last validation is worse than the best
    last = run(corpus, tmp_path, **options)
    weights = nl.load(last.archive).model.state_dict()
    best = run(corpus, tmp_path, archive="best", **options)
    state = torch.load(tmp_path / "checkpoints" / "best", weights_only=True)
    assert state["global_step"] < best.steps == last.steps
    for name, weight in nl.load(best.archive).model.state_dict().items():
        assert torch.equal(weight, state["state_dict"][f"graph.model.{name}"])
    again = run(corpus, tmp_path, **options)
    assert again.valid == best.valid == last.valid
    assert all(torch.equal(weight, weights[name]) for name, weight in nl.load(again.archive).model.state_dict().items())


def test_a_run_that_was_stopped_early_goes_on_with_more_patience(corpus, tmp_path):
    whole = run(corpus, tmp_path / "whole", optim=Optim(lr=3.0), max_steps=40, patience=3)
    first = run(corpus, tmp_path / "parts", optim=Optim(lr=3.0), max_steps=40, patience=1)
    second = run(corpus, tmp_path / "parts", optim=Optim(lr=3.0), max_steps=40, patience=3)
    assert first.steps < second.steps == whole.steps
    assert second.valid == whole.valid


class Cut(Exception):
    """Stands for any crash."""


class CutIn(pl.Callback):
    """Crashes when a validation begins, or when a step is done."""

    def __init__(self, hook, step):
        self.step = step
        setattr(self, hook, self._cut)

    def _cut(self, trainer, *unused):
        if trainer.global_step == self.step:
            raise Cut


def test_a_kill_in_the_last_validation_leaves_no_number_of_an_earlier_one(corpus, tmp_path):
    options = {"max_steps": 5, "valid_every": 2, "checkpoint_every": 5}
    whole = run(corpus, tmp_path / "whole", **options)
    with pytest.raises(Cut):
        run(corpus, tmp_path / "cut", callbacks=[CutIn("on_validation_start", 5)], **options)
    assert run(corpus, tmp_path / "cut", **options).valid == whole.valid
    assert done(tmp_path / "cut") == done(tmp_path / "whole")
    assert validated_at(tmp_path / "cut") == validated_at(tmp_path / "whole") == ["2", "4", "5"]


def test_a_step_that_was_made_the_last_one_is_validated(corpus, tmp_path):
    with pytest.raises(Cut):
        run(corpus, tmp_path, callbacks=[CutIn("on_train_batch_end", 3)], checkpoint_every=2, valid_every=9)
    result = run(corpus, tmp_path, max_steps=2, valid_every=9)
    graph = training_graph(nl.load(result.archive).model, nl.language.CrossEntropy()).eval()
    assert done(tmp_path)["valid"]["valid_loss"] == pytest.approx(score(graph, corpus.valid_loader()).loss, rel=1e-5)
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step_00000002.ckpt"


def validated_at(folder):
    with (folder / "metrics.csv").open() as file:
        return [row["step"] for row in csv.DictReader(file) if row["valid_loss"]]


def done(folder):
    return json.loads((folder / "done.json").read_text())


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


def test_a_finished_run_without_its_checkpoints_is_still_that_run(corpus, folder):
    shutil.rmtree(folder / "checkpoints")
    before = (folder / "identity.json").read_text()
    with pytest.raises(TrainingError, match="another run"):
        run(corpus, folder, width=32)
    assert (folder / "identity.json").read_text() == before


def test_a_run_that_a_callback_ended_has_ended(corpus, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *unused):
            trainer.should_stop |= trainer.global_step == 3

    assert run(corpus, tmp_path, max_steps=8, callbacks=[Stop()]).steps == 3
    assert run(corpus, tmp_path, max_steps=8, callbacks=[Stop()], patience=3).steps == 3
    assert run(corpus, tmp_path, max_steps=9).steps == 9


def test_the_card_tells_the_steps_that_were_made(corpus, tmp_path):
    steps = run(corpus, tmp_path, max_steps=1000, patience=1, optim=Optim(lr=1.0)).steps
    assert steps < 1000
    assert f"in {steps} steps" in nl.load(tmp_path).card


def test_no_best_without_a_number(corpus, tmp_path):
    class Spoil(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            weight = next(pl_module.parameters())
            self.kept = weight.detach().clone()
            weight.data.fill_(float("nan"))

        def on_validation_epoch_end(self, trainer, pl_module):
            next(pl_module.parameters()).data.copy_(self.kept)

    with pytest.raises(TrainingError, match=r"trainer\.archive=last"):
        run(corpus, tmp_path, archive="best", callbacks=[Spoil()])


def test_the_average_of_a_checkpoint_is_held_once(corpus, tmp_path):
    run(corpus, tmp_path, ema=0.9)
    held = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, *unused):
            held.extend(c._loaded for c in trainer.callbacks if isinstance(c, ExponentialAverage))

    run(corpus, tmp_path, ema=0.9, max_steps=6, callbacks=[Look()])
    assert held
    assert not any(held)
