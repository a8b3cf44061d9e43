"""A conversion needs memory for a few tensors, not for a model: measured by the system, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nemolet as nl
from nemolet.convert import write

MIB = 1 << 20
SHARD = 8 * MIB
MEASURE = """
import sys
from nemolet.convert import convert

def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

small, source, target, shard = sys.argv[1:]
convert(small, target + ".warm.nemolet")  # all that is imported and kept
convert(target + ".warm.nemolet", target + ".warm")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = memory("VmRSS")
convert(source, target, shard_bytes=int(shard))
print(memory("VmHWM") - before)
"""


def folder(path: Path, layers: int) -> Path:
    torch.manual_seed(0)
    model = nl.language.CausalLM(vocab_size=500, layers=layers, width=256, heads=4, context=64, tied=False)
    return write(path, model=model, shard_bytes=SHARD)


def peak(small: Path, source: Path, target: Path) -> int:
    """Bytes by which a process grows at most while it converts."""
    command = [sys.executable, "-c", MEASURE, *map(str, (small, source, target, SHARD))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell peaks of memory")
def test_a_conversion_holds_a_shard_and_a_tensor_at_most(tmp_path):
    """Both ways, with wide margins: a model of 130 MiB, less than 40 MiB for its shards of 8 MiB."""
    small, large = folder(tmp_path / "small", 1), folder(tmp_path / "large", 40)
    whole = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert whole > 120 * MIB and len(list(large.glob("*.safetensors"))) > 10
    limit = SHARD + 32 * MIB
    there = peak(small, large, tmp_path / "m.nemolet")
    back = peak(small, tmp_path / "m.nemolet", tmp_path / "back")
    print(f"{whole / MIB:.0f} MiB: {there / MIB:.1f} MiB there, {back / MIB:.1f} MiB back")
    assert there < limit and back < limit
    for file in large.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
