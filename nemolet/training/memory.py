"""Memory of the host that one step frees and the next one needs again."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next one, instead of fetching it again page by page.

    glibc raises these thresholds itself when it sees larger blocks freed; these are the largest values that it would
    come to. Halves of float32 do not bring it there, so that without this a step in bfloat16 pays for its memory
    anew. For the whole process; where there is no glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)
