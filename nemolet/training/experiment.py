"""One training run from its parts to its folder: the training story."""

from __future__ import annotations

import logging
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import Callback, EarlyStopping
from pytorch_lightning.utilities import rank_zero_only

from nemolet.archive import described, save
from nemolet.data.prepared import Loader, Prepared
from nemolet.errors import TrainingError
from nemolet.module import NeuralModule
from nemolet.training.callbacks import ExponentialAverage, Recorder, spoken
from nemolet.training.checkpoint import LAST, AtomicCheckpoints, Checkpoints, remove_remains
from nemolet.training.collapse import blank_watches
from nemolet.training.curve import draw_curve
from nemolet.training.graphs import training_graph
from nemolet.training.lightning_model import LightningModel, Window
from nemolet.training.optim import Optim
from nemolet.training.schedule import Schedule
from nemolet.training.settings import Training
from nemolet.training.throughput import flops_per_entry, peak_flops


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    folder: Path
    archive: Path
    steps: int
    valid: Mapping[str, float]  # numbers of the last validation: ``valid_loss``, metrics, and what follows from them
    stopped: str | None  # why it ended early, if it did

    @property
    def valid_loss(self) -> float:
        """The last validation loss."""
        return self.valid["valid_loss"]


def fit(
    model: NeuralModule,
    loss: NeuralModule,
    data: Prepared,
    *,
    folder: str | Path,
    metrics: Mapping[str, NeuralModule] | None = None,
    optim: Optim | None = None,
    schedule: Schedule | None = None,
    training: Training | None = None,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Train a model in an experiment folder, or go on where the folder left off.

    Args:
        model: from a batch to what the loss needs.
        loss: ends in a sum and a count.
        data: what is learned from.
        folder: receives ``config.yaml, git.txt, metrics.csv, loss.svg, checkpoints/, model.nemolet`` and logs.
        metrics: what is measured in validation beside the loss, by name; see :mod:`nemolet.metrics`.
        optim: the optimizer.
        schedule: the learning rate.
        training: everything else.
        seed: of what training itself draws at random.
        config: what the parts were built from; a folder is only continued with an equal one.
        callbacks: further callbacks of Lightning.

    Raises:
        TrainingError: for a folder of another run, or numbers that are none.
        ConfigError: for a model whose class is not registered, so that no archive could be loaded.
    """
    folder, training = Path(folder), training or Training()
    described(model, data.tokenizer)  # a model that cannot be saved is refused before it is trained
    check_data = getattr(model, "check_data", None)  # a task model may know what it cannot learn from
    if check_data is not None:
        check_data(data)
    _quiet()
    if getattr(rank_zero_only, "rank", 0) == 0:
        _claim(folder, dict(config or {}))
    on_gpu = training.accelerator != "cpu" and torch.cuda.is_available()
    graph = _fitting(training_graph(model, loss), model, data)
    measured = training_graph(model, loss, metrics) if metrics else None
    lightning = _lightning(graph, measured, optim or Optim(), schedule or Schedule(), training, on_gpu)
    recorder = _recorder(graph, data, folder, tuple(metrics or ()), training, on_gpu)
    average = ExponentialAverage(training.ema) if training.ema else None
    checkpoints = _checkpoints(folder, training)
    watching: list[Callback] = [*([average] if average else []), recorder, *blank_watches(metrics), *callbacks]
    if training.patience is not None:
        watching.append(EarlyStopping("valid_loss", patience=training.patience))
    trainer = _trainer(training, folder, [*watching, checkpoints], on_gpu)  # last: they save what the others know
    ranks = {"rank": trainer.global_rank, "ranks": trainer.world_size}
    lightning.loader = data.train_loader(**ranks)
    valid = data.valid_loader(**ranks, max_batches=training.valid_batches)
    pl.seed_everything(seed + trainer.global_rank, verbose=False)
    last = folder / "checkpoints" / LAST
    windows = _Windows(lightning.loader, training.accumulate)
    trainer.fit(lightning, windows, valid, ckpt_path=last.resolve() if last.exists() else None)
    archive = folder / "model.nemolet"
    if checkpoints.stopped is None:
        if average is not None:
            average.swap(lightning)
        if trainer.is_global_zero:
            card = _card(model, data, lightning, recorder.valid, training)
            save(archive, model=model, tokenizer=data.tokenizer, card=card)
            draw_curve(folder / "metrics.csv", folder / "loss.svg", title=folder.name)
    return Result(folder, archive, trainer.global_step, recorder.valid, checkpoints.stopped)


def _fitting(graph: NeuralModule, model: NeuralModule, data: Prepared) -> NeuralModule:
    """The graph, if it takes what a batch holds."""
    lacking = [name for name in data.fields if name not in graph.input_ports]
    needed = [name for name, port in graph.input_ports.items() if not port.optional and name not in data.fields]
    if lacking or needed:
        several = "segments" in lacking
        raise TrainingError(
            "the model cannot tell documents apart" if several else "the model does not fit the data",
            where=model.label,
            expected="inputs " + ", ".join(data.fields),
            found=", ".join(graph.input_ports),
            fix="set data.respect_documents=false, or add the optional ports to forward" if several else None,
        )
    return graph


def _lightning(
    graph: NeuralModule,
    measured: NeuralModule | None,
    optim: Optim,
    schedule: Schedule,
    training: Training,
    on_gpu: bool,
) -> LightningModel:
    """The graph that is trained, with its optimizer and schedule."""
    if training.precision == "16-mixed":
        if not on_gpu:
            raise TrainingError(
                "16-mixed needs a GPU", where="trainer.precision", fix="set trainer.precision=bf16-mixed"
            )
        optim = replace(optim, fused=False)  # the scaler has to see the gradients before the update
    watch = training.watch if training.watch is not None else training.log_every if on_gpu else 1
    lightning = LightningModel(
        graph,
        optim=optim,
        schedule=schedule,
        max_steps=training.max_steps,
        clip=training.clip,
        watch=watch,
        evaluation=measured,
    )
    if training.compile:
        graph.compile()
    return lightning


def _checkpoints(folder: Path, training: Training) -> Checkpoints:
    return Checkpoints(
        folder / "checkpoints",
        every=training.checkpoint_every,
        valid_every=training.valid_every,
        max_minutes=training.max_minutes,
        keep=training.keep_checkpoints,
    )


class _Windows:
    """Windows of ``accumulate`` batches; each carries the state of the loader, since Lightning fetches ahead."""

    def __init__(self, loader: Loader, accumulate: int) -> None:
        self.loader, self.accumulate = loader, accumulate

    def __iter__(self) -> Iterator[Window]:
        stream = iter(self.loader)
        while True:
            batches = [next(stream) for _ in range(self.accumulate)]
            yield Window(batches, self.loader.state_dict())


def _trainer(training: Training, folder: Path, callbacks: list[Callback], on_gpu: bool) -> pl.Trainer:
    background = on_gpu if training.background_checkpoints is None else training.background_checkpoints
    precision: Any = "32-true" if training.precision == 32 else training.precision
    return pl.Trainer(
        max_steps=training.max_steps,
        accelerator=training.accelerator,
        devices=training.devices,
        num_nodes=training.num_nodes,
        strategy=training.strategy,
        precision=precision,
        val_check_interval=training.valid_every,
        check_val_every_n_epoch=None,
        callbacks=callbacks,
        logger=_loggers(training, folder),
        plugins=[AtomicCheckpoints(background=background)],
        default_root_dir=folder,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=training.max_steps + 1,
    )


def _loggers(training: Training, folder: Path) -> list[Any]:
    made: list[Any] = []
    for name in training.loggers:
        if name == "tensorboard":
            from pytorch_lightning.loggers import TensorBoardLogger

            made.append(TensorBoardLogger(folder, name="", version="tensorboard"))
        elif name == "wandb":
            from pytorch_lightning.loggers import WandbLogger

            made.append(WandbLogger(name=folder.name, save_dir=folder))
        else:
            from pytorch_lightning.loggers import MLFlowLogger

            made.append(MLFlowLogger(experiment_name="nemolet", run_name=folder.name, save_dir=str(folder / "mlruns")))
    return made


def _recorder(
    graph: NeuralModule, data: Prepared, folder: Path, metrics: Sequence[str], training: Training, on_gpu: bool
) -> Recorder:
    batch = next(iter(data.valid_loader(max_batches=1)))
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.float32 if training.precision == 32 else torch.bfloat16
    needed = {name: tensor[:1] for name, tensor in batch.items() if not graph.input_ports[name].optional}
    flops = flops_per_entry(graph, needed)
    return Recorder(
        folder / "metrics.csv",
        every=training.log_every,
        unit=data.unit,
        metrics=metrics,
        derived=data.derived,
        mfu=None if flops is None else flops * data.unit.size / peak_flops(device, dtype),
        show=training.progress,
    )


def _quiet() -> None:
    """Keep advice meant for other loops off the screen."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for text in (
        ".*does not have many workers.*",
        ".*resuming from a checkpoint that ended.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*ModelCheckpoint.*",
        ".*lr_scheduler.step.*",
        ".*sync_dist=True.*",
        ".*no .val_dataloader.*",
    ):
        warnings.filterwarnings("ignore", text)


# What may change between two parts of one run: how long, and what is shown.
_FREE = {
    "trainer": {
        "max_minutes",
        "progress",
        "loggers",
        "log_every",
        "keep_checkpoints",
        "checkpoint_every",
        "background_checkpoints",
        "devices",
        "num_nodes",
        "strategy",
        "accelerator",
        "watch",
        "valid_batches",
        "patience",
    },
    "data": {"workers", "cache"},
    "sample": None,
    "name": None,
    "folder": None,
    "imports": None,
}


def _claim(folder: Path, config: dict[str, Any]) -> None:
    """Write the config into a new folder, or see that the folder belongs to the same run."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    remove_remains(folder / "checkpoints")
    path = folder / "config.yaml"
    if path.exists() and (folder / "checkpoints" / LAST).exists():
        before = yaml.safe_load(path.read_text()) or {}
        changes = [f"{name}: {old} -> {new}" for name, old, new in _differences(_relevant(before), _relevant(config))]
        if changes:
            raise TrainingError(
                "the folder belongs to another run",
                where=str(folder),
                expected="the config it was started with",
                found="\n".join(changes[:10]),
                fix="choose another name=..., or remove the folder",
            )
    text = yaml.safe_dump(config, sort_keys=False)
    partial = folder / ".config.partial"
    partial.write_text(text)
    partial.replace(path)
    (folder / "git.txt").write_text(_git_state())


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in config.items():
        free = _FREE.get(name, set())
        if free is not None:
            kept[name] = {k: v for k, v in value.items() if k not in free} if isinstance(value, dict) else value
    return kept


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new


def _git_state() -> str:
    """Commit and changes of the source, where it is a checkout."""
    here = Path(__file__).parent
    try:
        runs = [
            subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout
            for a in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        ]
    except (OSError, subprocess.SubprocessError):
        return "not a checkout\n"
    return "".join(runs)


def _card(
    model: NeuralModule, data: Prepared, lightning: LightningModel, valid: Mapping[str, float], training: Training
) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    tokenizer = data.tokenizer
    seen = data.unit.count(lightning.entries_seen)
    lines = [
        f"parameters: {parameters:,}",
        *([] if tokenizer is None else [f"vocabulary: {tokenizer.vocab_size:,} ({tokenizer.kind})"]),
        f"trained on: {data.summary}; {seen:,.0f} {data.unit.name} in {training.max_steps:,} steps, "
        f"precision {training.precision}",
        f"at the end: {spoken(valid)}",
    ]
    listed = "\n".join(f"- {line}" for line in lines)
    return (
        f"# {type(model).__name__}\n\n{listed}\n\n"
        "The model does what its training data shows. It was not tested for anything else.\n"
    )
