"""Whatever a file holds that `save` would not have written is refused, without running any of it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import nemolet as nl
from nemolet.container import CARD, CONFIG, WEIGHTS
from nemolet.errors import ArchiveError, ConversionError
from tests.hostile_archives import HOSTILE, TOKENS, configured, make, members_of, packed


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A whole archive, which no test changes."""
    return make(tmp_path_factory.mktemp("archive") / "good.nemolet")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_and_runs_nothing(name, good, tmp_path):
    canary = tmp_path / "canary"
    path = tmp_path / "hostile.nemolet"
    path.write_bytes(HOSTILE[name](good, canary))
    before = set(tmp_path.iterdir())
    with pytest.raises(ArchiveError) as error:
        nl.load(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 4000
    assert set(tmp_path.iterdir()) == before


TOLD = {  # what is said of each class of attack: what it is, and where
    "letters that look alike": ("a member has a forbidden name", "model.yaml"),
    "tensors that overlap": ("tensors overlap", WEIGHTS),
    "shape of huge numbers": ("a shape that no tensor has", WEIGHTS),
    "tensor named twice": ("comes twice", WEIGHTS),
    "setting given twice": ("comes twice", CONFIG),
    "not a number": ("no plain number", CONFIG),
    "alias bomb": ("aliases are refused", CONFIG),
    "a hundred thousand values": ("too long", CONFIG),
    "terabytes of fixed positions": ("more tensors are made than the bound allows", "bytes"),
    "gigabytes in many modest tables": ("more tensors are made than the bound allows", "bytes"),
    "a billion layers": ("more tensors are made than the bound allows", "operations"),
    "another shape": ("the weights do not fit the model", "of another shape"),
    "zip after something else": ("this is no whole archive", "an uncompressed tar"),
    "traversal": ("a member has a forbidden name", "../evil"),
    "absolute path": ("a member has a forbidden name", "expected"),
    "duplicate": ("a member comes twice", CARD),
    "symlink": ("a member is no plain file", CARD),
    "hard link": ("a member is no plain file", "a regular file"),
    "pickle": ("a member has a forbidden name", "data.pkl"),
    "pickled weights": ("the weights cannot be read", WEIGHTS),
    "interpolation": ("interpolation is refused", "${oc.env:HOME}"),
    "target outside": ("this target is not allowed", "'os.system'"),
    "two hops": ("the config is refused", "nemolet.module.torch"),
    "wrong hash": ("the content does not match its hash", "copy it again"),
    "no end": ("this is no whole archive", "copy it again"),
    "ten terabytes": ("a member is larger than the file", "10000000000000 bytes"),
    "version 2": ("the archive is newer than this nemolet", "pip install --upgrade nemolet"),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_refusal_says_what_is_wrong_and_where(name, good, tmp_path):
    path = tmp_path / "hostile.nemolet"
    path.write_bytes(HOSTILE[name](good, tmp_path / "canary"))
    with pytest.raises(ArchiveError) as refused:
        nl.load(path)
    assert str(path) in str(refused.value)
    for words in TOLD[name]:
        assert words in str(refused.value)


def test_hostile_archives_do_not_fill_the_memory(good, tmp_path):
    """All of them in one process that may not grow by more than a gigabyte."""
    names = [
        n
        for n in HOSTILE
        if any(w in n for w in ("terabyte", "billion", "bomb", "deep", "size", "huge", "pax", "width"))
    ]
    assert len(names) > 10
    for number, name in enumerate(names):
        (tmp_path / f"{number}.nemolet").write_bytes(HOSTILE[name](good, tmp_path / "canary"))
    code = """
        import resource, sys, nemolet as nl
        nl.load(sys.argv[1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
        for path in sys.argv[2:]:
            try:
                nl.load(path)
            except nl.errors.ArchiveError as error:
                assert "MemoryError" not in str(error) and "allocate" not in str(error), error
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    files = [str(tmp_path / f"{number}.nemolet") for number in range(len(names))]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), good, *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200  # MiB


def test_the_table_is_long():
    assert len(HOSTILE) > 170


def test_what_is_packed_by_hand_is_accepted_where_it_is_right(good, tmp_path):
    path = tmp_path / "m.nemolet"
    for content in (packed(members_of(good)), configured(good)):
        path.write_bytes(content)
        assert torch.equal(nl.load(path).model(TOKENS), nl.load(good).model(TOKENS))


def test_what_is_no_file(tmp_path):
    for path in (tmp_path / "nowhere.nemolet", tmp_path / "a\0b", tmp_path / ("x" * 5000)):
        with pytest.raises(ArchiveError, match="there is no such file"):
            nl.load(path)
    with pytest.raises(ConversionError, match="no folder of a Hugging Face model"):
        nl.load(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(good, tmp_path):
    path = tmp_path / "m.nemolet"
    path.write_bytes(good.read_bytes())
    path.chmod(0)
    with pytest.raises(ArchiveError):
        nl.load(path)


def test_a_file_cut_anywhere_is_refused(good, tmp_path):
    """At each hundredth of its length, and around blocks."""
    content = good.read_bytes()
    path = tmp_path / "m.nemolet"
    marks = {0, 1, 511, 512, 513, 1023, 1024, len(content) - 1, len(content) - 512, len(content) - 1024}
    for cut in sorted(marks | {len(content) * part // 100 for part in range(100)}):
        path.write_bytes(content[:cut])
        with pytest.raises(ArchiveError):
            nl.load(path)


def test_a_flipped_bit_is_found_or_changes_nothing(good, tmp_path):
    content = good.read_bytes()
    logits = nl.load(good).model(TOKENS)
    path = tmp_path / "m.nemolet"
    generator = random.Random(2)
    refused = 0
    for _ in range(150):
        flipped = bytearray(content)
        flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        try:
            archive = nl.load(path)
        except ArchiveError:
            refused += 1
            continue
        assert torch.equal(archive.model(TOKENS), logits)
        assert archive.card == "# A card\n"
    assert refused > 140


def test_random_bytes_anywhere_raise_nothing_else(good, tmp_path):
    content = good.read_bytes()
    path = tmp_path / "m.nemolet"
    generator = random.Random(3)
    for _ in range(60):
        broken = bytearray(content)
        start = generator.randrange(len(content) - 64)
        broken[start : start + 64] = generator.randbytes(64)
        path.write_bytes(broken)
        with pytest.raises(ArchiveError):
            nl.load(path)
