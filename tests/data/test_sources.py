"""Reading documents: formats, bounded pieces, and bad input named by file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc

import pytest

from nemolet.data import EmbeddedText, TextFiles
from nemolet.errors import DataError


def documents(source) -> list[str]:
    found, open_text = [], ""
    for text, last in source.pieces():
        open_text += text
        if last:
            found.append(open_text)
            open_text = ""
    assert not open_text
    return found


def test_every_format_gives_the_same_text(tmp_path):
    text = "häß\r\nzwei\n" * 9
    for name, opener in (("a.txt", open), ("a.txt.gz", gzip.open), ("a.txt.bz2", bz2.open), ("a.txt.xz", lzma.open)):
        with opener(tmp_path / name, "wb") as file:
            file.write(text.encode())
        assert documents(TextFiles([tmp_path / name])) == [text]
    for name, opener in (("b.jsonl", open), ("b.jsonl.gz", gzip.open)):
        with opener(tmp_path / name, "wb") as file:
            file.write("\n".join(json.dumps({"text": t}) for t in ("one", "zwei ß")).encode())
        assert documents(TextFiles([tmp_path / name])) == ["one", "zwei ß"]
    assert len(documents(TextFiles([tmp_path]))) == 4 + 4
    assert TextFiles([tmp_path]).total_bytes() > 0


def test_long_documents_come_in_pieces(tmp_path):
    path = tmp_path / "long.txt"
    text = "word " * 700_000 + "é" * 2_500_000  # the second half has no place to cut
    path.write_text(text)
    pieces = list(TextFiles([path]).pieces())
    assert max(len(p.text) for p in pieces) <= 1 << 20
    assert [p.last for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert "".join(p.text for p in pieces) == text
    assert pieces[0].text.endswith("word")


def test_memory_does_not_grow_with_a_single_line(tmp_path):
    path = tmp_path / "line.txt"
    with path.open("w") as file:
        for _ in range(100):
            file.write("x" * 1_000_000)
    tracemalloc.start()
    count = sum(len(p.text) for p in TextFiles([path]).pieces())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 100_000_000
    assert peak < 12_000_000


def test_embedded_text_needs_no_download():
    found = documents(EmbeddedText())
    assert sum(map(len, found)) > 2_000_000
    assert any("def " in text for text in found)
    assert (
        documents(EmbeddedText(parts=("reference",), max_bytes=50_000))
        == found[: len(documents(EmbeddedText(parts=("reference",), max_bytes=50_000)))]
    )


def test_invalid_utf8_follows_the_policy(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"one\ntwo \xff three\n")
    with pytest.raises(DataError, match=r"bad.txt:2.*no UTF-8"):
        documents(TextFiles([path]))
    assert documents(TextFiles([path], invalid_utf8="replace")) == ["one\ntwo \ufffd three\n"]
    assert documents(TextFiles([path], invalid_utf8="ignore")) == ["one\ntwo  three\n"]


def test_half_a_character_follows_the_same_policy(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "one \ud83d two \ud83d\ude00 three \udc00"}')
    assert documents(TextFiles([path], invalid_utf8="replace")) == ["one \ufffd two \U0001f600 three \ufffd"]
    assert documents(TextFiles([path], invalid_utf8="ignore")) == ["one  two \U0001f600 three "]


def test_of_a_folder_nothing_hidden_and_nothing_empty_is_read(tmp_path, caplog):
    data = tmp_path / ".hidden" / "data"  # what lies above the folder does not matter
    for name in ("a.txt", ".git/config.txt", "sub/.ipynb_checkpoints/b.md", "sub/c.md", ".d.txt", "sub/__init__.py"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text("" if name.endswith(".py") else name)
    (data / "z.txt.gz").write_bytes(gzip.compress(b""))
    assert documents(TextFiles([data])) == ["a.txt", "sub/c.md"]
    assert "2 empty files are left out" in caplog.text
    assert documents(TextFiles([data / ".d.txt"])) == [".d.txt"]  # it was named
    with pytest.raises(DataError, match="__init__.py: the file is empty"):
        documents(TextFiles([data, data / "sub/__init__.py"]))


def test_a_file_of_which_nothing_is_left_is_empty(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff" * 9)
    with pytest.raises(DataError, match="the file is empty"):
        documents(TextFiles([path], invalid_utf8="ignore"))


def test_a_character_across_blocks_survives(tmp_path):
    path = tmp_path / "a.txt"
    text = "x" * ((1 << 20) - 1) + "é" * 10
    path.write_text(text)
    assert documents(TextFiles([path])) == [text]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("empty.txt", b"", "empty.txt: the file is empty"),
        ("empty.jsonl", b"\n\n", "the file is empty"),
        ("binary.txt", b"text\nmore\0junk", r"binary.txt:2: the file looks binary"),
        ("cut.txt.gz", gzip.compress(b"long text" * 1000, mtime=0)[:50], "cannot be read"),
        ("no.txt.gz", b"no gzip", "cannot be read"),
        ("no.txt.xz", b"no xz at all", "cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a.jsonl:2: the line is no JSON"),
        ("b.jsonl", b'{"text": "a"}\n\n[1]\n', r"b.jsonl:3: the record has no text"),
        ("c.jsonl", b'{"body": "a"}\n', r"c.jsonl:1: (.|\n)*data.text_key=body"),
        ("d.jsonl", b'{"text": ""}\n', r"d.jsonl:1: the record has no text"),
        ("e.jsonl", b'{"text": 5}\n', r"e.jsonl:1: the record has no text"),
        ("f.jsonl", b'{"text": "\xff"}\n', r"f.jsonl:1: the line is no UTF-8"),
        ("g.jsonl", b"[" * 100_000, "no JSON"),
        ("h.jsonl", b'{"text": "a"}\n{"text": "b\\ud83d"}\n', r"h.jsonl:2: a lone surrogate is not text"),
        ("empty.txt.gz", gzip.compress(b""), "empty.txt.gz: the file is empty"),
        ("random.txt", bytes(range(128, 256)) * 9, "random.txt:1: the file is no UTF-8"),
        ("image.png", b"\x89PNG\r\n\x1a\n\0\0", "image.png:3: the file looks binary"),
    ],
)
def test_bad_input_is_named_by_file_and_line(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=text):
        documents(TextFiles([tmp_path / name]))


def test_a_line_too_long_for_memory_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "x" * 5000 + '"}')
    with pytest.raises(DataError, match=r"a.jsonl:1: the line is too long"):
        documents(TextFiles([path], max_line_bytes=1000))


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "data.txt").write_text("a")
    with pytest.raises(DataError, match=r"did you mean .*data.txt"):
        documents(TextFiles([tmp_path / "dta.txt"]))
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match="holds no text"):
        documents(TextFiles([tmp_path / "sub"]))
