"""A rank that dies ends the run soon and with its name; the last checkpoint is whole, and the run goes on there."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemolet.parallel.checkpoint import ShardReader

VICTIM = Path(__file__).parent / "victim.py"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
LIMIT = 180.0  # 60 where nothing else runs; without the watch it would be the half hour of an exchange


def command(launcher, folder, poem, rank, when):
    extra = TORCHRUN if launcher == "torchrun" else []
    extra = [*extra, "--max-restarts=1"] if when == "once" else extra
    return [sys.executable, *extra, str(VICTIM), str(folder), str(poem), str(rank), when]


def start(*arguments):
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def end(process, limit=400.0):
    text, _ = process.communicate(timeout=limit)
    return process.returncode, text


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]


@pytest.fixture(scope="module")
def unbroken(poem, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    status, text = end(start("torchrun", folder, poem, 0, "never"))
    assert status == 0, text
    return losses(folder)


@pytest.mark.parametrize(
    ("launcher", "rank", "when"),
    [
        ("torchrun", 1, "start"),
        ("torchrun", 0, "saving"),
        ("lightning", 1, "training"),
        ("lightning", 1, "start"),
    ],
)
def test_a_killed_rank_ends_the_run(launcher, rank, when, poem, unbroken, tmp_path):
    folder = tmp_path / "run"
    status, text = end(start(launcher, folder, poem, rank, when))
    assert status != 0
    assert time.time() - (tmp_path / "died").stat().st_mtime < LIMIT
    assert "SIGKILL" in text and (f"rank {rank}" in text or f"rank      : {rank}" in text), text
    last = folder / "checkpoints" / "last"
    if when == "start":
        assert not last.exists()
        return
    assert ShardReader(last.resolve()).rest()["global_step"] == 4
    assert when != "saving" or (folder / "checkpoints" / ".step_00000006.ckpt.partial").is_dir()
    if launcher == "lightning":
        return  # it left the same checkpoint as under torchrun
    status, text = end(start("torchrun", folder, poem, rank, "never"))
    assert status == 0, text
    assert losses(folder) == unbroken
    assert not list((folder / "checkpoints").glob(".*"))


def test_torchrun_starts_a_lost_run_again_where_it_was(poem, unbroken, tmp_path):
    folder = tmp_path / "run"
    status, text = end(start("torchrun", folder, poem, 1, "once"))
    assert status == 0, text
    assert (tmp_path / "died").exists()
    assert losses(folder) == unbroken
    assert (folder / "model.nemolet").exists()


def test_a_rank_that_fails_shows_its_own_traceback_first(poem, tmp_path):
    status, text = end(start("lightning", tmp_path / "run", poem, 1, "error"))
    assert status != 0
    first = text.index("Traceback")
    assert "rank 1 failed" in text[:first] and "this rank has had enough" in text[first:]
    log = (tmp_path / "run" / "logs" / "rank_1.log").read_text()
    assert "this rank has had enough" in log
