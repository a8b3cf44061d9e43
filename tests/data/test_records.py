"""Records come with their places, and bad files are refused with theirs."""

from __future__ import annotations

import gzip
import json

import pytest

from nemolet.data.records import SideBySide, read_columns, read_records, read_squad
from nemolet.errors import DataError


def test_json_lines_with_their_places(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert [(r.where, r.values["text"]) for r in read_records(path, {"text": str})] == [
        (f"{path}:1", "one"),
        (f"{path}:3", "two"),
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"text": "a"}\nnot json\n', r"a.jsonl:2: the line is no JSON"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', r"a.jsonl:2: a lone surrogate is not text"),
        (b'{"text": "a"}\n[1]\n', r"a.jsonl:2: the line is no record"),
        (b'{"test": "a"}\n', r"is it 'test'"),
        (b'{"text": 3}\n', r"a.jsonl:1: the record has no 'text'"),
        (b"\xff\n", r"a.jsonl:1: the line is no UTF-8"),
        (b"", r"the file is empty"),
    ],
)
def test_bad_json_lines_are_refused_with_their_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_records(path, {"text": str}))


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"did you mean .*train.jsonl"):
        list(read_records(tmp_path / "trian.jsonl", {}))


def test_columns_make_sentences(tmp_path):
    path = tmp_path / "a.iob2"
    path.write_text("# text = x\n1\tAnna\tB-PER\n2\t#1\tO\n\n\n1\tWell\tO\n")
    records = list(read_columns(path, word=1, tag=2))
    assert [r.values for r in records] == [
        {"words": ["Anna", "#1"], "tags": ["B-PER", "O"]},
        {"words": ["Well"], "tags": ["O"]},
    ]
    assert records[1].where == f"{path}:6"
    with pytest.raises(DataError, match=r"a.iob2:2: the line has too few columns"):
        list(read_columns(path, word=1, tag=3))


def test_answers_have_to_be_where_they_are_said_to_be(tmp_path):
    path = tmp_path / "a.json"

    def write(start):
        question = {"id": "q", "question": "Who?", "answers": [{"text": "Anna", "answer_start": start}]}
        path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "It was Anna.", "qas": [question]}]}]}))

    write(7)
    assert next(iter(read_squad(path))).values["answers"] == [{"text": "Anna", "start": 7}]
    write(6)
    with pytest.raises(DataError, match="question q: an answer is not where it should be"):
        list(read_squad(path))
    path.write_text("{}")
    with pytest.raises(DataError, match="no SQuAD file"):
        list(read_squad(path))


def test_files_side_by_side_have_as_many_lines(tmp_path):
    for name, text in (("a.gz", "one\ntwo\n"), ("b.gz", "eins\nzwei\n"), ("c.gz", "eins\n")):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    pairs = SideBySide(str(tmp_path / "a.gz"), str(tmp_path / "b.gz")).records()
    assert [r.values for r in pairs] == [{"source": "one", "target": "eins"}, {"source": "two", "target": "zwei"}]
    with pytest.raises(DataError, match=r"a.gz:2: the files have different numbers of lines"):
        list(SideBySide(str(tmp_path / "a.gz"), str(tmp_path / "c.gz")).records())


def test_a_damaged_file_is_named(tmp_path):
    for name, content in (
        ("a.jsonl.xz", b"no xz at all"),
        ("b.jsonl.gz", gzip.compress(b"x" * 9000)[:-20] + b"\xff" * 12),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            list(read_records(tmp_path / name, {}))


TABLES = {
    "a.csv": '\ufefftext,label\n"Yes, ""it"" is",good\n\n"two\nlines",bad\n',
    "a.tsv": 'text\tlabel\nYes, "it" is\tgood\ntwo lines\tbad\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_with_commas_and_tabs(tmp_path, name):
    (tmp_path / name).write_text(TABLES[name])
    found = list(read_records(tmp_path / name, {"text": str, "label": str}))
    second = "two\nlines" if name == "a.csv" else "two lines"
    assert [r.values for r in found] == [{"text": 'Yes, "it" is', "label": "good"}, {"text": second, "label": "bad"}]
    assert found[1].where.endswith(":5" if name == "a.csv" else ":3")


@pytest.mark.parametrize(
    "text, said",
    [
        ("text,label\nYes, it is,good\n", "another number of values"),
        ('text,label\n"Yes,good\n', "cannot be read"),
        ("sentence,label\nYes,good\n", "has no 'text'"),
    ],
)
def test_broken_tables_are_refused(tmp_path, text, said):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=said) as error:
        list(read_records(tmp_path / "a.csv", {"text": str}))
    assert "a.csv:2" in str(error.value)
