"""Training takes any data: here points with a class, counted and measured as they need."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import nemolet as nl
from nemolet.data.prepared import Unit
from nemolet.errors import ConfigError, TrainingError, WiringError
from nemolet.metrics import Accuracy, Share
from nemolet.training import Optim, Schedule, Training, fit, training_graph
from nemolet.types import CountScalar, LabelsB, LogitsBV, LossScalar, SpectrogramBTC


@nl.register
class Classifier(nl.NeuralModule):
    def __init__(self, *, classes: int) -> None:
        super().__init__(V=classes, C=2)
        self.layer = nl.nn.Linear("C", "V", 2, classes, bias=True)

    def forward(self, features: SpectrogramBTC) -> LogitsBV:
        return self.layer(features.mean(1))


class Sums(NamedTuple):
    loss: LossScalar
    count: CountScalar


class ClassLoss(nl.NeuralModule):
    def forward(self, logits: LogitsBV, labels: LabelsB) -> Sums:
        return Sums(F.cross_entropy(logits, labels, reduction="sum"), torch.tensor(len(labels)))


@dataclass
class Points:
    """Batches of changing size; the class of a point is the sign of its first coordinate."""

    tokenizer = None
    fields = ("features", "labels")
    unit = Unit("seconds", 4.0)
    sizes = {"classes": 2}
    summary = "points"
    identity = {"path": "points"}

    def derived(self, valid_loss):
        return {"twice": 2 * valid_loss}

    def train_loader(self, *, rank=0, ranks=1):
        return Stream()

    def valid_loader(self, *, rank=0, ranks=1, max_batches=None):
        return Valid()


class Stream:
    def __init__(self):
        self.number = 0

    def __iter__(self):
        while True:
            self.number += 1
            yield batch(100 + self.number, 2 + self.number % 3)

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


class Valid:
    def __iter__(self):
        yield batch(1, 5)
        yield batch(2, 3)


def batch(seed, size):
    features = torch.randn(size, 4, 2, generator=torch.Generator().manual_seed(seed))
    return {"features": features, "labels": (features.mean(1)[:, 0] > 0).long()}


def run(folder, steps=30, **training):
    torch.manual_seed(0)
    options = {"loggers": (), "progress": False, "valid_every": 15, "log_every": 5, "checkpoint_every": 5, **training}
    return fit(
        Classifier(classes=2),
        ClassLoss(),
        Points(),
        folder=folder,
        metrics={"accuracy": Accuracy()},
        optim=Optim(lr=0.3, weight_decay=0.0),
        schedule=Schedule(warmup_steps=0),
        training=Training(max_steps=steps, accumulate=2, **options),
    )


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_counts_and_measures_what_its_data_is_about(tmp_path):
    result = run(tmp_path)
    last = rows(tmp_path)[-1]
    assert result.valid["twice"] == pytest.approx(2 * result.valid_loss)
    hits = [float(r["accuracy"]) for r in rows(tmp_path) if r["accuracy"]]
    assert hits[-1] == result.valid["accuracy"] == 1.0
    sizes = [len(b["labels"]) for _, b in zip(range(60), Stream())]
    assert float(last["seconds"]) == sum(sizes) * 4 * 2 / 4.0


def test_accuracy_is_a_share_of_all_validation_samples_not_a_mean_of_batches(tmp_path):
    result = run(tmp_path, steps=1, valid_every=1)
    model = Classifier(classes=2)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("graph.model."): value for name, value in checkpoint.items()})
    batches = Points().valid_loader()
    hits = sum(int((model(b["features"]).argmax(-1) == b["labels"]).sum()) for b in batches)
    assert result.valid["accuracy"] == pytest.approx(hits / 8)


def test_a_run_goes_on_at_the_batch_after_its_checkpoint(tmp_path):
    whole = run(tmp_path / "whole", steps=20)
    run(tmp_path / "cut", steps=20, max_minutes=1e-9)  # ends after a step, with a checkpoint
    resumed = run(tmp_path / "cut", steps=20)
    states = [torch.load(r.folder / "checkpoints" / "last", weights_only=True) for r in (whole, resumed)]
    assert states[0]["nemolet"]["position"] == states[1]["nemolet"]["position"] == {"number": 40}
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name])


def test_data_that_does_not_fit_the_model_is_refused(tmp_path):
    class Wrong(Points):
        fields = ("features", "labels", "speaker")

    with pytest.raises(TrainingError, match="does not fit the data"):
        fit(Classifier(classes=2), ClassLoss(), Wrong(), folder=tmp_path)


def test_a_model_that_cannot_be_saved_is_refused_before_it_is_trained(tmp_path):
    class Unknown(Classifier):
        pass

    with pytest.raises(ConfigError, match="not allowed"):
        fit(Unknown(classes=2), ClassLoss(), Points(), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_metric_has_to_be_a_share():
    class Wrong(nl.NeuralModule):
        def forward(self, logits: LogitsBV) -> CountScalar:
            return logits.sum()

    with pytest.raises(WiringError, match="a part and a whole"):
        training_graph(Classifier(classes=2), ClassLoss(), {"wrong": Wrong()})


def test_a_metric_sees_the_models_outputs_and_the_batch():
    graph = training_graph(Classifier(classes=2), ClassLoss(), {"accuracy": Accuracy(), "first": Accuracy(top=2)})
    out = graph(**batch(0, 5))
    assert set(out) == {"loss", "count", "accuracy_part", "accuracy_whole", "first_part", "first_whole"}
    assert out["first_part"] == out["first_whole"] == 5
    assert isinstance(Accuracy()(torch.eye(2), torch.tensor([0, 0])), Share)


def test_a_metric_of_another_model_is_refused_before_training(tmp_path):
    class Blanks(nl.NeuralModule):
        def forward(self, frame_logits: nl.types.LogitsBTV) -> Share:
            return Share(frame_logits.sum(), frame_logits.sum())

    with pytest.raises(WiringError, match=r"nothing gives what this metric reads") as caught:
        fit(
            Classifier(classes=2),
            ClassLoss(),
            Points(),
            metrics={"blanks": Blanks()},
            folder=tmp_path / "run",
            optim=Optim(),
            schedule=Schedule(),
            training=Training(progress=False),
        )
    assert "metrics.blanks.frame_logits" in str(caught.value)
    assert "leave metrics.blanks out" in str(caught.value)
