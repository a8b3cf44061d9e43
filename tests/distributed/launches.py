"""Runs that are started as by torchrun or by Lightning, in a process that has imported everything.

Importing torch and Lightning takes a process some seconds, and what the tests of failures look at comes after it. So
whatever starts the ranks is forked from the server of :mod:`worlds`; torchrun forks its ranks too, as it can.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class Launch:
    """A process that starts ranks, and what all of them print (final)."""

    def __init__(self, context: BaseContext, function: Callable[..., None], *args: Any) -> None:
        file, name = tempfile.mkstemp(prefix="launch_")
        os.close(file)
        self.output = Path(name)
        self.process = context.Process(target=_launched, args=(str(self.output), function, args))
        self.process.start()

    def end(self, limit: float = 400.0) -> tuple[int, str]:
        """Its status, and what was printed; a run that takes longer is killed with its ranks."""
        self.process.join(limit)
        text = self.output.read_text()
        if self.process.exitcode is None:
            self.close()
            raise TimeoutError(f"the run was not done after {limit:g} s:\n{text}")
        self.output.unlink()
        return self.process.exitcode, text

    def close(self) -> None:
        """Kill what still runs."""
        if self.process.exitcode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()
        self.output.unlink(missing_ok=True)


def _launched(output: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in RANK:
        os.environ.pop(name, None)
    os.environ["OMP_NUM_THREADS"] = "1"
    status = 0
    try:
        function(*args)
    except BaseException:  # noqa: BLE001 - as the interpreter ends
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def by_torchrun(words: Sequence[str], entry: Callable[..., None], args: Sequence[str]) -> None:
    """An agent of torchrun, whose ranks call a function."""
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    def rank(*args: str) -> None:
        from pytorch_lightning.utilities import rank_zero_only

        rank_zero_only.rank = int(os.environ["RANK"])  # which it learns when it is imported
        entry(*args)

    config, _, _ = config_from_args(parse_args(["--start-method=fork", *words, entry.__module__]))
    elastic_launch(config, rank)(*args)


def by_lightning(script: str, args: Sequence[str]) -> None:
    """A script that starts the other ranks itself, by the same words."""
    sys.argv = [script, *args]
    sys.modules["__main__"].__spec__ = None  # Lightning asks how this process was started
    runpy.run_path(script, run_name="__main__")
