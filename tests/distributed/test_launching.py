"""Who starts ranks, and what they print."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

from nemolet.cli import main
from nemolet.errors import ParallelError
from nemolet.training.launching import ranks_started, requeue

TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}
SLURM = {"SLURM_NTASKS": "16", "SLURM_NNODES": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TORCHRUN, (4, 2)),
        (SLURM, (8, 2)),
        (SLURM | TORCHRUN, (4, 2)),  # torchrun inside a job of SLURM
        (SLURM | {"SLURM_JOB_NAME": "bash"}, None),  # a shell on a cluster
        ({"LOCAL_RANK": "1"}, None),
    ],
)
def test_whoever_started_the_ranks_says_how_many(environment, expected):
    assert ranks_started(environment) == expected


def test_machines_with_different_numbers_of_ranks_are_refused():
    with pytest.raises(ParallelError, match="same number of ranks"):
        ranks_started(TORCHRUN | {"WORLD_SIZE": "7"})


def test_a_job_of_slurm_is_started_again(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not requeue()
    tool = tmp_path / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert requeue()
    assert (tmp_path / "called").read_text() == "requeue 77\n"
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert not requeue()
    assert "does not start job 77 again" in capsys.readouterr().err


LOG = """
import pathlib, sys
from nemolet.training.launching import RankLog
log = RankLog(pathlib.Path(sys.argv[1]))
log.open(int(sys.argv[2]))
print("out")
print("err", file=sys.stderr)
"""


def test_every_rank_has_a_log_and_the_first_the_screen(tmp_path):
    words, pipes = [sys.executable, "-c", LOG, str(tmp_path)], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    running = [subprocess.Popen([*words, rank], text=True, **pipes) for rank in ("0", "1")]
    shown = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert [("out" in text, "err" in text) for text in shown] == [(True, True), (False, False)]
    for rank in (0, 1):
        text = (tmp_path / f"rank_{rank}.log").read_text()
        assert "out" in text and "err" in text


def test_jobs_of_slurm_are_composed_where_their_launcher_is_installed(capsys):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    assert main(["train", "hydra/launcher=slurm", "hydra.launcher.nodes=2", "--cfg", "hydra"]) == 0
    launcher = yaml.safe_load(capsys.readouterr().out)["hydra"]["launcher"]
    assert launcher["_target_"].endswith("SlurmLauncher")
    assert (launcher["nodes"], launcher["timeout_min"], launcher["max_num_timeout"]) == (2, 720, 100)
