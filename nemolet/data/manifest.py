"""Utterances out of manifests, folders, tar shards and arrays.

A manifest is a file of JSON lines as NeMo writes it: ``audio_filepath`` (relative to the manifest), ``duration``,
``text``, ``offset``, ``speaker``, ``label``. What is wrong with an entry becomes a :class:`Problem` with its file
and line, so that a reader can list all of them, or stop at the first.
"""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemolet.data.audio import SUFFIXES, AudioArray, AudioFile, Recording
from nemolet.errors import DataError, did_you_mean

Spans = tuple[tuple[float, float], ...]  # seconds from and to


@dataclass(frozen=True)
class Utterance:
    """A recording or a part of it, and what is known about it.

    Args:
        recording: where its samples come from.
        where: the place that named it, such as a file and line.
        offset: second at which it starts; None for a whole recording.
        duration: seconds; None for all that follow.
        text: what is said.
        label: its class.
        speaker: who speaks.
        segments: when somebody speaks.
    """

    recording: Recording
    where: str
    offset: float | None = None
    duration: float | None = None
    text: str | None = None
    label: str | None = None
    speaker: str | None = None
    segments: Spans | None = None


@dataclass(frozen=True)
class Problem:
    """Why an utterance cannot be used.

    Args:
        where: the place that named it.
        what: the kind of problem; utterances are counted by it.
        found: the particulars.
    """

    where: str
    what: str
    found: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f": {self.found}" if self.found else "")


def read_audio(path: str | Path, *, text_key: str = "text", shards: str | None = None) -> list[Utterance | Problem]:
    """Everything that a path names.

    Args:
        path: a manifest (``.json``, ``.jsonl``), a folder that holds one folder for each label, or a pattern of
            tar shards, whose members ``key.flac`` go with ``key.json``, ``key.txt`` (text) or ``key.cls`` (label).
        text_key: where the text lies in an entry.
        shards: a pattern of tar shards in which the files of a manifest lie.

    Raises:
        DataError: for a path that does not exist or names no audio at all.
    """
    place = Path(path)
    if place.suffix == ".tar":
        found: list[Utterance | Problem] = list(_shard_entries(_shards(str(path)), text_key))
    elif place.is_dir():
        found = list(_folder(place))
    elif place.is_file():
        members = _members(_shards(shards)) if shards else None
        found = list(_manifest(place, text_key, members))
    else:
        names = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        raise DataError(
            "there is no such data",
            where=str(path),
            expected="a manifest of JSON lines, a folder, or .tar shards",
            found="nothing",
            fix=did_you_mean(place.name, names) or "check data.path",
        )
    if not found:
        raise DataError(
            "no audio is named here",
            where=str(path),
            expected="entries with audio_filepath, or files " + " ".join(SUFFIXES),
            found="none",
        )
    return found


def utterances_of_arrays(
    arrays: Sequence[NDArray[np.floating[Any]]],
    *,
    sample_rate: int,
    texts: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    speakers: Sequence[str] | None = None,
) -> list[Utterance]:
    """Utterances of samples in memory.

    Example:
        >>> [utterance] = utterances_of_arrays([np.zeros(800)], sample_rate=8000, labels=["none"])
        >>> utterance.where, utterance.label
        ('array 0', 'none')
    """
    return [
        Utterance(
            AudioArray(samples, sample_rate, name=f"array {index}"),
            where=f"array {index}",
            text=None if texts is None else texts[index],
            label=None if labels is None else labels[index],
            speaker=None if speakers is None else speakers[index],
        )
        for index, samples in enumerate(arrays)
    ]


def manifest_entry(utterance: Utterance, manifest: Path, duration: float) -> dict[str, Any]:
    """An entry as NeMo writes it, with the path relative to the manifest where it lies below."""
    if not isinstance(utterance.recording, AudioFile) or utterance.recording.member is not None:
        raise DataError("only files can be written to a manifest", where=utterance.where)
    path = utterance.recording.path.resolve()
    folder = manifest.resolve().parent
    entry: dict[str, Any] = {
        "audio_filepath": path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path),
        "duration": round(duration, 4),
    }
    if utterance.offset is not None:
        entry["offset"] = utterance.offset
    for name in ("text", "label", "speaker"):
        if getattr(utterance, name) is not None:
            entry[name] = getattr(utterance, name)
    if utterance.segments is not None:
        entry["segments"] = [{"start": start, "end": end} for start, end in utterance.segments]
    return entry


# --------------------------------------------------------------------------------------------------
# The kinds of places
# --------------------------------------------------------------------------------------------------


def _manifest(path: Path, text_key: str, members: Mapping[str, AudioFile] | None) -> Iterator[Utterance | Problem]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            where = f"{path}:{number}"
            if not raw.strip():
                continue
            try:
                entry = json.loads(raw.decode())
            except (ValueError, RecursionError) as error:
                yield Problem(where, "the line is no JSON", str(error))
                continue
            if not isinstance(entry, dict):
                yield Problem(where, "the line is no JSON object", type(entry).__name__)
                continue
            yield _utterance(entry, where, path.parent, text_key, members)


def _utterance(
    entry: Mapping[str, Any], where: str, folder: Path, text_key: str, members: Mapping[str, AudioFile] | None
) -> Utterance | Problem:
    name = entry.get("audio_filepath")
    if not isinstance(name, str) or not name:
        found = did_you_mean("audio_filepath", entry) or "it has " + (", ".join(entry) or "nothing")
        return Problem(where, "the field audio_filepath is missing", found)
    if members is None:
        recording = AudioFile(folder / Path(name).expanduser())
    elif name in members:
        recording = members[name]
    else:
        return Problem(where, "no shard holds this file", name)
    return _described(entry, where, recording, text_key)


def _described(entry: Mapping[str, Any], where: str, recording: Recording, text_key: str) -> Utterance | Problem:
    seconds: dict[str, float | None] = {}
    for name in ("offset", "duration"):
        value = entry.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
            return Problem(where, f"the {name} is no number of seconds", repr(value))
        if value is not None and not math.isfinite(value):
            return Problem(where, f"the {name} is no number of seconds", repr(value))
        seconds[name] = None if value is None else float(value)
    words: dict[str, str | None] = {}
    for name, key in (("text", text_key), ("label", "label"), ("speaker", "speaker")):
        value = entry.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "text":
            value = str(value)  # NeMo writes labels that are numbers as numbers
        if value is not None and not isinstance(value, str):
            return Problem(where, f"the {key} is no text", repr(value)[:60])
        words[name] = value
    segments = entry.get("segments")
    try:
        spans = None if segments is None else tuple((float(s["start"]), float(s["end"])) for s in segments)
    except (TypeError, KeyError, ValueError):
        return Problem(where, "the segments have no start and end", repr(segments)[:60])
    return Utterance(recording, where, seconds["offset"], seconds["duration"], segments=spans, **words)


def _folder(folder: Path) -> Iterator[Utterance | Problem]:
    """A file's label is the name of its folder, where that is below the given one."""
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")):
        text = path.with_suffix(".txt")
        yield Utterance(
            AudioFile(path),
            where=str(path),
            label=path.parent.name if path.parent != folder else None,
            text=text.read_text(encoding="utf-8").strip() if text.is_file() else None,
        )


def _shards(pattern: str) -> list[Path]:
    place = Path(pattern)
    found = sorted(place.parent.glob(place.name))
    if not found:
        raise DataError("no shard matches", where=pattern, expected="tar files", found="none", fix="check the pattern")
    return found


def _plain_members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """Name, place and size of the plain files of an uncompressed shard, which is never unpacked."""
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isreg():
                    yield member.name.removeprefix("./"), member.offset_data, member.size
    except tarfile.TarError as error:
        raise DataError(
            "the shard cannot be read", where=str(shard), expected="an uncompressed tar", found=str(error)
        ) from error


def _members(shards: Sequence[Path]) -> dict[str, AudioFile]:
    return {
        name: AudioFile(shard, offset, size, name) for shard in shards for name, offset, size in _plain_members(shard)
    }


def _shard_entries(shards: Sequence[Path], text_key: str) -> Iterator[Utterance | Problem]:
    for shard in shards:
        audio: dict[str, AudioFile] = {}
        notes: dict[str, dict[str, Any]] = {}
        with shard.open("rb") as stream:
            for name, offset, size in _plain_members(shard):
                path = PurePosixPath(name)
                key = str(path.with_suffix(""))
                if path.suffix.lower() in SUFFIXES:
                    audio[key] = AudioFile(shard, offset, size, name)
                elif path.suffix in (".json", ".txt", ".cls"):
                    stream.seek(offset)
                    notes.setdefault(key, {}).update(_note(path, stream.read(size), text_key))
        for key, file in audio.items():
            note = notes.get(key, {})
            if "bad" in note:
                yield Problem(file.name, "the entry beside it is no JSON object", note["bad"])
            else:
                yield _described(note, file.name, file, text_key)


def _note(path: PurePosixPath, raw: bytes, text_key: str) -> dict[str, Any]:
    if path.suffix != ".json":
        return {text_key if path.suffix == ".txt" else "label": raw.decode("utf-8", "replace").strip()}
    try:
        entry = json.loads(raw.decode())
    except ValueError as error:
        return {"bad": str(error)}
    return entry if isinstance(entry, dict) else {"bad": type(entry).__name__}
