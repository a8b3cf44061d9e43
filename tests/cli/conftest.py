"""One tiny training run through the command line, which many tests read and none changes."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import pytest

from nemolet.cli import main

TINY = [
    "tokenizer=char",
    "model=gpt_tiny",
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.context=32",
    "data.sequence_length=16",
    "data.batch_size=2",
    "data.valid_fraction=0.01",
    "trainer.max_steps=2",
    "trainer.valid_every=1",
    "trainer.valid_batches=1",
    "trainer.loggers=[]",
    "trainer.accelerator=cpu",
    "schedule.warmup_steps=1",
    "sample.max_new_tokens=5",
]


class Run(NamedTuple):
    """What a command was and what it left."""

    command: list[str]
    folder: Path
    archive: Path
    output: str


@pytest.fixture(scope="session")
def tiny_run(poem, tmp_path_factory) -> Run:
    """A model trained by ``nemolet train``."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    command = ["train", *TINY, f"data.path={poem}", f"folder={folder}"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(command) == 0
    return Run(command, folder, folder / "model.nemolet", output.getvalue())
