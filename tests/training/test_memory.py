"""Memory stays with the process between two steps."""

from __future__ import annotations

import ctypes
import os
import sys
from subprocess import run

import pytest

ROUNDS = """
import resource, sys
import torch
from nemolet.training.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def step():
    small = [torch.ones(32 * 1024) for _ in range(100)]  # 12.5 MB, as a small model's activations
    large = torch.ones(10 * 1024 * 1024)  # 40 MB, as the gradient of an embedding

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_what_a_step_frees_is_there_for_the_next_one():
    first = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}  # glibc begins so
    pages = {
        mode: float(run([sys.executable, "-c", ROUNDS, mode], capture_output=True, check=True, env=first).stdout)
        for mode in ("usual", "kept")
    }
    assert pages["kept"] < 100 < 10000 < pages["usual"]  # of 13,440 that a step uses
