"""What accompanies a run: an average of the weights, and the record of its numbers."""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from tqdm import tqdm

from nemolet.training.lightning_model import LightningModel


class ExponentialAverage(pl.Callback):
    """A moving average of the weights, used for validation and for the archive (Polyak and Juditsky, 1992; final).

    Args:
        decay: share of the old average at each step, after the first ``1 / (1 - decay)`` steps.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: list[Tensor] = []
        self._loaded: list[Tensor] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights = list(_weights(pl_module))
        source = self._loaded or weights
        self.average = [s.detach().to(w.device, copy=True) for s, w in zip(source, weights)]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: Any) -> None:
        step = trainer.global_step
        decay = min(self.decay, step / (step + 9))  # early averages forget the initial weights quickly
        torch._foreach_lerp_(self.average, [w.detach() for w in _weights(pl_module)], 1 - decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the weights of a module with their average; again to undo."""
        self.average = self.average or self._loaded or []  # a finished run that is opened again does not train
        for weight, average in zip(_weights(module), self.average):
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.swap(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.swap(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["average"]


def _weights(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module.parameters() if p.requires_grad)


COLUMNS = (
    "step",
    "tokens",
    "wall_seconds",
    "cpu_seconds",
    "train_loss",
    "valid_loss",
    "bits_per_byte",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "mfu",
    "memory_mb",
)


class Recorder(pl.Callback):
    """Writes ``metrics.csv``, feeds the loggers and shows progress; between records it does next to nothing (final).

    Args:
        path: of the CSV file; rows of a resumed run are added.
        every: steps between two rows.
        bytes_per_token: of the validation text, for bits per byte; None leaves them out.
        flops_per_token: of one training step; None leaves MFU out.
        peak_flops: of the device.
        show: whether progress is shown.
    """

    def __init__(
        self,
        path: Path,
        *,
        every: int,
        bytes_per_token: float | None = None,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        show: bool = True,
    ) -> None:
        self.path, self.every, self.bytes_per_token, self.show = path, every, bytes_per_token, show
        self.mfu_per_rate = flops_per_token / peak_flops if flops_per_token and peak_flops else None
        self.losses: list[Tensor] = []
        self.valid_loss = self.first_valid = math.nan
        self.spent = (0.0, 0.0)  # wall and CPU seconds of earlier parts of the run
        self._bar: Any = None
        self._printed = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LightningModel)
        self.started = (time.perf_counter(), time.process_time())
        self._mark = (*self._clocks(), pl_module.tokens_seen)
        if trainer.is_global_zero:
            _keep_rows_before(self.path, trainer.global_step)
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
        rate = (pl_module.tokens_seen - self._mark[2]) / max(1e-9, wall - self._mark[0])
        self._mark = (wall, cpu, pl_module.tokens_seen)
        norm = pl_module.gradient_norm
        row = {
            "step": trainer.global_step,
            "tokens": pl_module.tokens_seen,
            "wall_seconds": round(wall, 4),
            "cpu_seconds": round(cpu, 4),
            "train_loss": loss,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "gradient_norm": float(norm) if norm is not None else None,
            "tokens_per_second": round(rate, 1),
            "mfu": None if self.mfu_per_rate is None else round(rate * self.mfu_per_rate / trainer.world_size, 4),
            "memory_mb": round(_memory(), 1),
        }
        self._write(trainer, row)
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
            self._bar.set_postfix(
                loss=f"{loss:.3f}",
                valid=f"{self.valid_loss:.3f}",
                tok_s=f"{rate:,.0f}",
                mfu=row["mfu"],
                mb=int(_memory()),
            )
        elif self.show and trainer.is_global_zero and time.monotonic() - self._printed > 5:
            self._printed = time.monotonic()
            mfu = "" if row["mfu"] is None else f"  mfu {row['mfu']:.2f}"
            print(
                f"step {trainer.global_step:>6}/{trainer.max_steps}  loss {loss:.3f}  {rate:,.0f} tokens/s{mfu}  "
                f"{_memory():.0f} MB",
                flush=True,
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, LightningModel)
        self.valid_loss = float(trainer.callback_metrics["valid_loss"])
        bits = None if self.bytes_per_token is None else self.valid_loss / math.log(2) / self.bytes_per_token
        wall, cpu = self._clocks()
        self._write(
            trainer,
            {
                "step": trainer.global_step,
                "tokens": pl_module.tokens_seen,
                "wall_seconds": round(wall, 4),
                "cpu_seconds": round(cpu, 4),
                "valid_loss": self.valid_loss,
                "bits_per_byte": bits,
            },
        )
        self._mark = (*self._clocks(), pl_module.tokens_seen)
        if self.show and trainer.is_global_zero:
            text = f"step {trainer.global_step:>6}/{trainer.max_steps}  validation loss {self.valid_loss:.4f}"
            text += "" if bits is None else f"  bits per byte {bits:.3f}"
            tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def _write(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
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
            "valid_loss": self.valid_loss,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.spent = tuple(state_dict["spent"])
        self.losses = [torch.tensor(loss) for loss in state_dict["losses"]]
        self.valid_loss = state_dict["valid_loss"]


def _keep_rows_before(path: Path, step: int) -> None:
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
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def _memory() -> float:
    """Largest memory so far in MB: of the GPU, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
