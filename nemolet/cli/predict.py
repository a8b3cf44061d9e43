"""``nemolet predict``: answers of a task model to a file of records, in their order; a broken run goes on.

The file is read twice, a few records at a time: once to find what is wrong with it before any work, once to answer.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from nemolet.cli.archives import long_texts_as_asked, opened, search_as_asked
from nemolet.errors import ConfigError, DataError, TokenizerError

if TYPE_CHECKING:
    from nemolet.archive import Archive
    from nemolet.data.records import Record

_CHUNK = 512  # records between two writes


@dataclass(frozen=True)
class Settings:
    """What to answer to what.

    Args:
        archive: a ``.nemolet`` file or a Hugging Face folder with a task model, or an encoder-decoder.
        input: JSON lines, a ``.csv`` or ``.tsv`` table, or a ``.txt`` file with one text in a line; compressed or not.
        out: JSON lines with the answers, in the order of the input.
        beam: hypotheses that a translator searches, 1 being greedy; null for as many as its archive says.
        length_penalty: of that search, 0 favouring short texts; null likewise.
        max_length: most tokens that it writes; null likewise.
        with_adapter: a folder with an adapter of nemolet or PEFT for that model; null for none.
        too_long: what happens to a text that is longer than the model's context: an error, truncate to its beginning,
            or window for answers from parts of it; null for an error.
        device: where to compute.
        imports: modules of yours that register classes which the archive names.
    """

    archive: str
    input: str
    out: str
    beam: int | None = None
    length_penalty: float | None = None
    max_length: int | None = None
    with_adapter: str | None = None
    too_long: Literal["error", "truncate", "window"] | None = None
    device: str = "cpu"
    imports: list[str] | None = None

    CONFIG_RULES = (
        ("beam >= 1", "beam is at least 1"),
        ("length_penalty >= 0", "length_penalty is at least 0"),
        ("max_length >= 1", "max_length is at least 1"),
    )


def run(settings: Settings) -> None:
    """Write one answer for each record; what an earlier run has written is kept."""
    from nemolet.language.translation import in_use

    archive = opened(settings.archive, device=settings.device, adapter=settings.with_adapter)
    model: Any = in_use(archive.model)
    if archive.tokenizer is None or not hasattr(model, "predict"):
        raise ConfigError(
            "the archive holds no task model with its tokenizer",
            where=settings.archive,
            expected="for example a nemolet.language.TextClassifier",
            found=type(model).__name__,
            fix="use nemolet generate for language models; nemolet finetune task=... puts a head on an encoder",
        )
    search_as_asked(model, size=settings.beam, length_penalty=settings.length_penalty, max_length=settings.max_length)
    long_texts_as_asked(model, settings.too_long)
    out = Path(settings.out)
    if out.is_dir():
        raise ConfigError(
            "the answers need a file", where="out", expected="the name of a file", found=f"a folder: {out}"
        )
    partial = _Partial(out, _identity(archive, model, settings))
    total = sum(1 for _ in _records(settings.input, model.READS))
    with partial.opened() as (file, done):
        bar = _bar(total, done)
        records = itertools.islice(_records(settings.input, model.READS), done, None)
        while chunk := list(itertools.islice(records, _CHUNK)):
            for (_, record), answer in zip(chunk, _answers(model, archive.tokenizer, chunk), strict=True):
                kept = {"id": record["id"]} if "id" in record else {}
                file.write(json.dumps({**kept, **answer}, ensure_ascii=False) + "\n")
            file.flush()
            bar(len(chunk))
        partial.finish()
    resumed = f", {done:,} of them from an earlier run" if done else ""
    print(f"{total:,} answers{resumed}: {out}")


def _answers(model: Any, tokenizer: Any, records: list[Record]) -> list[dict[str, Any]]:
    """Answers to records; where one is bad, the error names its line."""
    try:
        answers: list[dict[str, Any]] = model.predict(tokenizer, [record.values for record in records])
    except (DataError, TokenizerError):
        for where, values in records:
            try:
                model.predict(tokenizer, [values])
            except (DataError, TokenizerError) as error:
                raise type(error)(
                    error.what, where=where, expected=error.expected, found=error.found, fix=error.fix
                ) from error
        raise
    return answers


class _Partial:
    """Answers that are not all there yet, and what they are answers to."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out, self.identity = out, identity
        self.path = out.with_name(f".{out.name}.partial")
        self.about = out.with_name(f".{out.name}.about")

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[TextIO, int]]:
        """The file to go on writing, which no other process has, and how many answers it holds.

        Raises:
            DataError: where another process writes it.
        """
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if not self._is_mine(file):
                raise DataError(
                    "another process writes these answers", where=str(self.out), fix="wait for it, or set another out"
                )
            known = self._known()
            if known != self.identity:
                self._begin(file, known)
            yield file, self._whole_lines(file)

    def finish(self) -> None:
        """Give the answers their name."""
        self.path.replace(self.out)
        self.about.unlink(missing_ok=True)

    def _is_mine(self, file: TextIO) -> bool:
        """Whether no other process has the file, or has given it its name since it was opened."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except (BlockingIOError, FileNotFoundError):
            return False

    def _known(self) -> Any:
        try:
            return json.loads(self.about.read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def _begin(self, file: TextIO, known: Any) -> None:
        """Drop what is there, and then say what the answers will belong to: never the other way round."""
        if os.fstat(file.fileno()).st_size:
            others = known if isinstance(known, dict) else {}
            changed = [name for name, value in self.identity.items() if others.get(name) != value]
            print(f"starting again: the answers so far have another {', '.join(changed)}")
        file.truncate(0)
        new = self.about.with_name(f"{self.about.name}.new")
        new.write_text(json.dumps(self.identity))
        new.replace(self.about)

    def _whole_lines(self, file: TextIO) -> int:
        """How many answers there are; half a line is cut off."""
        whole = count = 0
        with self.path.open("rb") as reader:
            for line in reader:
                if line.endswith(b"\n"):
                    whole, count = whole + len(line), count + 1
        file.truncate(whole)
        return count


def _identity(archive: Archive, model: Any, settings: Settings) -> dict[str, Any]:
    """All that answers depend on, each once: the model by its weights, config and manner, the input by its content."""
    config = json.dumps(archive.model.config(), sort_keys=True, default=str)
    return {
        "model": [archive.model.came_from, hashlib.sha256(config.encode()).hexdigest()],
        "tokenizer": archive.tokenizer.fingerprint if archive.tokenizer else None,
        "input": _digest(settings.input),
        "search": repr(getattr(model, "beam", None)),
        "too_long": getattr(model, "too_long", None),
        "device": settings.device,
    }


def _digest(path: str) -> str:
    from nemolet.data.records import lines

    next(lines(path))  # or say what is wrong with the file
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _records(path: str, reads: tuple[tuple[str, ...], ...]) -> Iterator[Record]:
    """The records of a file, each of which holds what the model reads.

    Raises:
        DataError: naming file and line.
    """
    from nemolet.data.records import Record, ending, lines, read_records

    if ending(path) == ".txt":
        found: Iterable[tuple[str, Mapping[str, Any]]] = ((f"{path}:{n}", {"text": line}) for n, line in lines(path))
    else:
        found = read_records(path, {})
    for where, values in found:
        if not any(all(_is_there(values.get(key)) for key in keys) for keys in reads):
            raise DataError(
                "the record lacks what the model reads",
                where=where,
                expected=" or ".join(" and ".join(keys) for keys in reads),
                found=", ".join(f"{k}: {v!r:.40}" for k, v in itertools.islice(values.items(), 5)) or "nothing",
            )
        yield Record(where, values)


def _is_there(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, list) and bool(value)


def _bar(total: int, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(desc="predict", total=total, initial=done, leave=False, mininterval=0.5, disable=None).update
