"""A training run in which one rank dies; started by the tests of failures on every rank, as a
script or as a function.

``python victim.py folder poem rank when``: ``when`` is ``never``, ``start``, ``training``, ``once`` (in training,
but not when torchrun has started it again), ``leave`` (in training, together with what started it), ``saving``,
``naming`` (a checkpoint that is written), ``reading`` (one, to go on), ``validating``, ``ending`` or ``error``.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

STEPS, EVERY, FATAL = 8, 2, 5  # it dies in step 5, or while it saves after step 6


def die(folder: str) -> None:
    Path(folder).with_name("died").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, poem: str, rank: str, when: str) -> None:
    own = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    when = when if own == rank else "never"
    if when == "once":
        when = "training" if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else "never"
    if when == "start":
        die(folder)
    train(folder, poem, when)


def fate(folder: str, when: str):
    """What happens to this rank in training."""
    import pytorch_lightning as pl
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    from nemolet.parallel import checkpoint

    class Fate(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, index) -> None:
            if trainer.global_step != FATAL:
                return
            if when == "leave":
                os.kill(os.getppid(), signal.SIGKILL)
            if when in ("training", "leave"):
                die(folder)
            if when == "error":
                raise ValueError("this rank has had enough")
            if when == "saving":
                FileSystemWriter.write_data = lambda *unused: die(folder)  # type: ignore[method-assign]
            if when == "naming":
                checkpoint._complete = lambda *unused: die(folder)

        def on_validation_start(self, *unused) -> None:
            if when == "validating":
                die(folder)

        def on_fit_end(self, *unused) -> None:
            if when == "ending":
                die(folder)

    if when == "reading":
        checkpoint.ShardReader.read = lambda *unused: die(folder)  # type: ignore[method-assign]
    return Fate()


def train(folder: str, poem: str, when: str) -> None:
    import torch

    import nemolet as nl
    from nemolet.data import Corpus, TokenizerSpec
    from nemolet.parallel.settings import Parallel
    from nemolet.training import Optim, Schedule, Training, fit

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
        callbacks=[fate(folder, when)],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
