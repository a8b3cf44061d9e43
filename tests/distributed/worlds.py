"""Processes that stay alive for a whole test session and run functions as the ranks of a world on gloo.

Importing torch in every process of every test would take longer than the tests. So one server imports it once,
workers are forked from it when they are first needed, and each run only makes a process group of its own.
"""

from __future__ import annotations

import datetime
import faulthandler
import functools
import gc
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "nemolet.language.models",
    "nemolet.language.losses",
    "nemolet.parallel.apply",
    "pytorch_lightning",
    "nemolet.training.experiment",
    "nemolet.training.mesh_strategy",
    "nemolet.metrics",
    "torch.profiler",
]
_GRACE = 5.0  # seconds in which the other ranks may fail too, once one has


class RemoteTraceback(Exception):
    """Where a worker failed, shown as the cause of its error."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


class Pool:
    """Up to a handful of worker processes (final); see the fixture ``ranks``."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(_PRELOAD)
        self.workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self.folder = tempfile.TemporaryDirectory()
        self.runs = 0
        self.spent: dict[str, float] = {}  # seconds of the processor, of all ranks, by file of tests

    def __call__(self, world: int, function: Callable[..., Any], *args: Any, limit: float = 300, **kwargs: Any) -> list:
        """Run a module-level function of a test file on every rank of a world; returns the results by rank.

        An error of a rank is raised here, with the traceback of the worker as its cause. Workers that do not
        end by then are killed, and made anew for the next run.
        """
        while len(self.workers) < world:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(theirs, self.folder.name), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))
        self.runs += 1
        store = f"{self.folder.name}/{self.runs}"
        path = sys.modules[function.__module__].__file__
        for rank, (_, pipe) in enumerate(self.workers[:world]):
            pipe.send((str(path), function.__module__, function.__qualname__, rank, world, store, limit, args, kwargs))
        return self._collect(world, function.__name__, limit)

    def _collect(self, world: int, name: str, limit: float) -> list:
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self.workers[:world])}
        results: list[Any] = [None] * world
        failures: dict[int, BaseException] = {}
        deadline, died = time.monotonic() + limit, False
        while waiting and (ready := wait(waiting, timeout=max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    done, value, trace, seconds = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    died = True
                    done, value, trace, seconds = False, RuntimeError(f"rank {rank} of {name} died"), "no traceback", 0
                test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0].rpartition("/")[2]
                self.spent[test] = self.spent.get(test, 0.0) + seconds
                if done:
                    results[rank] = value
                    continue
                value.__cause__ = RemoteTraceback(f"rank {rank}:\n{trace}")
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + _GRACE)
        where = self._where(sorted(waiting.values())) if waiting and not failures else ""
        if waiting or died:
            self.close()
        if failures:
            raise next(iter(failures.values()))  # the first to fail; the others only lost their connection
        if waiting:
            error = TimeoutError(f"ranks {sorted(waiting.values())} of {name} were not done after {limit:g} s")
            raise error from RemoteTraceback(where)
        return results

    def _where(self, ranks: list[int]) -> str:
        """What each of these ranks is waiting for: the stacks of all its threads."""
        processes = [self.workers[rank][0] for rank in ranks]
        for process in processes:
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1.0)
        stacks = [Path(self.folder.name, f"stacks_{process.pid}") for process in processes]
        return "\n".join(f"rank {rank}:\n{path.read_text()}" for rank, path in zip(ranks, stacks) if path.exists())

    def close(self) -> None:
        """End all workers."""
        for process, pipe in self.workers:
            process.kill()
            process.join()
            pipe.close()
        self.workers.clear()


def _serve(pipe: Connection, folder: str) -> None:
    import torch

    torch.set_num_threads(1)
    stacks = Path(folder, f"stacks_{os.getpid()}").open("w")
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    gc.freeze()  # what was imported is not looked through after every run
    here = str(Path(__file__).parent)
    if here not in sys.path:
        sys.path.insert(0, here)
    told = 0.0
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            done, value, trace = True, _run(*task), ""
        except BaseException as error:  # noqa: BLE001 - it travels to the test
            done, value, trace = False, error, traceback.format_exc()
        told, before = time.process_time(), told
        # A pipe would send each tensor as a file of its own, over a connection of its own.
        try:
            answer = pickle.dumps((done, value, trace, told - before))
        except Exception as error:  # noqa: BLE001 - what cannot travel is told by its text
            value = RuntimeError(f"{type(value).__name__}: {error if done else value}")
            answer = pickle.dumps((False, value, trace, told - before))
        pipe.send_bytes(answer)
        _leave()


def _run(path: str, module: str, name: str, rank: int, world: int, store: str, limit: float, args, kwargs) -> Any:
    import torch
    import torch.distributed as dist
    from pytorch_lightning.utilities import rank_zero_only

    if module not in sys.modules or getattr(sys.modules[module], "__file__", None) != path:
        spec = importlib.util.spec_from_file_location(module, path)
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[module] = loaded
        spec.loader.exec_module(loaded)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    rank_zero_only.rank = rank  # what Lightning would have learned, had it been imported only now
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=limit),
    )
    return getattr(sys.modules[module], name)(*args, **kwargs)


def _leave() -> None:
    """End the process group; only now, because the other ranks fail when a connection closes."""
    import torch.distributed as dist

    if dist.is_initialized():
        _forget()
        dist.destroy_process_group()
        gc.collect()
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(key, None)


def _forget() -> None:
    """Clear the memories of torch that keep the groups of a run.

    A group that is kept keeps its threads and connections, and each of these threads looks around a hundred times a
    second. After some hundred runs they would leave no time for anything else.
    """
    from torch.distributed.tensor._collective_utils import MeshTopoInfo
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
    modules = [vars(module) for name, module in list(sys.modules.items()) if name.startswith("torch.distributed.")]
    for kept in (*modules, vars(MeshTopoInfo)):
        for thing in list(kept.values()):
            function = getattr(thing, "__func__", thing)
            if isinstance(function, functools._lru_cache_wrapper):
                function.cache_clear()
        kept.get("_planner_cache", {}).clear()
