"""A rank that dies ends the run soon and with its name; the last checkpoint is whole, and the run goes on there."""

from __future__ import annotations

import csv
import json
import signal
import socket
import time
from pathlib import Path

import pytest
from launches import Launch, by_lightning, by_torchrun
from victim import main

from nemolet.parallel.checkpoint import ShardReader

VICTIM = Path(__file__).parent / "victim.py"
TORCHRUN = ["--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
# Seconds until the other ranks have ended: one to see it and five to say why, even where ten processes want two cores.
# Without the watch it would be the half hour of an exchange.
LIMIT = 60.0


def words_of(when):
    return [*TORCHRUN, "--max-restarts=1"] if when == "once" else TORCHRUN


@pytest.fixture(scope="module")
def start(ranks):
    """Start a run: ``start(launcher, folder, poem, rank, when)``; its ranks look for their fate in ``when``."""

    launches = []

    def start(launcher, folder, poem, rank, when):
        args = [str(folder), str(poem), str(rank), when]
        if launcher == "lightning":
            how = (by_lightning, str(VICTIM), args)
        else:
            how = (by_torchrun, words_of(when) if launcher == "torchrun" else launcher, main, args)
        launches.append(Launch(ranks.context, *how))
        return launches[-1]

    yield start
    for launch in launches:
        launch.close()


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]


@pytest.fixture(scope="module")
def unbroken(start, poem, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    status, text = start("torchrun", folder, poem, 0, "never").end()
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
def test_a_killed_rank_ends_the_run(launcher, rank, when, start, poem, unbroken, tmp_path):
    folder = tmp_path / "run"
    status, text = start(launcher, folder, poem, rank, when).end()
    assert status != 0
    lasted = time.time() - (tmp_path / "died").stat().st_mtime
    print(f"{launcher}, rank {rank} killed ({when}): the run ended after {lasted:.1f} s")
    assert lasted < LIMIT
    assert "SIGKILL" in text and (f"rank {rank}" in text or f"rank      : {rank}" in text), text
    last = folder / "checkpoints" / "last"
    if when == "start":
        assert not last.exists()
        return
    assert ShardReader(last.resolve()).rest()["global_step"] == 4
    assert when != "saving" or (folder / "checkpoints" / ".step_00000006.ckpt.partial").is_dir()
    if launcher == "lightning":
        return  # it left the same checkpoint as under torchrun
    status, text = start("torchrun", folder, poem, rank, "never").end()
    assert status == 0, text
    assert losses(folder) == unbroken
    assert not list((folder / "checkpoints").glob(".*"))


def test_a_run_that_is_killed_in_every_phase_goes_on_to_its_end(start, poem, unbroken, tmp_path):
    """One run: killed before a checkpoint got its name, while it was read, in validation, and after the last step."""
    folder = tmp_path / "run"
    for rank, when, last in [(0, "naming", 4), (1, "reading", 4), (1, "validating", 6), (1, "ending", 8)]:
        status, text = start("torchrun", folder, poem, rank, when).end()
        assert status != 0 and "SIGKILL" in text, f"{when}: {text}"
        assert ShardReader((folder / "checkpoints" / "last").resolve()).rest()["global_step"] == last, when
    status, text = start("torchrun", folder, poem, 0, "never").end()
    assert status == 0, text
    assert losses(folder) == unbroken
    assert (folder / "model.nemolet").exists() and not list((folder / "checkpoints").glob(".*"))


def test_torchrun_starts_a_lost_run_again_where_it_was(start, poem, unbroken, tmp_path):
    folder = tmp_path / "run"
    status, text = start("torchrun", folder, poem, 1, "once").end()
    assert status == 0, text
    assert (tmp_path / "died").exists()
    assert losses(folder) == unbroken
    assert (folder / "model.nemolet").exists()


def until_it_listens(port):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nobody listens at port {port}")


def test_machines_that_leave_are_done_without(start, poem, unbroken, tmp_path):
    """Two agents of torchrun as if on two machines; one is killed with its rank, and the other goes on alone."""
    folder = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = "keep_alive_interval=1,keep_alive_max_attempt=6,last_call_timeout=3,read_timeout=300"
    agent = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    agent += [f"--rdzv-endpoint=localhost:{port}", f"--rdzv-conf={settings}"]
    agents = [start(agent, folder, poem, 1, "leave")]
    until_it_listens(port)  # the first agent keeps the rendezvous and has rank 0; without it nobody goes on
    agents.append(start(agent, folder, poem, 1, "leave"))
    ends = [each.end() for each in agents]
    assert sorted(status for status, _ in ends) == [-signal.SIGKILL, 0], ends
    assert losses(folder) == pytest.approx(unbroken, rel=1e-5)  # the batch of a step is the same on one rank
    assert json.loads((folder / "done.json").read_text())["steps"] == 8


def test_a_rank_that_fails_shows_its_own_traceback_first(start, poem, tmp_path):
    status, text = start("lightning", tmp_path / "run", poem, 1, "error").end()
    assert status != 0
    first = text.index("Traceback")
    assert "rank 1 failed" in text[:first] and "this rank has had enough" in text[first:]
    log = (tmp_path / "run" / "logs" / "rank_1.log").read_text()
    assert "this rank has had enough" in log
