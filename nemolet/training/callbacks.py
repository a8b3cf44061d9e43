"""What accompanies a run: an average of the weights, and the record of its numbers."""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from tqdm import tqdm

from nemolet.data.prepared import Unit
from nemolet.parallel.gradients import local
from nemolet.training.folders import names_of
from nemolet.training.lightning_model import LightningModel


class ExponentialAverage(pl.Callback):
    """A moving average of the weights, used for validation and for the archive (Polyak and Juditsky, 1992; final).

    Args:
        decay: share of the old average at each step, after the first ``1 / (1 - decay)`` steps.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}  # by the names of parameters, in parts where these are
        self._loaded: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average = {
            name: self._loaded.get(name, weight).detach().to(weight.device, copy=True)
            for name, weight in _weights(pl_module).items()
        }
        self._loaded = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: Any) -> None:
        step = trainer.global_step
        decay = min(self.decay, step / (step + 9))  # early averages forget the initial weights quickly
        averages = [local(average) for average in self.average.values()]
        torch._foreach_lerp_(averages, [local(w.detach()) for w in _weights(pl_module).values()], 1 - decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the weights of a module with their average; again to undo."""
        self.average = self.average or self._loaded  # a finished run that is opened again does not train
        for name, weight in _weights(module).items() if self.average else ():
            kept = weight.detach().clone()
            weight.copy_(self.average[name])
            self.average[name].copy_(kept)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.swap(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.swap(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["average"]


def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in names_of(module).items() if parameter.requires_grad}


class Recorder(pl.Callback):
    """Writes ``metrics.csv``, feeds the loggers and shows progress; between records it does next to nothing (final).

    Args:
        path: of the CSV file; rows of a resumed run are added.
        every: steps between two rows.
        unit: what progress is counted in.
        metrics: names that validation logs beside ``valid_loss``.
        derived: further numbers that follow from a validation loss.
        mfu: model FLOP/s utilisation at one unit per second; None leaves it out.
        show: whether progress is shown.
    """

    def __init__(
        self,
        path: Path,
        *,
        every: int,
        unit: Unit,
        metrics: Sequence[str] = (),
        derived: Callable[[float], Mapping[str, float]] = lambda loss: {},
        mfu: float | None = None,
        show: bool = True,
    ) -> None:
        self.path, self.every, self.unit, self.metrics, self.derived = path, every, unit, metrics, derived
        self.mfu_per_rate, self.show = mfu, show
        self.columns = (
            *("step", unit.name, "wall_seconds", "cpu_seconds", "train_loss", "valid_loss", *metrics, *derived(0.0)),
            *("learning_rate", "gradient_norm", f"{unit.name}_per_second", "mfu", "memory_mb"),
        )
        self.losses: list[Tensor] = []
        self.valid: dict[str, float] = {"valid_loss": math.nan}  # of the last validation
        self.validated = -1  # its step
        self.spent = (0.0, 0.0)  # wall and CPU seconds of earlier parts of the run
        self.started = (time.perf_counter(), time.process_time())
        self._bar: Any = None
        self._printed = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LightningModel)
        self.started = (time.perf_counter(), time.process_time())
        self._mark = (*self._clocks(), pl_module.entries_seen)
        self.losses = [loss.to(pl_module.device) for loss in self.losses]  # of a checkpoint, which is read on the CPU
        if trainer.is_global_zero:
            _keep_rows_before(self.path, self.columns, trainer.global_step)
            if self.show and sys.stderr.isatty():
                self._bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, unit="step", dynamic_ncols=True)

    def _clocks(self) -> tuple[float, float]:
        return (
            self.spent[0] + time.perf_counter() - self.started[0],
            self.spent[1] + time.process_time() - self.started[1],
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LightningModel)
        self.losses.append(outputs["loss"])
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True  # Lightning then validates, so that the last number is that of the last weights
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._record(trainer, pl_module)

    def _record(self, trainer: pl.Trainer, pl_module: LightningModel) -> None:
        loss = float(torch.stack(self.losses).mean())  # the only time the device is waited for
        self.losses = []
        wall, cpu = self._clocks()
        rate = self.unit.count(pl_module.entries_seen - self._mark[2]) / max(1e-9, wall - self._mark[0])
        self._mark = (wall, cpu, pl_module.entries_seen)
        norm = pl_module.gradient_norm
        row = {
            "step": trainer.global_step,
            self.unit.name: self.unit.count(pl_module.entries_seen),
            "wall_seconds": round(wall, 4),
            "cpu_seconds": round(cpu, 4),
            "train_loss": loss,
            "learning_rate": pl_module.learning_rate,
            "gradient_norm": float(norm) if norm is not None else None,
            f"{self.unit.name}_per_second": round(rate, 1),
            "mfu": None if self.mfu_per_rate is None else round(rate * self.mfu_per_rate / trainer.world_size, 4),
            "memory_mb": round(_memory(), 1),
        }
        self._write(trainer, row)
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
            self._bar.set_postfix(
                loss=f"{loss:.3f}",
                valid=f"{self.valid['valid_loss']:.3f}",
                **{f"{self.unit.name}/s": f"{rate:,.0f}"},
                mfu=row["mfu"],
                mb=int(_memory()),
            )
        elif self.show and trainer.is_global_zero and time.monotonic() - self._printed > 5:
            self._printed = time.monotonic()
            mfu = "" if row["mfu"] is None else f"  mfu {row['mfu']:.2f}"
            print(
                f"step {trainer.global_step:>6}/{trainer.max_steps}  loss {loss:.3f}  "
                f"{rate:,.0f} {self.unit.name}/s{mfu}  {_memory():.0f} MB",
                flush=True,
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, LightningModel)
        self.valid = {name: float(trainer.callback_metrics[name]) for name in ("valid_loss", *self.metrics)}
        self.valid |= self.derived(self.valid["valid_loss"])
        self.validated = trainer.global_step
        wall, cpu = self._clocks()
        row = {
            "step": trainer.global_step,
            self.unit.name: self.unit.count(pl_module.entries_seen),
            "wall_seconds": round(wall, 4),
            "cpu_seconds": round(cpu, 4),
        }
        self._write(trainer, {**row, **self.valid})
        self._mark = (*self._clocks(), pl_module.entries_seen)
        if self.show and trainer.is_global_zero:
            text = f"step {trainer.global_step:>6}/{trainer.max_steps}  {spoken(self.valid)}"
            tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def _write(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar is not None:
            self._bar.close()

    def state_dict(self) -> dict[str, Any]:
        return {
            "spent": list(self._clocks()),
            "losses": [float(loss) for loss in self.losses],
            "valid": self.valid,
            "validated": self.validated,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.spent = tuple(state_dict["spent"])
        self.losses = [torch.tensor(loss) for loss in state_dict["losses"]]
        self.valid, self.validated = state_dict["valid"], state_dict["validated"]


class Patience(pl.Callback):
    """Ends training after so many validations without progress, or one that is no number (final).

    Args:
        validations: how many; None for no end. They are counted all the same: a run may go on with other patience.
    """

    def __init__(self, validations: int | None) -> None:
        self.validations, self.waited, self.over = validations, 0, False
        self.best = math.inf

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = float(trainer.callback_metrics["valid_loss"])
        self.waited = 0 if loss < self.best else self.waited + 1
        self.best = min(self.best, loss) if math.isfinite(loss) else self.best
        if self.validations is not None and not trainer.sanity_checking:
            over = self.waited >= self.validations or not math.isfinite(loss)
            self.over = bool(trainer.strategy.reduce_boolean_decision(over, all=False))
            trainer.should_stop |= self.over

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.waited = state_dict["best"], state_dict["waited"]


def spoken(numbers: Mapping[str, float]) -> str:
    """The numbers of a validation for people.

    Example:
        >>> spoken({"valid_loss": 1.5, "bits_per_byte": 2.0})
        'validation loss 1.5000  bits per byte 2.000'
    """
    named = {name.replace("_", " "): value for name, value in numbers.items() if name != "valid_loss"}
    return "  ".join([f"validation loss {numbers['valid_loss']:.4f}", *(f"{n} {v:.3f}" for n, v in named.items())])


def _keep_rows_before(path: Path, columns: Sequence[str], step: int) -> None:
    """Drop rows after the checkpoint that training resumes from, and half a row of a killed process."""
    rows: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [
                r
                for r in csv.DictReader(file)
                if None not in r.values() and r["step"].isdigit() and int(r["step"]) <= step
            ]
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def _memory() -> float:
    """Largest memory so far in MB: of the GPU, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
