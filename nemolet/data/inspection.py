"""Looking into every recording before training, so that nothing fails in the middle of an epoch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nemolet.data.audio import Channels, Facts, Recording
from nemolet.data.manifest import Problem, Utterance
from nemolet.errors import DataError

SILENT = 2.0**-15  # largest sample of a recording without sound: nothing above the last of 16 bits
Field = Literal["text", "label", "speaker", "segments"]


@dataclass(frozen=True)
class AudioRules:
    """What an utterance has to fulfil (final).

    Args:
        needs: fields that may not be missing; a text may not be empty either.
        min_seconds: shorter ones are left out.
        max_seconds: longer ones are left out.
        sample_rate: the rate of files, where no other is accepted.
        channels: what becomes of several channels.
        characters: those that may occur in texts; None for all.
        tolerance: seconds by which a manifest's duration may differ from the file's.
    """

    needs: tuple[Field, ...] = ()
    min_seconds: float = 0.0
    max_seconds: float = math.inf
    sample_rate: int | None = None
    channels: Channels = "mix"
    characters: str | None = None
    tolerance: float = 0.1


class Usable(NamedTuple):
    """An utterance that fulfils the rules, with its place in the recording in samples."""

    utterance: Utterance
    facts: Facts
    start: int
    stop: int

    @property
    def seconds(self) -> float:
        """How long it is."""
        return (self.stop - self.start) / self.facts.sample_rate


@dataclass(frozen=True)
class Examined:
    """What became of all entries; nothing is lost in silence.

    Args:
        usable: what can be learned from.
        problems: what is wrong, entry by entry.
        outside: what is only too short or too long.
    """

    usable: tuple[Usable, ...]
    problems: tuple[Problem, ...]
    outside: tuple[Problem, ...]

    @property
    def seconds(self) -> float:
        """Length of all that is usable."""
        return sum(each.seconds for each in self.usable)

    def __str__(self) -> str:
        kept = f"{len(self.usable):,} utterances, {spoken_time(self.seconds)}"
        left = [f"{count:,} {what}" for what, count in counted((*self.problems, *self.outside)).items()]
        return kept + ("; left out: " + ", ".join(left) if left else "")

    def refuse_problems(self, where: str) -> None:
        """Raise one error that lists what is wrong, if anything is.

        Raises:
            DataError: with the file and line of the first ten problems, and how many there are.
        """
        if not self.problems:
            return
        lines = [str(problem) for problem in self.problems[:10]]
        if len(self.problems) > len(lines):
            lines.append(f"and {len(self.problems) - len(lines)} more")
        raise DataError(
            f"{len(self.problems)} of the entries cannot be used",
            where=where,
            found="\n".join(lines),
            fix="repair or remove them, or leave them out with data.on_bad=skip; `nemolet manifest` lists all",
        )


def counted(problems: Iterable[Problem]) -> dict[str, int]:
    """How many problems there are of each kind, most first."""
    return dict(Counter(problem.what for problem in problems).most_common())


def spoken_time(seconds: float) -> str:
    """A length of time for people.

    Example:
        >>> spoken_time(12.34), spoken_time(754), spoken_time(4500)
        ('12.3 s', '12.6 min', '1.25 h')
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.2f} h"


def examine(
    entries: Sequence[Utterance | Problem],
    rules: AudioRules,
    *,
    decode: bool = True,
    workers: int = 1,
    cache: Path | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Examined:
    """Look into every recording and apply the rules.

    Args:
        entries: what :func:`nemolet.data.manifest.read_audio` found.
        rules: what is asked of them.
        decode: decode everything, which alone shows what is corrupt; otherwise only headers are read.
        workers: threads that decode.
        cache: folder that remembers what was found in files that did not change since.
        progress: is told the number of entries that are done.
    """
    found = _all_facts([e.recording for e in entries if isinstance(e, Utterance)], decode, workers, cache, progress)
    usable: list[Usable] = []
    problems: list[Problem] = []
    outside: list[Problem] = []
    seen: dict[Any, str] = {}
    for entry in entries:
        if isinstance(entry, Problem):
            problems.append(entry)
            continue
        facts = found[entry.recording]
        if isinstance(facts, Problem):
            named = [part for part in (_called(entry), facts.found) if part]
            problems.append(Problem(entry.where, facts.what, ": ".join(named)))
            continue
        result = _judged(entry, facts, rules)
        key = (entry.recording.name, entry.offset, entry.duration)
        if isinstance(result, Usable) and seen.setdefault(key, entry.where) != entry.where:
            result = Problem(entry.where, "a duplicate", f"also at {seen[key]}")
        if isinstance(result, Problem):
            problems.append(result)
        elif rules.min_seconds <= result.seconds <= rules.max_seconds:
            usable.append(result)
        else:
            short = result.seconds < rules.min_seconds
            limit = f"below {rules.min_seconds:g}" if short else f"above {rules.max_seconds:g}"
            what = f"too {'short' if short else 'long'} ({limit} s)"
            outside.append(Problem(entry.where, what, f"{result.seconds:.3f} s"))
    return Examined(tuple(usable), tuple(problems), tuple(outside))


def _judged(utterance: Utterance, facts: Facts, rules: AudioRules) -> Usable | Problem:
    """The first rule that an utterance breaks, or its place in the recording."""
    where, name = utterance.where, _called(utterance)
    for what, broken, detail in (
        ("no sample at all", facts.frames == 0, name),
        ("samples that are no numbers", facts.peak is not None and math.isnan(facts.peak), name),
        ("nothing but silence", facts.peak is not None and facts.peak <= SILENT, name),
        (
            "another sample rate",
            rules.sample_rate not in (None, facts.sample_rate),
            f"{facts.sample_rate} instead of {rules.sample_rate}",
        ),
        ("several channels", rules.channels == "refuse" and facts.channels > 1, str(facts.channels)),
    ):
        if broken:
            return Problem(where, what, detail)
    for field in rules.needs:
        value = getattr(utterance, field)
        if value is None:
            return Problem(where, f"the field {field} is missing")
        if field == "text" and not value.strip():
            return Problem(where, "the text is empty")
    strange = set(utterance.text or "") - set(rules.characters) if rules.characters is not None else set()
    if strange:
        return Problem(where, "characters outside the alphabet", " ".join(map(repr, sorted(strange))))
    return _placed(utterance, facts, rules.tolerance)


def _called(utterance: Utterance) -> str:
    """The recording, unless it is what named itself."""
    return utterance.recording.name if utterance.recording.name != utterance.where else ""


def _placed(utterance: Utterance, facts: Facts, tolerance: float) -> Usable | Problem:
    """Where the utterance lies, in samples; a manifest rounds its durations."""
    start, duration, total = utterance.offset or 0.0, utterance.duration, facts.seconds
    end = total if duration is None else start + duration
    if start >= total or end > total + tolerance:
        what = "the duration is wrong" if utterance.offset is None else "the part lies beyond the end of the audio"
        return Problem(utterance.where, what, f"up to {end:.3f} s, but there are {total:.3f} s")
    if utterance.offset is None:
        if end < total - tolerance:
            found = f"{end:.3f} s, but there are {total:.3f} s; a part of a file has an offset"
            return Problem(utterance.where, "the duration is wrong", found)
        return Usable(utterance, facts, 0, facts.frames)
    return Usable(utterance, facts, round(start * facts.sample_rate), min(facts.frames, round(end * facts.sample_rate)))


# --------------------------------------------------------------------------------------------------
# Looking at each recording once, and remembering it
# --------------------------------------------------------------------------------------------------


def _all_facts(
    recordings: Sequence[Recording],
    decode: bool,
    workers: int,
    cache: Path | None,
    progress: Callable[[int], Any] | None,
) -> dict[Recording, Facts | Problem]:
    """What each recording holds, or what is wrong with it; a file that several entries name is decoded once."""
    unique = list(dict.fromkeys(recordings))
    memory = None if cache is None else _memory(unique, decode, cache)
    if memory is not None and memory.is_file():
        remembered = json.loads(memory.read_text())
        return {r: Problem(**f) if isinstance(f, dict) else Facts(*f) for r, f in zip(unique, remembered)}

    def look(recording: Recording) -> Facts | Problem:
        try:
            return recording.facts(decode=decode)
        except DataError as error:
            return Problem(recording.name, error.what, "" if error.found is None else str(error.found))
        finally:
            if progress is not None:
                progress(1)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = list(pool.map(look, unique))
    if memory is not None:
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps([asdict(f) if isinstance(f, Problem) else f for f in found]))
        partial.replace(memory)
    return dict(zip(unique, found))


def _memory(recordings: Sequence[Recording], decode: bool, cache: Path) -> Path | None:
    """The file that remembers these recordings, as long as path, size and time of each stay; None for arrays."""
    try:
        identities = [recording.identity for recording in recordings]
    except OSError:  # a file is missing; it may come
        return None
    if None in identities:
        return None
    digest = hashlib.sha256(json.dumps([decode, identities]).encode()).hexdigest()[:20]
    return cache / f"audio-{digest}.json"
