"""Token files: Megatron-LM's bytes, atomic writing, refusals."""

from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
import pytest

from nemolet.data import IndexedTokens, IndexedWriter, indexed
from nemolet.errors import DataError


def write(prefix, documents, vocab_size=1000):
    with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
        for document in documents:
            writer.write(np.array(document), ends=[len(document)])


def test_bytes_are_those_of_megatron(tmp_path):
    write(tmp_path / "t", [[1, 2, 3], [4]])
    index = (tmp_path / "t.idx").read_bytes()
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)
    expected += struct.pack("<2i", 3, 1) + struct.pack("<2q", 0, 6) + struct.pack("<3q", 0, 1, 2)
    assert index == expected
    assert (tmp_path / "t.bin").read_bytes() == struct.pack("<4H", 1, 2, 3, 4)


@pytest.mark.parametrize("vocab_size", [1000, 100_000])
def test_what_is_written_is_read(tmp_path, vocab_size):
    documents = [[1, 2, 3], [vocab_size - 1] * 5, [7]]
    write(tmp_path / "t", documents, vocab_size)
    tokens = IndexedTokens(tmp_path / "t.bin")
    assert [tokens.document(i).tolist() for i in range(len(tokens))] == documents
    assert tokens.starts.tolist() == [0, 3, 8]


def megatron(prefix, sequences, firsts, *, places=None, modes=()):
    """The pair of files as Megatron-LM's IndexedDatasetBuilder writes it."""
    lengths = [len(s) for s in sequences]
    places = places if places is not None else [4 * sum(lengths[:i]) for i in range(len(lengths))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(lengths), len(firsts))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(places)}q", *places)
    index += struct.pack(f"<{len(firsts)}q", *firsts) + bytes(modes)
    prefix.with_suffix(".idx").write_bytes(index)
    prefix.with_suffix(".bin").write_bytes(b"".join(struct.pack(f"<{len(s)}i", *s) for s in sequences))
    return prefix


@pytest.mark.parametrize("modes", [(), (0, 0, 1, 0)])
def test_documents_of_several_sequences_are_whole(tmp_path, modes):
    """As ``preprocess_data.py --split-sentences`` makes them; the fourth document is empty."""
    prefix = megatron(tmp_path / "t", [[1, 2], [3], [4, 5, 6], [7]], [0, 2, 3, 4, 4], modes=modes)
    tokens = IndexedTokens(prefix)
    assert [tokens.document(i).tolist() for i in range(len(tokens))] == [[1, 2, 3], [4, 5, 6], [7], []]
    assert tokens.starts.tolist() == [0, 3, 6, 7]


def test_a_document_that_is_too_long_for_a_sequence_is_several(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "LONGEST", 3)
    documents = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11], []]
    write(tmp_path / "t", documents)
    index = (tmp_path / "t.idx").read_bytes()
    assert struct.unpack_from("<QQ", index, 18) == (6, 5)
    assert struct.unpack_from("<6i", index, 34) == (3, 3, 1, 1, 3, 0)
    assert struct.unpack_from("<5q", index, 34 + 6 * 12) == (0, 3, 4, 5, 6)
    tokens = IndexedTokens(tmp_path / "t")
    assert [tokens.document(i).tolist() for i in range(len(tokens))] == documents


@pytest.mark.parametrize(
    ("firsts", "places", "text"),
    [
        ([0, 1], None, "not made of the sequences"),
        ([1, 2], None, "not made of the sequences"),
        ([0, 2, 1, 2], None, "not made of the sequences"),
        ([], None, "not made of the sequences"),
        ([0, 2], [0, 12], "do not lie one after the other"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(tmp_path, firsts, places, text):
    with pytest.raises(DataError, match=text):
        IndexedTokens(megatron(tmp_path / "t", [[1, 2], [3]], firsts, places=places))


def test_documents_may_span_writes(tmp_path):
    with IndexedWriter(tmp_path / "t", vocab_size=10) as writer:
        writer.write(np.array([1, 2]), ends=[])
        writer.write(np.array([3, 4, 5]), ends=[1, 2])
        writer.write(np.array([6]), ends=[])
    tokens = IndexedTokens(tmp_path / "t")
    assert [tokens.document(i).tolist() for i in range(3)] == [[1, 2, 3], [4], [5, 6]]


def test_a_failure_leaves_the_old_pair_and_no_remains(tmp_path):
    write(tmp_path / "t", [[1]])
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "t", vocab_size=10) as writer:
        writer.write(np.array([2, 3]), ends=[2])
        raise RuntimeError
    assert IndexedTokens(tmp_path / "t").document(0).tolist() == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.bin", "t.idx"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    script = """
import resource, signal, sys
import numpy as np
from nemolet.data import IndexedWriter
from nemolet.errors import DataError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with IndexedWriter(sys.argv[1], vocab_size=10) as writer:
        for _ in range(100):
            writer.write(np.ones(10_000), ends=[10_000])
except DataError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path / "t")], capture_output=True, text=True)
    assert "the tokens cannot be written" in result.stdout, result.stderr
    assert "free space" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda p: (p / "t.bin").unlink(), "missing"),
        (lambda p: (p / "t.idx").write_bytes(b"junk"), "truncated"),
        (lambda p: (p / "t.idx").write_bytes(b"x" * 100), "no token index"),
        (lambda p: (p / "t.idx").write_bytes((p / "t.idx").read_bytes()[:40]), "truncated"),
        (lambda p: (p / "t.bin").write_bytes(b"\x01"), "do not match"),
        (lambda p: write(p / "t", [[]]), "no tokens"),
    ],
)
def test_damage_is_named(tmp_path, damage, text):
    write(tmp_path / "t", [[1, 2, 3], [4]])
    damage(tmp_path)
    with pytest.raises(DataError, match=text):
        IndexedTokens(tmp_path / "t")


def test_names_may_hold_dots(tmp_path):
    for number in (1, 2):
        with IndexedWriter(tmp_path / f"wiki.v{number}", vocab_size=300) as writer:
            writer.write(np.array([number]), ends=[1])
    names = ["wiki.v1.bin", "wiki.v1.idx", "wiki.v2.bin", "wiki.v2.idx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [IndexedTokens(tmp_path / name).tokens.tolist() for name in names] == [[1], [1], [2], [2]]
    assert IndexedTokens(tmp_path / "wiki.v2").tokens.tolist() == [2]
