"""Train a small model on one process or on many; the losses are the same.

python examples/train_parallel.py
torchrun --nproc-per-node 4 examples/train_parallel.py dp_shard=2 tp=2
python examples/train_parallel.py pp=2 dp_shard=2        # starts its processes itself
"""

import os
import shutil
import sys
from pathlib import Path
from tempfile import gettempdir

import pytorch_lightning as pl

import nemolet as nl
from nemolet.parallel import Parallel
from nemolet.training import Optim, Schedule, Training

BATCH = 8  # sequences of a step, on all processes together


def main(**sizes: int) -> None:
    """Train for a few seconds.

    Args:
        sizes: of the mesh, such as ``tp=2``.
    """
    parallel = Parallel(**sizes)
    mesh = parallel.sizes()
    folder = Path(gettempdir()) / "nemolet_parallel" / str(mesh).replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # a run that has ended would only tell what it came to
        shutil.rmtree(folder / "run", ignore_errors=True)
    text, mine = folder / "rain.txt", folder / f"rain.{os.getpid()}"
    mine.write_text("the rain in spain stays mainly in the plain.\n" * 400)
    mine.replace(text)  # whole at any time, whoever of the processes reads it
    shares = mesh.dp_replicate * mesh.dp_shard
    corpus = nl.data.Corpus(str(text), sequence_length=32, batch_size=BATCH // shares, cache=str(folder / "cache"))
    data = corpus.prepare(nl.data.TokenizerSpec("char"))
    pl.seed_everything(0, verbose=False)  # every process builds the same model, then keeps its part
    model = nl.language.CausalLM(vocab_size=data.tokenizer.vocab_size, layers=2, width=32, heads=4, context=32)
    result = nl.training.fit(
        model,
        nl.language.CrossEntropy(),
        data,
        folder=folder / "run",
        optim=Optim(lr=1e-2),
        schedule=Schedule(warmup_steps=5),
        training=Training(max_steps=20, valid_every=20, log_every=5, loggers=(), accelerator="cpu", devices=mesh.world),
        parallel=parallel,
    )
    if pl.utilities.rank_zero_only.rank == 0:
        print(f"{mesh}: validation loss {result.valid_loss:.6f}")


if __name__ == "__main__":
    main(**{name: int(size) for name, size in (argument.split("=") for argument in sys.argv[1:])})
