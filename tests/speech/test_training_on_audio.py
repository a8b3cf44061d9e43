"""Training on audio with every augmentation: one seed gives one model, and a run that was cut off goes on exactly."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

import nemolet as nl
from nemolet.data.corpus import TokenizerSpec
from nemolet.speech import (
    CTC,
    CTCRecognizer,
    FrontEnd,
    Gain,
    LogMel,
    Normalize,
    Shift,
    SpecAugment,
    SpeedPerturbation,
    SpokenDigits,
    WhiteNoise,
)
from nemolet.speech.convolutional import ConvEncoder
from nemolet.training import Optim, Schedule, Training, fit


class Cut(Exception):
    """Stands for any crash."""


class Scissors(pl.Callback):
    """Crashes after a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *unused):
        if trainer.global_step == self.step:
            raise Cut


@pytest.fixture(scope="module")
def digits():
    # 60 utterances joined to about 25: an epoch of five batches, so that a run crosses into the next one.
    source = SpokenDigits(voices=3, valid_voices=1, takes=2, join=(2, 3), batch_seconds=8.0)
    return source.prepare(TokenizerSpec(kind="char"))


def run(digits, folder, *, cut=None):
    torch.manual_seed(0)
    front_end = FrontEnd(
        features=LogMel(sample_rate=8000, bins=16, dither=1e-4),
        normalize=Normalize(),
        audio_augment=[
            SpeedPerturbation(),
            Gain(probability=0.5),
            Shift(most=400, probability=0.5),
            WhiteNoise(probability=0.5),
        ],
        augment=[SpecAugment(feature_width=4)],
    )
    encoder = ConvEncoder(bins=16, width=16, kernels=[5], dropout=0.1)
    model = CTCRecognizer(front_end=front_end, encoder=encoder, vocab_size=digits.tokenizer.vocab_size)
    training = Training(
        max_steps=8, valid_every=4, log_every=4, checkpoint_every=3, loggers=(), progress=False, accelerator="cpu"
    )
    return fit(
        model,
        CTC(),
        digits,
        folder=folder,
        optim=Optim(lr=1e-2),
        schedule=Schedule(warmup_steps=2),
        training=training,
        seed=7,
        callbacks=[] if cut is None else [Scissors(cut)],
    )


def weights(result):
    return nl.load(result.archive).model.state_dict()


def test_a_run_repeats_and_a_run_that_was_cut_goes_on(digits, tmp_path):
    whole = run(digits, tmp_path / "whole")
    first = weights(whole)
    again = weights(run(digits, tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for step in (4, 7):
        with pytest.raises(Cut):
            run(digits, tmp_path / "cut", cut=step)
    resumed = run(digits, tmp_path / "cut")
    after = weights(resumed)
    assert all(torch.equal(first[name], after[name]) for name in first)
    assert resumed.valid == whole.valid
    assert digits.train_loader().plan.epoch(0) != digits.train_loader().plan.epoch(1)
