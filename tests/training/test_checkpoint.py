"""Resume is exact, and nothing is ever half-written: cuts at random steps, signals, kill -9, full disks."""

from __future__ import annotations

import csv
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

import nemolet as nl
from nemolet.data import Corpus, TokenizerSpec
from nemolet.data import loader as loaders
from nemolet.data.prepared import Unit
from nemolet.errors import TrainingError
from nemolet.training import LightningModel, Optim, Schedule, Training, fit, training_graph
from nemolet.training.callbacks import Recorder
from nemolet.training.checkpoint import AtomicCheckpoints, Checkpoints
from nemolet.training.folders import reader
from tests.equality import assert_equal


@pytest.fixture(scope="module")
def corpus(poem, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("tokens"))
    return Corpus(path=str(poem), sequence_length=16, batch_size=4, cache=cache).prepare(TokenizerSpec("char"))


def make_model(corpus):
    torch.manual_seed(0)
    return nl.language.CausalLM(
        vocab_size=corpus.tokenizer.vocab_size, layers=1, width=16, heads=2, context=16, dropout=0.2
    )


class Cut(Exception):
    """Stands for any crash."""


class Scissors(pl.Callback):
    """Crashes after a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *unused):
        if trainer.global_step == self.step:
            raise Cut


@pytest.fixture
def batches(monkeypatch):
    """Ids of every training batch, in order; the first is only looked at, to know the data."""
    seen = []
    original = loaders.collate

    def collate(samples, numbers):
        seen.append((samples.order, list(numbers)))
        return original(samples, numbers)

    monkeypatch.setattr(loaders, "collate", collate)
    return seen


def run(corpus, folder, *, cut=None, callbacks=(), **training):
    options = {
        "max_steps": 20,
        "valid_every": 7,
        "log_every": 3,
        "checkpoint_every": 4,
        "ema": 0.9,
        "accumulate": 2,
        "loggers": (),
        "progress": False,
        **training,
    }
    name = options.pop("optimizer", "adamw")
    return fit(
        make_model(corpus),
        nl.language.CrossEntropy(),
        corpus,
        folder=folder,
        optim=Optim(name, lr=1e-2),
        schedule=Schedule(warmup_steps=5),
        training=Training(**options),
        seed=5,
        callbacks=[*callbacks] if cut is None else [Scissors(cut)],
    )


def last_state(folder):
    return torch.load(folder / "checkpoints" / "last", weights_only=True)


@pytest.mark.parametrize(("optimizer", "background"), [("adamw", True), ("muon", False)])
def test_resume_is_bit_exact_after_cuts_at_random_steps(corpus, tmp_path, batches, optimizer, background):
    options = {"optimizer": optimizer, "background_checkpoints": background}
    run(corpus, tmp_path / "whole", **options)
    whole = [numbers for order, numbers in batches if order == "shuffled"][1:]
    rng = random.Random(11)
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        used: dict[int, list] = {}
        for cut in sorted(rng.sample(range(1, 20), 3)):
            del batches[:]
            with pytest.raises(Cut):
                run(corpus, folder, cut=cut, **options)
        del batches[:]
        run(corpus, folder, **options)
        used = [numbers for order, numbers in batches if order == "shuffled"][1:]
        start = whole.index(used[0])
        assert used[: len(whole) - start] == whole[start:][: len(used)]  # batch ids go on where they were
        one, two = last_state(tmp_path / "whole"), last_state(folder)
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "nemolet"):
            assert_equal(one[key], two[key], key)
        average = next(c for c in one["callbacks"] if "ExponentialAverage" in c)
        assert_equal(one["callbacks"][average], two["callbacks"][average])
        a, b = (nl.load(f / "model.nemolet").model.state_dict() for f in (tmp_path / "whole", folder))
        assert_equal(a, b)


def test_metrics_of_a_resumed_run_have_no_gap_and_no_double(corpus, tmp_path):
    run(corpus, tmp_path / "whole")
    with pytest.raises(Cut):
        run(corpus, tmp_path / "cut", cut=11)
    run(corpus, tmp_path / "cut")
    tables = []
    for name in ("whole", "cut"):
        with (tmp_path / name / "metrics.csv").open() as file:
            tables.append([(r["step"], r["train_loss"], r["valid_loss"], r["tokens"]) for r in csv.DictReader(file)])
    assert tables[0] == tables[1]


def test_a_finished_run_is_finished(corpus, tmp_path):
    first = run(corpus, tmp_path)
    before = (tmp_path / "model.nemolet").read_bytes()
    again = run(corpus, tmp_path)
    assert again.steps == first.steps == 20
    assert again.valid_loss == first.valid_loss
    assert (tmp_path / "model.nemolet").read_bytes() == before


def test_a_run_can_be_made_longer(corpus, tmp_path):
    run(corpus, tmp_path, max_steps=8)
    assert run(corpus, tmp_path, max_steps=12).steps == 12


def test_a_time_limit_saves_and_stops(corpus, tmp_path):
    result = run(corpus, tmp_path, max_minutes=0.0)
    assert result.stopped == "the time limit"
    assert result.steps == 1
    assert not result.archive.exists()
    assert run(corpus, tmp_path).stopped is None


def test_checkpoints_are_few_and_whole(corpus, tmp_path):
    run(corpus, tmp_path, checkpoint_every=1)
    folder = tmp_path / "checkpoints"
    names = {p.name for p in folder.iterdir()}
    assert {"last", "best", "step_00000020.ckpt"} <= names
    assert len(names) <= 5
    assert (folder / "last").resolve().name == "step_00000020.ckpt"
    for path in folder.iterdir():
        assert torch.load(path, weights_only=True)["global_step"] > 0


def test_the_copy_does_not_change_while_it_is_written(tmp_path):
    plugin, weight = AtomicCheckpoints(background=True), torch.zeros(1000)
    plugin.save_checkpoint({"weight": weight, "nested": [weight, (weight,)]}, tmp_path / "a.ckpt")
    weight.add_(1)
    plugin.wait()
    state = plugin.load_checkpoint(tmp_path / "a.ckpt")
    assert state["weight"].sum() == state["nested"][0].sum() == state["nested"][1][0].sum() == 0


def test_tied_weights_are_one_in_a_copy_as_well(corpus, tmp_path):
    run(corpus, tmp_path, max_steps=2, background_checkpoints=True)
    path = (tmp_path / "checkpoints" / "last").resolve()
    weights = torch.load(path, weights_only=True)["state_dict"]
    names = [name for name in weights if name.endswith(("embed.weight", "head.weight"))]
    assert len(names) == 2
    assert len({weights[name].data_ptr() for name in names}) == 1
    entries = reader(path).entries
    assert sum(f"weights.{name}" in entries for name in names) == 1  # as a mesh reads them


def test_losses_of_a_checkpoint_go_where_the_model_is(tmp_path):
    recorder = Recorder(tmp_path / "metrics.csv", every=10, unit=Unit())
    recorder.load_state_dict({"spent": [0.0, 0.0], "losses": [1.0, 2.0], "valid": {}, "validated": 0})
    model = nl.language.CausalLM(vocab_size=5, layers=1, width=4, heads=1)
    lightning = LightningModel(training_graph(model, nl.language.CrossEntropy())).to("meta")
    recorder.on_train_start(SimpleNamespace(is_global_zero=False), lightning)
    assert [loss.device.type for loss in recorder.losses] == ["meta", "meta"]


class Poison(pl.Callback):
    """Makes the gradients of one step infinite."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, *unused):
        if trainer.global_step == self.step:
            weight = next(module.parameters())
            weight.register_hook(lambda gradient: gradient + math.inf)


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_what_nobody_has_looked_at_does_not_become_the_last_checkpoint(corpus, tmp_path, clip):
    with pytest.raises(TrainingError, match="a number that is none"):
        run(corpus, tmp_path, watch=10, clip=clip, callbacks=[Poison(5)])
    state = last_state(tmp_path)
    assert state["global_step"] == 4
    assert all(weight.isfinite().all() for weight in state["state_dict"].values())


class Signal(pl.Callback):
    """A cluster that wants its machine back after a step, or in a validation."""

    def __init__(self, hook, step):
        self.step = step
        setattr(self, hook, self._send)

    def _send(self, trainer, *unused):
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("hook", "step"), [("on_train_batch_end", 9), ("on_train_batch_end", 14), ("on_validation_start", 7)]
)
def test_a_signal_moves_neither_validations_nor_the_best(corpus, tmp_path, hook, step):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run(corpus, whole)
    assert run(corpus, parts, callbacks=[Signal(hook, step)]).stopped == "SIGTERM"
    result = run(corpus, parts)
    assert result.valid == expected.valid
    assert validations(parts) == validations(whole)
    assert (parts / "checkpoints" / "best").resolve().name == (whole / "checkpoints" / "best").resolve().name
    assert last_state(parts)["nemolet"]["position"] == last_state(whole)["nemolet"]["position"]
    assert_equal(last_state(parts)["state_dict"], last_state(whole)["state_dict"])


def validations(folder):
    with (folder / "metrics.csv").open() as file:
        return [(row["step"], row["valid_loss"]) for row in csv.DictReader(file) if row["valid_loss"]]


def test_the_best_is_that_of_the_checkpoint_from_which_a_run_goes_on(corpus, tmp_path, monkeypatch):
    run(corpus, tmp_path / "whole")
    best = (tmp_path / "whole" / "checkpoints" / "best").resolve().name

    def die(self):
        if self.best_step == int(best[5:13]):
            raise Cut

    with monkeypatch.context() as patch, pytest.raises(Cut):  # on the disk, but not yet pointed to
        patch.setattr(Checkpoints, "_point_best", die)
        run(corpus, tmp_path / "cut")
    run(corpus, tmp_path / "cut")
    assert (tmp_path / "cut" / "checkpoints" / "best").resolve().name == best


def test_a_broken_checkpoint_is_named(corpus, tmp_path):
    run(corpus, tmp_path, max_steps=4)
    path = (tmp_path / "checkpoints" / "last").resolve()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TrainingError, match="the checkpoint cannot be read"):
        run(corpus, tmp_path, max_steps=8)


SCRIPT = """
    import os, sys
    import torch
    torch.set_num_threads(1)
    import nemolet as nl
    from nemolet.data import Corpus, TokenizerSpec
    from nemolet.training import Optim, Schedule, Training, fit
    data = Corpus(path={poem!r}, sequence_length=16, batch_size=4, cache={cache!r}).prepare(TokenizerSpec("char"))
    torch.manual_seed(0)
    size = data.tokenizer.vocab_size
    model = nl.language.CausalLM(vocab_size=size, layers=1, width=16, heads=2, context=16, dropout=0.2)
    print("ready", flush=True)
    {extra}
    training = Training(max_steps={steps}, valid_every=50, log_every=5, checkpoint_every=3, background_checkpoints=True,
                        loggers=(), progress=False)
    result = fit(model, nl.language.CrossEntropy(), data, folder=sys.argv[1], optim=Optim(lr=1e-2),
                 schedule=Schedule(warmup_steps=5), training=training, seed=5)
    print("stopped", result.stopped, result.steps, flush=True)
"""


def start(poem, tmp_path, folder, steps=150, extra=""):
    code = textwrap.dedent(SCRIPT).format(poem=str(poem), cache=str(tmp_path / "cache"), steps=steps, extra=extra)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def newest(folder: Path) -> int:
    """Step of the checkpoint that ``last`` points to, which has to be whole."""
    link = folder / "checkpoints" / "last"
    return torch.load(link, weights_only=True)["global_step"] if link.exists() else 0


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_checkpoint_before_survives(poem, tmp_path):
    folder = tmp_path / "full"
    process = start(poem, tmp_path, folder, steps=6)
    assert "stopped None 6" in process.communicate(timeout=60)[0]
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        " resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    )
    process = start(poem, tmp_path, folder, steps=20, extra=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "the checkpoint cannot be written" in errors
    assert newest(folder) == 6
    process = start(poem, tmp_path, folder, steps=20)
    assert "stopped None 20" in process.communicate(timeout=60)[0]
