"""Memory of the host that one step frees and the next one needs again."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next one, instead of fetching it again page by page.

    By itself glibc gives large blocks back to the system: gradients of an embedding, logits, and at times all that lies
    at the end of its heap. The system then clears each page for the next step, which is an eighth of a small step's
    time. For the whole process; where there is no glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)  # no block is the system's own
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
