"""Records out of files that people label: tables, columns of words and tags, SQuAD, lines side by side."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nemolet.data.sources import BROKEN, open_file
from nemolet.errors import DataError, nearest

_WORDS: dict[type, str] = {str: "text", list: "a list", dict: "an object"}


class Record(NamedTuple):
    """Values by name, and the file and line they come from."""

    where: str
    values: Mapping[str, Any]


def lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, compressed or not, without their ends.

    Raises:
        DataError: for a file that is missing, broken, empty, or no UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        close = nearest(path.name, names)
        raise DataError(
            "there is no such file",
            where=str(path),
            expected="a file of examples",
            found="a folder" if path.is_dir() else "nothing",
            fix=f"did you mean {path.parent / close}?" if close else "check data.path",
        )
    number = 0
    try:
        with open_file(path) as stream:
            for number, raw in enumerate(stream, 1):
                yield number, raw.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(
            "the line is no UTF-8",
            where=f"{path}:{number}",
            expected="UTF-8 text",
            found=f"byte 0x{error.object[error.start]:02x} at {error.start}",
            fix="convert the file",
        ) from None
    except BROKEN as error:
        raise DataError("the file cannot be read", where=str(path), found=str(error), fix="copy it again") from error
    if not number:
        raise DataError("the file is empty", where=str(path), expected="examples", found="nothing")


def read_records(path: str | Path, keys: Mapping[str, type | tuple[type, ...]]) -> Iterator[Record]:
    """Records of a table: JSON lines, or below a line of names values between commas (``.csv``) or tabs (``.tsv``).

    In a ``.csv``, values in quotes may hold commas, quotes and line ends; in a ``.tsv`` a quote is a letter.

    Args:
        path: of the file, compressed or not.
        keys: what each record has to hold, and as what.

    Raises:
        DataError: naming file and line.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> _ = path.write_text('{"text": "hello", "label": "greeting"}')
        >>> [record.values["label"] for record in read_records(path, {"text": str, "label": str})]
        ['greeting']
    """
    kind = ending(path)
    for record in _separated(path, kind) if kind in _FORMS else _json(path):
        for key, types in keys.items():
            _check(record.values, key, types if isinstance(types, tuple) else (types,), record.where)
        yield record


def ending(path: str | Path) -> str:
    """How the name of a file ends, before it was compressed.

    Example:
        >>> ending("a/b.csv.gz")
        '.csv'
    """
    endings = [suffix for suffix in Path(path).suffixes if suffix not in (".gz", ".bz2", ".xz")]
    return endings[-1].lower() if endings else ""


class _Commas(csv.excel):
    strict = True


class _Tabs(csv.excel_tab):
    strict, quoting = True, csv.QUOTE_NONE


_FORMS = {".csv": _Commas, ".tsv": _Tabs}


def _separated(path: str | Path, kind: str) -> Iterator[Record]:
    def texts() -> Iterator[str]:
        for number, line in lines(path):
            yield (line.removeprefix("\ufeff") if number == 1 else line) + "\n"

    rows = csv.reader(texts(), _FORMS[kind])
    names: list[str] = []
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DataError(
                "the line cannot be read", where=f"{path}:{rows.line_num}", found=str(error), fix="repair it"
            ) from None
        if row is None:
            return
        where = f"{path}:{rows.line_num}"
        if names and row and len(row) != len(names):
            raise DataError(
                "the line has another number of values than there are names",
                where=where,
                expected=f"{len(names)}: {', '.join(names)}"[:300],
                found=f"{len(row)}: {', '.join(row)}"[:300],
                fix="put quotes around values with commas" if kind == ".csv" else "remove tabs within values",
            )
        if names and row:
            yield Record(where, dict(zip(names, row, strict=True)))
        elif row:
            names = [name.strip() for name in row]


def _json(path: str | Path) -> Iterator[Record]:
    for number, line in lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                "the line is no JSON",
                where=where,
                expected="one JSON object",
                found=str(error),
                fix="repair it, or let the name of a table say that it is one: .csv or .tsv",
            ) from None
        if "\\ud" in line.lower():  # an escape that may be half a character
            _check_surrogates(values, where)
        if not isinstance(values, dict):
            raise DataError("the line is no record", where=where, expected="a JSON object", found=type(values).__name__)
        yield Record(where, values)


def _check_surrogates(values: Any, where: str) -> None:
    text = json.dumps(values, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "a lone surrogate is not text",
            where=where,
            expected="whole characters",
            found=ascii(text[error.start]),
            fix="repair the record",
        ) from None


def _check(values: Mapping[str, Any], key: str, kinds: Sequence[type], where: str) -> None:
    if isinstance(values.get(key), tuple(kinds)):
        return
    close = nearest(key, values)
    raise DataError(
        f"the record has no {key!r}",
        where=where,
        expected=" or ".join(_WORDS.get(kind, kind.__name__) for kind in kinds) + f" in {key!r}",
        found=repr(values[key])[:60] if key in values else ", ".join(map(str, values)) or "nothing",
        fix=f"is it {close!r}? then say so in the settings of the data" if close and close != key else None,
    )


def read_columns(path: str | Path, *, word: int = 0, tag: int = 1) -> Iterator[Record]:
    """Sentences of a file with a word and its tag in every line, and an empty line between sentences.

    Lines that begin with ``#`` and hold no tab are comments.

    Args:
        path: of the file.
        word: column of the word, from 0.
        tag: column of the tag.

    Returns:
        Records with ``words`` and ``tags``.

    Raises:
        DataError: for a line with too few columns.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.conll"
        >>> _ = path.write_text("Anna\\tB-person\\nsings\\tO\\n\\nWell\\tO\\n")
        >>> [record.values["words"] for record in read_columns(path)]
        [['Anna', 'sings'], ['Well']]
    """
    words: list[str] = []
    tags: list[str] = []
    first = 1
    for number, line in lines(path):
        if line.startswith("#") and "\t" not in line:
            continue
        if not line.strip():
            if words:
                yield Record(f"{path}:{first}", {"words": words, "tags": tags})
            words, tags = [], []
            continue
        columns = line.split("\t") if "\t" in line else line.split()
        if len(columns) <= max(word, tag):
            raise DataError(
                "the line has too few columns",
                where=f"{path}:{number}",
                expected=f"a word in column {word} and a tag in column {tag}",
                found=repr(line)[:80],
                fix="set data.word_column and data.tag_column",
            )
        first = number if not words else first
        words.append(columns[word])
        tags.append(columns[tag])
    if words:
        yield Record(f"{path}:{first}", {"words": words, "tags": tags})


def read_squad(path: str | Path) -> Iterator[Record]:
    """Questions of a file in the format of SQuAD; in 2.0 some have no answer.

    Returns:
        Records with ``id, question, context, answers``; an answer has a ``text`` and a ``start``.

    Raises:
        DataError: for another format, or an answer that is not where it is said to be.
    """
    text = "\n".join(line for _, line in lines(path))
    try:
        articles = json.loads(text)["data"]
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    where = f"{path}: question {question['id']}"
                    answers = [{"text": a["text"], "start": a["answer_start"]} for a in question["answers"]]
                    _check_answers(paragraph["context"], answers, where)
                    yield Record(
                        where,
                        {
                            "id": question["id"],
                            "question": question["question"],
                            "context": paragraph["context"],
                            "answers": answers,
                        },
                    )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            "this is no SQuAD file",
            where=str(path),
            expected='{"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}',
            found=f"{type(error).__name__}: {error}"[:200],
        ) from error


def _check_answers(context: str, answers: Sequence[Mapping[str, Any]], where: str) -> None:
    for answer in answers:
        there = context[answer["start"] : answer["start"] + len(answer["text"])]
        if there != answer["text"]:
            raise DataError(
                "an answer is not where it should be",
                where=where,
                expected=repr(answer["text"]),
                found=repr(there),
                fix="correct answer_start, which counts characters",
            )


@dataclass(frozen=True)
class SideBySide:
    """Two files whose lines belong together (final).

    Args:
        source: a file with one text in a line.
        target: a file with as many lines.
    """

    source: str
    target: str

    def records(self) -> Iterator[Record]:
        """Records with ``source`` and ``target``.

        Raises:
            DataError: where one file is longer.
        """
        left, right = lines(self.source), lines(self.target)
        while True:
            pair = next(left, None), next(right, None)
            if pair == (None, None):
                return
            if pair[0] is None or pair[1] is None:
                short, long = (self.source, self.target) if pair[0] is None else (self.target, self.source)
                raise DataError(
                    "the files have different numbers of lines",
                    where=f"{long}:{(pair[0] or pair[1] or (0,))[0]}",
                    expected=f"as many lines as {short}",
                    found="more",
                    fix="name the two sides of one corpus",
                )
            yield Record(f"{self.source}:{pair[0][0]}", {"source": pair[0][1], "target": pair[1][1]})
