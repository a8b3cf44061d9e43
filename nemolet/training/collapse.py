"""A recognizer that writes nothing but blanks is noticed while it is trained, not after."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from nemolet.module import NeuralModule
from nemolet.speech.guards import COLLAPSED, BlankShare, probable_cause
from nemolet.training.lightning_model import LightningModel, Window

_log = logging.getLogger("nemolet")


class BlankWatch(pl.Callback):
    """Warn at a validation in which almost every frame is blank, with the likeliest reason (final).

    Args:
        metric: the name under which :class:`nemolet.speech.BlankShare` is measured.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.batch: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        self.batch = batch.batches[0] if isinstance(batch, Window) else batch

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        share = trainer.callback_metrics.get(self.metric)
        if share is None or float(share) < COLLAPSED or self.batch is None:
            return
        assert isinstance(pl_module, LightningModel)
        norm = pl_module.gradient_norm
        model: Any = pl_module.graph.get_submodule("model")
        was_training = model.training
        with torch.no_grad():  # in evaluation, so that no random number is drawn that training would have had
            result = model.eval()(**{name: self.batch[name] for name in model.input_ports if name in self.batch})
        model.train(was_training)
        frames = result["lengths"] if isinstance(result, dict) else result.lengths
        cause = probable_cause(
            self.batch, frames_B=frames, step=trainer.global_step, gradient_norm=None if norm is None else float(norm)
        )
        _log.warning(
            "step %d: %.1f%% of all frames are blank, so nothing is written: %s",
            trainer.global_step,
            100 * float(share),
            cause,
        )


def blank_watches(metrics: Mapping[str, NeuralModule] | None) -> list[pl.Callback]:
    """A watch for each metric that counts blanks."""
    return [BlankWatch(name) for name, metric in (metrics or {}).items() if isinstance(metric, BlankShare)]
