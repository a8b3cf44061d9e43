"""Where a run trains: which devices, under which strategy, and how its state is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nemolet.parallel.deferred import Deferred
from nemolet.parallel.settings import Parallel
from nemolet.training.checkpoint import LAST, AtomicCheckpoints
from nemolet.training.folders import CALLBACKS, WEIGHTS, FolderCheckpoints, reader
from nemolet.training.launching import ranks_started
from nemolet.training.mesh_strategy import MeshStrategy
from nemolet.training.settings import Training


def placement(
    training: Training, parallel: Parallel | None, folder: Path, *, on_gpu: bool, deferred: Deferred | None = None
) -> dict[str, Any]:
    """What Lightning's Trainer has to know about devices and checkpoints.

    A mesh of one rank is no mesh, unless the run was spread before: a folder of shards goes on as one.

    Args:
        training: devices and strategy as asked for; whoever started this process as a rank knows better.
        parallel: the layout; None or one rank for the strategy of ``training``.
        folder: of the experiment.
        on_gpu: whether the model is on a GPU.
        deferred: what knows the values of a model on ``meta``, for a mesh.
    """
    background = on_gpu if training.background_checkpoints is None else training.background_checkpoints
    devices, machines = ranks_started() or (training.devices, training.num_nodes)
    places: dict[str, Any] = {"devices": devices, "num_nodes": machines, "accelerator": training.accelerator}
    if parallel is None or (parallel.sizes() == Parallel().sizes() and not (folder / "checkpoints" / LAST).is_dir()):
        return {**places, "strategy": training.strategy, "plugins": [AtomicCheckpoints(background=background)]}
    strategy = MeshStrategy(
        parallel,
        timeout_minutes=training.timeout_minutes,
        logs=folder / "logs",
        deferred=deferred,
        checkpoint_io=FolderCheckpoints(background=background),
    )
    return {**places, "strategy": strategy}


def stored_weights(path: Path, *, averaged: str | None = None) -> Callable[[str], Tensor]:
    """Read the weights of a model from a checkpoint, one whole tensor at a time.

    Args:
        path: of the checkpoint.
        averaged: the callback that keeps averages of them; None for the weights themselves.
    """
    source = reader(path, optimizer=False)
    average = f"{CALLBACKS}::{averaged}::average::graph.model."
    plain = f"{WEIGHTS}graph.model."

    def read(name: str) -> Tensor:
        key = f"{average}{name}" if averaged is not None and f"{average}{name}" in source.entries else f"{plain}{name}"
        return source.one(key)

    return read


def share_of(trainer: Any) -> Mapping[str, int]:
    """Which part of the samples this rank reads."""
    kwargs = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return {"rank": kwargs["rank"], "ranks": kwargs["num_replicas"]}
