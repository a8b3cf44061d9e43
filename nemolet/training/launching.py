"""Processes of one machine: started together, each with its log, ended together when one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from nemolet.errors import ParallelError
from nemolet.training.liveness import SCREEN

LAUNCHER = "NEMOLET_LAUNCHER"  # process that started the ranks of this machine
_GRACE = 5.0  # seconds in which ranks may end by themselves, and say why, once one has failed


class Launcher(_SubprocessScriptLauncher):
    """Runs the script once for each device of this machine; the first rank is this process (final).

    When a rank fails or is killed, its name and end are shown, and the others are ended.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other ranks, then run this one."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.procs and not self.cluster_environment.creates_processes_externally:
            os.environ[LAUNCHER] = str(os.getpid())
            self._call_children_scripts()
            first = self.cluster_environment.node_rank() * self.num_processes
            ranks = {first + index: process for index, process in enumerate(self.procs, start=1)}
            threading.Thread(target=watch, args=(ranks,), name="launcher", daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


def watch(ranks: Mapping[int, subprocess.Popen[Any]]) -> None:
    """Wait until all ranks are done, or end them and this process when one fails."""
    running = dict(ranks)
    while running:
        for rank, process in list(running.items()):
            status = process.poll()
            if status is not None:
                del running[rank]
            if status:
                print(f"rank {rank} {_ending(status)}; the other ranks are ended", file=sys.stderr, flush=True)
                time.sleep(_GRACE)
                for other in running.values():
                    other.kill()
                os._exit(1)  # the main thread may wait for the lost rank and never come back
        time.sleep(0.2)


def leave_with_launcher() -> None:
    """End this rank soon after the first one, which started it, is gone: nobody else would."""
    parent = int(os.environ.get(LAUNCHER, "0"))
    if os.getppid() != parent:
        return

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(2 * _GRACE)  # the end of a run is no accident
        print("rank 0, which started this rank, is gone", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


def _ending(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


class RankLog:
    """What each rank prints, in a file of its own; the first rank prints to the screen too (final).

    Args:
        folder: of the files ``rank_0.log, rank_1.log, ...``; None for none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = False

    def open(self, rank: int) -> None:
        """Send what this process prints from now on to its file."""
        if self._open:
            return
        self._open = True
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank_{rank}.log"
        if rank == 0:
            for stream in ("stdout", "stderr"):
                setattr(sys, stream, _Tee(getattr(sys, stream), path))
            return
        screen = os.dup(2)
        os.environ[SCREEN] = str(screen)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)


class _Tee:
    """A stream of text that is also kept in a file."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream, self._file = stream, path.open("a", buffering=1)

    def write(self, text: str) -> int:
        """Write to both."""
        self._file.write(text)
        return self._stream.write(text)  # type: ignore[no-any-return]

    def flush(self) -> None:
        """Flush both."""
        self._file.flush()
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def store_of_attempt(timeout: timedelta) -> dict[str, Any]:
    """Where ranks that torchrun has started again find each other: not where their predecessors are still written down.

    Returns:
        The store for ``init_process_group``, by that name; nothing in a first attempt.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return {"store": PrefixStore(f"attempt/{attempt}", store)}


def requeue() -> bool:
    """Ask SLURM to start this job again, where it runs one; says whether it will."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60, capture_output=True, text=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"SLURM does not start job {job} again: {error}", file=sys.stderr, flush=True)
        return False
    return True


def ranks_started(environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Processes for each machine, and machines, where torchrun or SLURM has started this one; None where nobody has.

    Raises:
        ParallelError: for machines with different numbers of processes.

    Example:
        >>> ranks_started({"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"})
        (4, 2)
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        local, world = int(environment["LOCAL_WORLD_SIZE"]), int(environment["WORLD_SIZE"])
    elif "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        world, machines = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", "1"))
        local = world // machines
    else:
        return None
    if world % local:
        raise ParallelError(
            "every machine has the same number of ranks", where="launch", expected=f"a multiple of {local}", found=world
        )
    return local, world // local
