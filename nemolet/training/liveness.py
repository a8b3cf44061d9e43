"""Ranks watch each other, so that the loss of one ends the run with its name instead of a long silence."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

SCREEN = "NEMOLET_SCREEN"  # file descriptor of the screen in a process whose output goes to its log
_BEAT = 1.0  # seconds between two signs of life


class Liveness:
    """A thread that gives signs of life, and ends the process when another rank has failed or fallen silent (final).

    Each rank watches the next one, through a store of plain values that the first rank (or the launcher) keeps.
    Whoever fails, or misses its neighbour, writes that down once for all; the others read it and end.

    Args:
        patience: seconds without a sign of life after which a rank is given up.
    """

    def __init__(self, *, patience: float) -> None:
        self.rank, self.world, self.patience = dist.get_rank(), dist.get_world_size(), patience
        self._closed = threading.Event()
        self._missed = 0  # how often in a row the neighbour's process was not there
        self._store = _connect(patience)
        self._store.set(f"alive/{self.rank}", f"0 {socket.gethostname()} {os.getpid()}")
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """This rank is done; nobody has to miss it."""
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            with contextlib.suppress(RuntimeError, ConnectionError):  # the rank that keeps the store may have left
                self._store.set(f"alive/{self.rank}", "done")

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank ends; where another one failed first, end at once and say so.

        An error of the exchange itself is most often the consequence of a failure elsewhere, so it waits for the
        cause to be known.
        """
        self._closed.set()
        interrupted = isinstance(error, (SystemExit, KeyboardInterrupt))
        what = "was interrupted" if interrupted else f"failed: {type(error).__name__}: {_line(error)}"
        reason = f"rank {self.rank} {what}"
        first = reason
        with contextlib.suppress(RuntimeError, ConnectionError):
            if _of_the_exchange(error):
                self._wait_for_cause()
            first = self._store.compare_set("ended", "", reason).decode()
        if first != reason:
            _say(f"rank {self.rank} ends, since {first}")
            os._exit(1)
        _say(reason, "".join(traceback.format_exception(error)))

    def _wait_for_cause(self) -> None:
        deadline = time.monotonic() + self.patience + 5 * _BEAT
        while time.monotonic() < deadline and not self._store.check(["ended"]):
            self._look()
            time.sleep(_BEAT / 4)

    # ---------------------------------------------------------------- the thread

    def _watch(self) -> None:
        beat, self._seen, self._since = 0, "", time.monotonic()
        while not self._closed.wait(_BEAT):
            beat += 1
            try:
                self._store.set(f"alive/{self.rank}", f"{beat} {socket.gethostname()} {os.getpid()}")
                self._look()
                reason = self._store.get("ended").decode() if self._store.check(["ended"]) else None
            except (RuntimeError, ConnectionError) as error:
                reason = f"the store of the run, which rank 0 or its launcher keeps, is gone ({error})"
            if reason is not None and not self._closed.is_set():
                _say(f"rank {self.rank} ends, since {reason}")
                os._exit(1)  # the main thread may wait for the lost rank and never come back

    def _look(self) -> None:
        """See whether the neighbour lives; write down where it does not."""
        neighbour = (self.rank + 1) % self.world
        if neighbour == self.rank or not self._store.check([f"alive/{neighbour}"]):
            return
        sign = self._store.get(f"alive/{neighbour}").decode()
        if sign != self._seen or sign == "done":
            self._seen, self._since = sign, time.monotonic()
        if sign == "done":
            return
        _, host, process = sign.split()
        silent = time.monotonic() - self._since
        here = host == socket.gethostname()
        self._missed = self._missed + 1 if here and _is_gone(int(process)) else 0
        if silent > self.patience or self._missed > 1:  # whoever started it is first to say how it ended
            text = f"rank {neighbour} (process {process} on {host}) is gone, without a word"
            if silent > self.patience:
                text = f"rank {neighbour} (process {process} on {host}) has given no sign of life for {silent:.0f} s"
            self._store.compare_set("ended", "", text)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _connect(patience: float) -> PrefixStore:
    """A connection of its own: the one of the process group may wait inside an exchange."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=patience))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"nemolet/{attempt}", store)


def _of_the_exchange(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out")
    )


def _is_gone(process: int) -> bool:
    """Whether a process of this machine has ended, though perhaps nobody has asked for its status yet."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return True
    except (OSError, IndexError):
        return False
    return state == "Z"


def _say(text: str, trace: str = "") -> None:
    """On the screen, also where a rank writes to its log; Python itself prints the traceback to where stderr goes."""
    print(text, file=sys.stderr, flush=True)
    screen = os.environ.get(SCREEN)
    if screen is not None:
        os.write(int(screen), f"{text}\n{trace}".encode())
