"""Checkpoints that are whole or absent, written while training goes on where that costs no memory it needs."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_only

from nemolet.errors import TrainingError
from nemolet.training.lightning_model import LightningModel

LAST, BEST = "last", "best"
STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # of clusters before they take a machine away, and Ctrl-C


@runtime_checkable
class Waits(Protocol):
    """What writes checkpoints while training goes on."""

    def wait(self) -> None:
        """Until the last one is on the disk; raises what went wrong there."""
        ...


class AtomicCheckpoints(CheckpointIO):
    """Writes checkpoints; each appears under its name only when it is complete (final).

    ``last`` is moved to a checkpoint after it is on the disk, so it always points to a whole one.

    Args:
        background: copy the state and write the copy in a thread while training goes on. The copy lies in the memory
            of the host: free for a model on a GPU, twice the memory for one on the CPU.
    """

    def __init__(self, *, background: bool) -> None:
        self.background = background
        self._pool: ThreadPoolExecutor | None = None  # made when needed: trainers are copied between processes
        self._writing: Future[None] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write the state, or start to."""
        self.wait()
        if not self.background:
            _write(checkpoint, Path(path))
            return
        self._pool = self._pool or ThreadPoolExecutor(1, "checkpoint")
        self._writing = self._pool.submit(_write, _copied(checkpoint, {}), Path(path))

    def wait(self) -> None:
        """Until the last one is on the disk; raises what went wrong there."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: Any = None
    ) -> dict[str, Any]:
        """Read a checkpoint; nothing in it is executed."""
        return load_file(Path(path), map_location=map_location)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        """Finish writing."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def load_file(path: Path, *, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is executed.

    Raises:
        TrainingError: for a file that is none, or is cut off.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)  # type: ignore[no-any-return]
    except Exception as error:  # a broken file raises anything; kept as the cause
        raise TrainingError(
            "the checkpoint cannot be read",
            where=str(path),
            found=str(error).splitlines()[0],
            fix=f"point {path.parent / LAST} to an older one, or train under another name",
        ) from error


def _copied(value: Any, known: dict[Any, torch.Tensor]) -> Any:
    """A copy that training no longer changes; what lay in the same memory, as tied weights do, does so again."""
    if isinstance(value, torch.Tensor):
        place = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else id(value)
        if place not in known:
            known[place] = value.detach().to("cpu", copy=True)
        return known[place]
    if isinstance(value, dict):
        return {key: _copied(item, known) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, known) for item in value) if not hasattr(value, "_fields") else value
    return value


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        point(path.parent / LAST, path)
    except OSError as error:
        raise TrainingError(
            "the checkpoint cannot be written",
            where=str(path),
            found=error.strerror,
            fix="free space; the checkpoint before it is whole, and the same command goes on from there",
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def point(link: Path, target: Path) -> None:
    """Move a link to a checkpoint beside it, in one step."""
    partial = link.with_name(f".{link.name}.link")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target.name)
    partial.replace(link)


class Checkpoints(pl.Callback):
    """Saves at intervals, at a signal and at a time limit; keeps the last and the best (final).

    Args:
        folder: where checkpoints lie.
        every: steps between two of them.
        valid_every: steps between two validations.
        max_minutes: save and stop after so long; None for no limit.
        keep: how many of the latest are kept, beside the best.
    """

    def __init__(
        self, folder: Path, *, every: int, valid_every: int, max_minutes: float | None = None, keep: int = 1
    ) -> None:
        self.folder, self.every, self.valid_every, self.keep = folder, every, valid_every, keep
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.best: float | None = None
        self.best_step = -1
        self._saved = -1  # the step of the last checkpoint
        self.stopped: str | None = None  # why training ended early
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Late enough to replace Lightning's own handler, which would end the process without a checkpoint.
        if threading.current_thread() is threading.main_thread():  # the only one that may listen
            self._before = {number: signal.signal(number, self._on_signal) for number in STOP}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopped = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            os.write(2, b"stopping after this step; Ctrl-C once more ends at once, without a checkpoint\n")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: Any) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.stopped = "the time limit"
        stopping = self.stopped is not None
        if trainer.world_size > 1:  # ranks stop together, whichever was told to
            stopping = bool(trainer.strategy.reduce_boolean_decision(stopping, all=False))
        # Where a validation follows, the checkpoint waits for it, so that what callbacks learn from it is not lost.
        validates = trainer.should_stop or trainer.global_step % self.valid_every == 0
        if stopping:
            self.stopped = self.stopped or "another rank"
            trainer.should_stop = True
        if stopping and not validates:
            trainer.limit_val_batches = 0  # it would validate out of turn, as a run that is not stopped does not
        if not validates and (stopping or trainer.global_step % self.every == 0):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        loss = float(trainer.callback_metrics["valid_loss"])
        better = math.isfinite(loss) and (self.best is None or loss < self.best)
        if better:
            self.best, self.best_step = loss, trainer.global_step
        if trainer.state.fn == TrainerFn.FITTING and (
            better or trainer.should_stop or trainer.global_step % self.every == 0
        ):
            self._save(trainer)
        if better:
            self._finish(trainer)
            if trainer.is_global_zero:
                self._point_best()
                self._clean(self._path(trainer.global_step))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._saved != trainer.global_step:
            self._save(trainer)
        self._finish(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        if self.best is not None and getattr(rank_zero_only, "rank", 0) == 0:
            self._point_best()  # the process may have ended between the checkpoint and its link

    def _point_best(self) -> None:
        path = self._path(self.best_step)
        if path.exists():
            point(self.folder / BEST, path)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.ckpt"

    def _save(self, trainer: pl.Trainer) -> None:
        module = trainer.lightning_module
        if isinstance(module, LightningModel):
            module.look()  # what is not finite does not become the last checkpoint
        path = self._path(trainer.global_step)
        trainer.save_checkpoint(path)
        self._saved = trainer.global_step  # a number that all ranks share, unlike what is on the disk
        if trainer.is_global_zero:
            self._clean(path)

    def _finish(self, trainer: pl.Trainer) -> None:
        if isinstance(trainer.strategy.checkpoint_io, Waits):
            trainer.strategy.checkpoint_io.wait()

    def _clean(self, newest: Path) -> None:
        """Remove what is neither pointed to nor among the latest."""
        links = {(self.folder / name).resolve() for name in (LAST, BEST)}
        old = sorted(p for p in self.folder.glob("step_*.ckpt") if p != newest)
        for path in old[: max(0, len(old) - self.keep)]:
            if path.resolve() not in links:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
