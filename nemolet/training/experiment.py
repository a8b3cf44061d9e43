"""One training run from its parts to its folder: the training story."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only

from nemolet.archive import NAME as ARCHIVE
from nemolet.archive import described, save
from nemolet.data.prepared import Loader, Prepared, digest
from nemolet.errors import TrainingError, needs
from nemolet.module import NeuralModule
from nemolet.nn.adapters import departures
from nemolet.nn.prepacking import has_products
from nemolet.parallel.deferred import Deferred
from nemolet.parallel.settings import Parallel
from nemolet.training.callbacks import ExponentialAverage, Patience, Recorder, spoken
from nemolet.training.checkpoint import BEST, Checkpoints
from nemolet.training.collapse import blank_watches
from nemolet.training.curve import draw_curve
from nemolet.training.float8 import in_float8
from nemolet.training.folders import take_whole
from nemolet.training.graphs import refuse_other_types, training_graph
from nemolet.training.lightning_model import LightningModel, Window
from nemolet.training.memory import keep_freed_memory
from nemolet.training.mesh_strategy import MeshStrategy
from nemolet.training.optim import Optim
from nemolet.training.placement import placement, share_of, stored_weights
from nemolet.training.run_folder import RunFolder
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
    parallel: Parallel | None = None,
    deferred: Deferred | None = None,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    finish: Callable[[NeuralModule], NeuralModule] | None = None,
    extra: Mapping[str, bytes] | None = None,
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
        parallel: how the model is spread over devices; None for not at all.
        deferred: what the model was built in, where it has no values yet; each rank makes those that it keeps.
        seed: of what training itself draws at random.
        config: what the parts were built from, to be kept in the folder for people to read.
        callbacks: further callbacks of Lightning.
        finish: from the trained model to what goes into the archive, such as :func:`nemolet.nn.merge`.
        extra: small files that the archive carries along; see :func:`nemolet.save`.

    Raises:
        TrainingError: for a folder of another run or one that another process trains in, or numbers that are none.
        ConfigError: for a model whose class is not registered, so that no archive could be loaded.
    """
    home, training, optim = RunFolder(folder), training or Training(), optim or Optim()
    schedule = schedule or Schedule()
    identity = _identity(model, loss, data, metrics)
    identity |= {"optim": asdict(optim), "schedule": asdict(schedule), "seed": seed, "trainer": training.fixed()}
    if check_data := getattr(model, "check_data", None):  # a task model may know what it cannot learn from
        check_data(data)
    _prepare_process(training)
    rank_zero = getattr(rank_zero_only, "rank", 0) == 0
    with ExitStack() as stack:
        if rank_zero:
            stack.enter_context(home.locked())
            identity["data"] = _fingerprint(data)
            home.claim(identity)
        goal, done = home.goal(training), home.done
        if goal is None and done is not None:
            return Result(home.path, home.path / ARCHIVE, done["steps"], done["valid"], None)
        if rank_zero:
            home.describe(config or identity)
        graph = _fitting(training_graph(model, loss, fields=data.fields), model, data)
        measured = training_graph(model, loss, metrics, data.fields) if metrics else None
        stack.enter_context(_arithmetic(graph, training))
        lightning = _lightning(graph, measured, optim, schedule, training)
        goal = goal or training.max_steps
        run = _Run(home, model, data, training, tuple(metrics or ()), goal=goal, finish=finish, extra=extra)
        places = placement(training, parallel, home.path, on_gpu=_on_gpu(training), deferred=deferred)
        if deferred is not None and not isinstance(places["strategy"], MeshStrategy):
            deferred.fill(graph)
        return run.train(lightning, places, seed, [*blank_watches(metrics), *callbacks])


class _Run:
    """What accompanies the training of one model in one folder (final)."""

    def __init__(
        self,
        home: RunFolder,
        model: NeuralModule,
        data: Prepared,
        training: Training,
        metrics: Sequence[str],
        *,
        goal: int,
        finish: Callable[[NeuralModule], NeuralModule] | None,
        extra: Mapping[str, bytes] | None,
    ) -> None:
        self.home, self.model, self.data, self.training, self.metrics = home, model, data, training, metrics
        self.goal, self.finish, self.extra = goal, finish, extra
        self.average = ExponentialAverage(training.ema) if training.ema else None
        self.checkpoints = _checkpoints(home.checkpoints, training)
        self.patience = Patience(training.patience)

    def train(
        self, lightning: LightningModel, places: dict[str, Any], seed: int, callbacks: Sequence[Callback]
    ) -> Result:
        """Train to the end, or until something stops it; then write what is left behind."""
        training, data, home = self.training, self.data, self.home
        recorder = _recorder(lightning.graph, data, home.path, self.metrics, training)
        watching = [recorder, *callbacks, self.patience, self.checkpoints]  # last: they save the others
        watching = watching if self.average is None else [self.average, *watching]
        trainer = _trainer(replace(training, max_steps=self.goal), home.path, watching, places)
        share = share_of(trainer)
        lightning.loader = data.train_loader(**share)
        valid = data.valid_loader(**share, max_batches=training.valid_batches)
        pl.seed_everything(seed + share["rank"], verbose=False)
        windows = _Windows(lightning.loader, training.accumulated(share["ranks"]))
        trainer.fit(lightning, windows, valid, ckpt_path=home.last)
        if self.checkpoints.stopped is None:
            if recorder.validated != trainer.global_step:  # a step that was made the last one afterwards
                trainer.validate(lightning, valid, verbose=False)
            self._leave(trainer, lightning, recorder.valid)
        return Result(home.path, home.path / ARCHIVE, trainer.global_step, recorder.valid, self.checkpoints.stopped)

    def _leave(self, trainer: pl.Trainer, lightning: LightningModel, valid: Mapping[str, float]) -> None:
        """Archive, curve, and a note that the run is done."""
        chosen = self.home.checkpoints / BEST if self.training.archive == "best" else self.home.last
        assert chosen is not None
        if not chosen.exists():
            raise TrainingError(
                "no validation gave a number, so that no checkpoint is the best",
                where=str(chosen),
                expected="a finite validation loss",
                found=spoken(valid),
                fix="set trainer.archive=last",
            )
        weights = None
        # Where a mesh was used nobody has all weights, but the checkpoint does.
        if self.training.archive == "best" or chosen.is_dir():
            weights = stored_weights(chosen.resolve(), averaged=self.average.state_key if self.average else None)
        elif self.average is not None:
            self.average.swap(lightning)
        if trainer.is_global_zero:
            steps, precision = trainer.global_step, self.training.precision
            card = _card(self.model, self.data, lightning.entries_seen, steps, precision, valid)
            archive, tokenizer = self.home.path / ARCHIVE, self.data.tokenizer
            model = self.model
            if self.finish is not None:
                if weights is not None:
                    inner = "graph.model."
                    tied = {a.removeprefix(inner): n.removeprefix(inner) for a, n in lightning.aliases.items()}
                    take_whole(model, weights, tied)
                model, weights = self.finish(model), None
            save(archive, model=model, tokenizer=tokenizer, card=card, weights=weights, extra=self.extra)
            draw_curve(self.home.path / "metrics.csv", self.home.path / "loss.svg", title=self.home.path.name)
            early = self.patience.over and trainer.global_step < self.training.max_steps
            self.home.finish(trainer.global_step, valid, self.training, early=early)


def _identity(
    model: NeuralModule, loss: NeuralModule, data: Prepared, metrics: Mapping[str, NeuralModule] | None
) -> dict[str, Any]:
    """What tells this model and what it is trained for from others; one that cannot be saved is refused."""
    parts = {
        "model": described(model, data.tokenizer)["model"],
        "loss": loss.config(),
        "metrics": sorted(metrics or ()),
    }
    return {**parts, "weights": _origins(model), **departures(model)}


@contextmanager
def _arithmetic(graph: NeuralModule, training: Training) -> Iterator[None]:
    """While a graph is trained: the products that its precision asks for."""
    if training.precision == "bf16-mixed" and not _on_gpu(training) and not has_products(torch.bfloat16):
        rank_zero_only(print)(
            "trainer.precision=bf16-mixed: this processor has no matrix products in bfloat16; "
            "steps take many times as long as with trainer.precision=32"
        )
    if training.precision != "fp8-mixed":
        yield
        return
    with in_float8(graph) as staying:
        rank_zero_only(print)(f"linear layers that multiply in bf16: {', '.join(staying) or 'none'}")
        yield


def _fingerprint(data: Prepared) -> dict[str, Any]:
    """What tells this data from other data, wherever it lies: its identity, its tokenizer, and its first batches."""
    tokenizer = None if data.tokenizer is None else data.tokenizer.fingerprint
    first = {"training": next(iter(data.train_loader())), "validation": next(iter(data.valid_loader(max_batches=1)))}
    batches = {
        f"first_{part}_batch.{name}": f"{tuple(tensor.shape)} {digest([tensor.contiguous().numpy().tobytes()])}"
        for part, batch in first.items()
        for name, tensor in batch.items()
    }
    return {**data.identity, "tokenizer": tokenizer, **batches}


def _origins(model: NeuralModule) -> dict[str, str]:
    """Digests of the files that weights were read from, with the first part of the model that has them."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, NeuralModule) and module.came_from is not None:
            found.setdefault(module.came_from, name or "model")
    return {name: came_from for came_from, name in found.items()}


def _on_gpu(training: Training) -> bool:
    return training.accelerator != "cpu" and torch.cuda.is_available()


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
    refuse_other_types(graph, data)
    return graph


def _lightning(
    graph: NeuralModule,
    measured: NeuralModule | None,
    optim: Optim,
    schedule: Schedule,
    training: Training,
) -> LightningModel:
    """The graph that is trained, with its optimizer and schedule."""
    on_gpu = _on_gpu(training)
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
        folder,
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


def _trainer(training: Training, folder: Path, callbacks: list[Callback], places: dict[str, Any]) -> pl.Trainer:
    precision: Any = {32: "32-true", "fp8-mixed": "bf16-mixed"}.get(training.precision, training.precision)
    return pl.Trainer(
        max_steps=training.max_steps,
        **places,
        precision=precision,
        val_check_interval=training.valid_every,
        check_val_every_n_epoch=None,
        callbacks=callbacks,
        logger=_loggers(training, folder),
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

            with needs("wandb", extra="wandb"):
                import wandb  # noqa: F401
            made.append(WandbLogger(name=folder.name, save_dir=folder))
        else:
            from pytorch_lightning.loggers import MLFlowLogger

            with needs("mlflow", extra="mlflow"):
                import mlflow  # noqa: F401
            made.append(MLFlowLogger(experiment_name="nemolet", run_name=folder.name, save_dir=str(folder / "mlruns")))
    return made


def _recorder(
    graph: NeuralModule, data: Prepared, folder: Path, metrics: Sequence[str], training: Training
) -> Recorder:
    batch = next(iter(data.valid_loader(max_batches=1)))
    device = torch.device("cuda" if _on_gpu(training) else "cpu")
    dtype = torch.float32 if training.precision == 32 else torch.bfloat16
    flops = flops_per_entry(graph, {name: tensor[:1] for name, tensor in batch.items()})
    return Recorder(
        folder / "metrics.csv",
        every=training.log_every,
        unit=data.unit,
        metrics=metrics,
        derived=data.derived,
        mfu=None if flops is None else flops * data.unit.size / peak_flops(device, dtype),
        show=training.progress,
    )


def _prepare_process(training: Training) -> None:
    """Keep memory of the host that steps need again, and warnings quiet that say nothing here."""
    if not _on_gpu(training):
        keep_freed_memory()
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


def _card(
    model: NeuralModule, data: Prepared, entries: int, steps: int, precision: object, valid: Mapping[str, float]
) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    tokenizer = data.tokenizer
    seen = data.unit.count(entries)
    lines = [
        f"parameters: {parameters:,}",
        *([] if tokenizer is None else [f"vocabulary: {tokenizer.vocab_size:,} ({tokenizer.kind})"]),
        f"trained on: {data.summary}; {seen:,.0f} {data.unit.name} in {steps:,} steps, precision {precision}",
        f"at the last validation: {spoken(valid)}",
    ]
    listed = "\n".join(f"- {line}" for line in lines)
    return (
        f"# {type(model).__name__}\n\n{listed}\n\n"
        "The model does what its training data shows. It was not tested for anything else.\n"
    )
