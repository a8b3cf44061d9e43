"""A training run in which one rank dies; started by the tests of failures as a script, on every rank.

``python victim.py folder poem rank when``: ``when`` is ``never``, ``start``, ``training``, ``once`` (in training,
but not when torchrun has started it again), ``leave`` (in training, together with what started it), ``saving``, or
``error``.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

import nemolet as nl
from nemolet.data import Corpus, TokenizerSpec
from nemolet.parallel.settings import Parallel
from nemolet.training import Optim, Schedule, Training, fit

STEPS, EVERY, FATAL = 8, 2, 5  # it dies in step 5, or while it saves after step 6


def die() -> None:
    Path(sys.argv[1]).with_name("died").touch()
    os.kill(os.getpid(), signal.SIGKILL)


class Fate(pl.Callback):
    def __init__(self, when: str) -> None:
        self.when = when

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        if trainer.global_step == FATAL and self.when in ("training", "leave"):
            if self.when == "leave":
                os.kill(os.getppid(), signal.SIGKILL)
            die()
        if trainer.global_step == FATAL and self.when == "error":
            raise ValueError("this rank has had enough")
        if trainer.global_step == FATAL and self.when == "saving":
            FileSystemWriter.write_data = lambda *unused: die()  # type: ignore[method-assign]


def main(folder: str, poem: str, rank: str, when: str) -> None:
    own = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    when = when if own == rank else "never"
    if when == "once":
        when = "training" if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else "never"
    if when == "start":
        die()
    torch.set_num_threads(1)
    cache = str(Path(folder).parent / "tokens")
    data = Corpus(path=poem, sequence_length=8, batch_size=2, cache=cache).prepare(TokenizerSpec("char"))
    torch.manual_seed(0)
    model = nl.language.CausalLM(vocab_size=data.tokenizer.vocab_size, layers=1, width=8, heads=2, context=8)
    fit(
        model,
        nl.language.CrossEntropy(),
        data,
        folder=folder,
        optim=Optim(lr=1e-2),
        schedule=Schedule(warmup_steps=1),
        training=Training(
            max_steps=STEPS,
            valid_every=STEPS,
            valid_batches=1,
            log_every=1,
            checkpoint_every=EVERY,
            loggers=(),
            progress=False,
            accelerator="cpu",
            devices=2,
            batches_per_step=2,
        ),
        parallel=Parallel(dp_shard=-1),
        callbacks=[Fate(when)],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
