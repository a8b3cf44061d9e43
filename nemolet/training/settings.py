"""How long, how precisely and how carefully to train, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from nemolet.errors import TrainingError
from nemolet.rules import Checked


@dataclass(frozen=True)
class Training(Checked):
    """How long, how precisely and how carefully to train.

    Args:
        max_steps: optimizer steps.
        accumulate: micro-batches per step, on each copy of the model.
        batches_per_step: micro-batches per step on all copies together, so that a step stays the same where the number
            of ranks changes; null for ``accumulate`` on each.
        clip: largest norm of all gradients together; 0 for none.
        precision: ``32``, ``"bf16-mixed"``, or on a GPU ``"16-mixed"`` with loss scaling, or ``"fp8-mixed"``, which is
            bf16 with the products of linear layers in eight bits.
        compile: whether the graph is compiled.
        valid_every: steps between two validations.
        valid_batches: batches of a validation; None for all.
        log_every: steps between two records.
        checkpoint_every: steps between two checkpoints; at most so much is lost.
        keep_checkpoints: how many are kept beside the last and the best.
        background_checkpoints: write them while training goes on, from a copy in the memory of the host; null does so
            where the model is on a GPU.
        max_minutes: stop after so long, with a checkpoint.
        ema: decay of an average of the weights, such as 0.999; null for none.
        patience: validations without progress before training stops; null for no early stopping.
        watch: steps between two looks for numbers that are none; 0 for never.
        loggers: beside the CSV file.
        accelerator: ``"auto"``, ``"cpu"`` or ``"gpu"``.
        devices: processes on this machine, or ``"auto"``.
        num_nodes: machines.
        strategy: ``"auto"`` or ``"ddp"``, where ``parallel`` asks for nothing.
        timeout_minutes: how long a rank waits for the others in one exchange.
        archive: whose weights the archive holds: those of the ``"last"`` step, or of the ``"best"`` validation.
        progress: whether progress is shown.
    """

    max_steps: int = 1000
    accumulate: int = 1
    batches_per_step: int | None = None
    clip: float = 1.0
    precision: Literal[32, "bf16-mixed", "16-mixed", "fp8-mixed"] = 32
    compile: bool = False
    valid_every: int = 250
    valid_batches: int | None = None
    log_every: int = 10
    checkpoint_every: int = 250
    keep_checkpoints: int = 1
    background_checkpoints: bool | None = None
    max_minutes: float | None = None
    ema: float | None = None
    patience: int | None = None
    watch: int | None = None
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | Literal["auto"] = 1
    num_nodes: int = 1
    strategy: Literal["auto", "ddp"] = "auto"
    timeout_minutes: float = 30.0
    archive: Literal["last", "best"] = "last"
    progress: bool = True

    # What may change between two parts of one run: how long, where, and what is kept and shown.
    FREE: ClassVar[frozenset[str]] = frozenset(
        [
            "max_steps",
            "max_minutes",
            "valid_batches",
            "log_every",
            "keep_checkpoints",
            "checkpoint_every",
            "background_checkpoints",
            "patience",
            "watch",
            "loggers",
            "accelerator",
            "devices",
            "num_nodes",
            "strategy",
            "timeout_minutes",
            "archive",
            "progress",
        ]
    )
    CONFIG_RULES = (
        ("max_steps >= 1 and accumulate >= 1", "max_steps and accumulate are at least 1"),
        ("batches_per_step >= 1", "batches_per_step is at least 1; null for accumulate on each copy"),
        ("accumulate == 1 or batches_per_step is None", "accumulate follows from batches_per_step; set one of them"),
        ("valid_every >= 1 and log_every >= 1", "valid_every and log_every are at least 1"),
        ("checkpoint_every >= 1", "checkpoint_every is at least 1"),
        ("keep_checkpoints >= 0", "keep_checkpoints is at least 0"),
        ("num_nodes >= 1", "num_nodes is at least 1"),
        ("max_minutes >= 0", "max_minutes is at least 0; null for no limit"),
        ("watch >= 0", "watch is at least 0; 0 for never"),
        ("clip >= 0", "clip is at least 0; 0 for none"),
        ("ema > 0 and ema < 1", "ema is between 0 and 1, for example 0.999"),
        ("patience >= 1", "patience is at least 1"),
        ("timeout_minutes > 0", "timeout_minutes is above 0"),
        ("devices >= 1", "devices is at least 1, or auto"),
        ("valid_batches >= 1", "valid_batches is at least 1; null for all"),
        ("precision != '16-mixed' or accelerator != 'cpu'", "16-mixed needs a GPU; use bf16-mixed on a CPU"),
        ("precision != 'fp8-mixed' or accelerator != 'cpu'", "fp8-mixed needs a GPU; use bf16-mixed on a CPU"),
    )

    def accumulated(self, copies: int) -> int:
        """Micro-batches per step on each of so many copies.

        Raises:
            TrainingError: where they cannot be shared out evenly.

        Example:
            >>> Training(batches_per_step=8).accumulated(2)
            4
        """
        if self.batches_per_step is None:
            return self.accumulate
        if self.batches_per_step % copies:
            raise TrainingError(
                "the batches of a step cannot be shared out",
                where="trainer.batches_per_step",
                expected=f"a multiple of the {copies} copies of the model",
                found=self.batches_per_step,
                fix="change it, or the number of ranks",
            )
        return self.batches_per_step // copies

    def fixed(self) -> dict[str, Any]:
        """What a run has to go on with as it began."""
        return {name: value for name, value in asdict(self).items() if name not in self.FREE}
