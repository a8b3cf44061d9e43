"""``nemolet manifest``: look into recordings, list what is wrong, and write a manifest of the rest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nemolet.data.audio import Channels
from nemolet.errors import DataError

if TYPE_CHECKING:
    from nemolet.data.inspection import Examined, Usable


@dataclass(frozen=True)
class Settings:
    """Which recordings to look into, and what is asked of them.

    Args:
        path: a manifest, a folder, a pattern of tar shards, or a list of them.
        out: a manifest to write, of the recordings that are in order; null to look only.
        picture: an SVG file for a histogram of lengths; null for none.
        needs: fields that every entry must have: ``text``, ``label``, ``speaker``, ``segments``.
        min_seconds: shorter recordings are left out.
        max_seconds: longer ones likewise; null for no limit.
        sample_rate: the only rate that is accepted; null for any.
        channels: ``refuse`` lists recordings of several channels; ``mix`` and ``first`` accept them.
        characters: those that texts may hold; null for any.
        text_key: where the text lies in an entry.
        shards: a pattern of tar shards in which the files of a manifest lie.
        workers: threads that decode.
    """

    path: str | list[str]
    out: str | None = None
    picture: str | None = None
    needs: list[Literal["text", "label", "speaker", "segments"]] | None = None
    min_seconds: float = 0.0
    max_seconds: float | None = None
    sample_rate: int | None = None
    channels: Channels = "mix"
    characters: str | None = None
    text_key: str = "text"
    shards: str | None = None
    workers: int = 1

    CONFIG_RULES = (
        ("min_seconds >= 0", "min_seconds is at least 0"),
        ("workers >= 1", "workers is at least 1"),
    )


def run(settings: Settings) -> int:
    """Print what was found; the status is 1 where something is wrong and no cleaned manifest was asked for."""
    from nemolet.cli.train import progress_bar
    from nemolet.data.inspection import AudioRules, examine
    from nemolet.data.manifest import read_audio

    paths = [settings.path] if isinstance(settings.path, str) else settings.path
    entries = [e for p in paths for e in read_audio(p, text_key=settings.text_key, shards=settings.shards)]
    rules = AudioRules(
        needs=tuple(settings.needs or ()),
        min_seconds=settings.min_seconds,
        max_seconds=float("inf") if settings.max_seconds is None else settings.max_seconds,
        sample_rate=settings.sample_rate,
        channels=settings.channels,
        characters=settings.characters,
    )
    bar = progress_bar("look into recordings", len(entries))
    found = examine(entries, rules, workers=settings.workers, progress=bar)
    for problem in (*found.problems, *found.outside):
        print(problem)
    if found.problems or found.outside:
        print()
    print(statistics(found))
    if found.usable and settings.picture is not None:
        from nemolet.speech.charts import histogram

        lengths = [usable.seconds for usable in found.usable]
        histogram(lengths, settings.picture, title=f"Lengths of {len(lengths):,} utterances", unit="s")
    if settings.out is not None:
        write(found.usable, Path(settings.out))
        print(f"{settings.out}: {len(found.usable):,} entries")
    return 1 if found.problems and settings.out is None else 0


def statistics(found: Examined) -> str:
    """What there is, and what is left out, in a few lines."""
    from nemolet.data.inspection import counted, spoken_time

    usable = found.usable
    lines = [("usable", f"{len(usable):,} utterances, {spoken_time(found.seconds)}")]
    if usable:
        lengths = sorted(each.seconds for each in usable)
        middle, last = lengths[len(lengths) // 2], lengths[-1]
        mean = found.seconds / len(lengths)
        lines.append(("lengths", f"{lengths[0]:.2f} s to {last:.2f} s; median {middle:.2f} s, mean {mean:.2f} s"))
        lines.append(("rates", _shares(f"{each.facts.sample_rate} Hz" for each in usable)))
        lines.append(("channels", _shares(str(each.facts.channels) for each in usable)))
        for name in ("speaker", "label"):
            values = [getattr(each.utterance, name) for each in usable]
            if any(values):
                lines.append((f"{name}s", _shares(str(value) for value in values)))
        characters = Counter(c for each in usable for c in each.utterance.text or "")
        if characters:
            lines.append(("characters", f"{len(characters)}: " + "".join(sorted(characters))))
            rarest = sorted(characters.items(), key=lambda item: item[1])[:8]
            lines.append(("rarest", ", ".join(f"{c!r} {count}" for c, count in rarest)))
    for title, problems in (("wrong", found.problems), ("left out", found.outside)):
        lines += [(title, f"{count:,} x {what}") for what, count in counted(problems).items()]
    return "\n".join(f"{title:<11} {text}" for title, text in lines)


def write(usable: Sequence[Usable], path: Path) -> None:
    """Write a manifest; it appears only when it is complete."""
    from nemolet.data.manifest import manifest_entry

    if not usable:
        raise DataError("nothing is left to write", where=str(path), expected="at least one usable entry")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(manifest_entry(u.utterance, path, u.seconds), ensure_ascii=False) for u in usable)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)


def _shares(values: Iterable[str]) -> str:
    """How many there are of each, most first."""
    counts = Counter(values).most_common()
    told = ", ".join(f"{value} ({count:,})" for value, count in counts[:10])
    return told if len(counts) <= 10 else f"{len(counts):,}: {told}, ..."
