"""Training with Lightning: the one model, optimizers, schedules, checkpoints, experiment folders."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "Checkpoints": "nemolet.training.checkpoint",
    "ExponentialAverage": "nemolet.training.callbacks",
    "LightningModel": "nemolet.training.lightning_model",
    "MeshStrategy": "nemolet.training.mesh_strategy",
    "Optim": "nemolet.training.optim",
    "Recorder": "nemolet.training.callbacks",
    "Result": "nemolet.training.experiment",
    "Schedule": "nemolet.training.schedule",
    "Training": "nemolet.training.settings",
    "fit": "nemolet.training.experiment",
    "score": "nemolet.training.evaluation",
    "training_graph": "nemolet.training.graphs",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"nemolet.training has no {name!r}; it has {', '.join(_EXPORTS)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


if TYPE_CHECKING:
    from nemolet.training.callbacks import ExponentialAverage, Recorder
    from nemolet.training.checkpoint import Checkpoints
    from nemolet.training.evaluation import score
    from nemolet.training.experiment import Result, fit
    from nemolet.training.graphs import training_graph
    from nemolet.training.lightning_model import LightningModel
    from nemolet.training.mesh_strategy import MeshStrategy
    from nemolet.training.optim import Optim
    from nemolet.training.schedule import Schedule
    from nemolet.training.settings import Training
