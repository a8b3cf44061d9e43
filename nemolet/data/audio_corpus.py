"""From what a config says about recordings to batches of audio and labels."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nemolet.data.audio import Channels
from nemolet.data.audio_loader import AudioLoader, AudioStore, AudioValidationLoader, Batcher
from nemolet.data.buckets import BatchPlan, Joining
from nemolet.data.corpus import TokenizerSpec
from nemolet.data.inspection import AudioRules, Examined, Usable, examine, spoken_time
from nemolet.data.manifest import Problem, Utterance, read_audio
from nemolet.data.prepared import Progress, Unit, digest, lasting
from nemolet.data.targets import ClassTarget, SpeechTarget, Target, TextTarget
from nemolet.errors import DataError, NemoletError
from nemolet.rules import Checked
from nemolet.tokenizers import Tokenizer
from nemolet.types import Audio, NeuralType

_log = logging.getLogger("nemolet")
Entries = Sequence[Utterance | Problem]
TargetName = Literal["text", "label", "speaker", "segments", "none"]


@dataclass(frozen=True)
class AudioCorpus(Checked):
    """Recordings for training a model of speech (final). Each is looked into before anything begins.

    Args:
        path: a manifest, a folder of folders, a pattern of tar shards, or a list of them; None for entries that
            are given to :meth:`prepare`.
        valid_path: recordings for validation; None sets part of ``path`` aside.
        valid_speakers: speakers of ``path`` that are set aside for validation.
        valid_fraction: how much is set aside where neither is given.
        target: what is to be predicted: ``text``, ``label`` or ``speaker`` of an utterance, its ``segments`` of
            speech frame by frame, or ``none``.
        sample_rate: what audio is resampled to.
        resample: whether files of another rate are accepted.
        channels: what becomes of several channels: their mean, the first, or an error.
        min_seconds: shorter utterances are left out and counted.
        max_seconds: longer ones likewise.
        batch_seconds: most seconds in a batch of one rank, padding included.
        batch_size: most utterances in it.
        spread: how much lengths are mixed within a batch; see :class:`nemolet.data.BatchPlan`.
        join: fewest and most utterances of one speaker that are joined into one, newly in each epoch; None for
            utterances as they are.
        pause: shortest and longest silence between joined utterances, in seconds.
        hop: seconds between the frames of ``segments``.
        on_bad: ``"error"`` refuses data with any bad entry and lists them; ``"skip"`` leaves them out and says so.
        decode: decode every file beforehand, which alone finds all corrupt ones; files that did not change are
            remembered. Otherwise headers are read, and a file that fails in training is replaced by a neighbour.
        shards: a pattern of tar shards in which the files of a manifest lie.
        text_key: where the text lies in an entry.
        memory_mb: decoded audio that is kept in memory.
        workers: threads that decode beforehand.
        cache: folder that remembers; None for ``$NEMOLET_CACHE`` or ``~/.cache/nemolet``.
        seed: of the order; None for 0, or for the seed of a run.

    Example:
        >>> from nemolet.data.manifest import utterances_of_arrays
        >>> beeps = [np.sin(np.arange(800) * pitch) for pitch in (0.2, 0.3) * 4]
        >>> entries = utterances_of_arrays(beeps, sample_rate=8000, labels=["low", "high"] * 4)
        >>> corpus = AudioCorpus(target="label", sample_rate=8000, valid_fraction=0.25)
        >>> data = corpus.prepare(entries=entries)
        >>> data.fields, data.classes
        (('audio', 'audio_lengths', 'labels'), ('high', 'low'))
        >>> next(iter(data.train_loader()))["audio"].shape
        torch.Size([6, 800])
    """

    path: str | list[str] | None = None
    valid_path: str | None = None
    valid_speakers: list[str] | None = None
    valid_fraction: float = 0.05
    target: TargetName = "text"
    sample_rate: int = 16000
    resample: bool = True
    channels: Channels = "mix"
    min_seconds: float = 0.1
    max_seconds: float = 30.0
    batch_seconds: float = 120.0
    batch_size: int = 64
    spread: float = 0.2
    join: tuple[int, int] | None = None
    pause: tuple[float, float] = (0.1, 0.3)
    hop: float = 0.01
    on_bad: Literal["error", "skip"] = "error"
    decode: bool = True
    shards: str | None = None
    text_key: str = "text"
    memory_mb: float = 1024
    workers: int = 1
    cache: str | None = None
    seed: int | None = None

    __buildable__ = True
    FREE = ("path", "valid_path", "decode", "memory_mb", "workers", "cache")
    CONFIG_RULES = (
        ("len(path) > 0", "path is empty; null for recordings that are given"),
        ("len(valid_path) > 0", "valid_path is empty; null sets part of path aside"),
        ("valid_fraction > 0 and valid_fraction < 1", "valid_fraction is a share between 0 and 1"),
        ("sample_rate >= 1 and batch_size >= 1 and workers >= 1", "sample_rate, batch_size, workers are at least 1"),
        ("min_seconds >= 0 and min_seconds < max_seconds", "min_seconds is at least 0 and below max_seconds"),
        ("batch_seconds > 0 and hop > 0", "batch_seconds and hop are above 0"),
        ("spread >= 0 and memory_mb >= 0", "spread and memory_mb are at least 0"),
    )

    @property
    def ports(self) -> dict[str, NeuralType]:
        """Types of what a batch holds."""
        return {"audio": NeuralType("B N", Audio(sample_rate=self.sample_rate))}

    @property
    def typical(self) -> dict[str, int]:
        """Sizes of a batch of utterances of five seconds."""
        seconds = min(5.0, self.max_seconds, self.batch_seconds)
        rows = max(1, min(self.batch_size, int(self.batch_seconds / seconds)))
        frames = int(seconds / self.hop)
        return {"B": rows, "N": int(seconds * self.sample_rate), "T": frames, "U": max(1, frames // 10)}

    def prepare(
        self,
        tokenizer: TokenizerSpec | Tokenizer | None = None,
        *,
        progress: Progress | None = None,
        entries: Entries | None = None,
        valid_entries: Entries | None = None,
    ) -> PreparedAudio:
        """Look into every recording, set some aside for validation, and learn the tokenizer or the classes.

        Args:
            tokenizer: one, or what to make one of; for texts.
            progress: makes a bar from a title and a total; returns what advances it.
            entries: utterances that are at hand, instead of ``path``.
            valid_entries: those for validation, instead of ``valid_path``.

        Raises:
            DataError: for bad entries, naming file and line.
        """
        train = self._examined(self._entries(self.path, entries), progress)
        valid: Sequence[Usable] = ()
        left_out = [train]
        kept: Sequence[Usable] = train.usable
        if self.valid_path is not None or valid_entries is not None:
            aside = self._examined(self._entries(self.valid_path, valid_entries), progress)
            left_out.append(aside)
            valid = aside.usable
        else:
            kept, valid = self._split(train.usable)
        chosen = self._tokenizer(tokenizer, train.usable) if self.target == "text" else None
        classes: tuple[str, ...] = ()
        if self.target in ("label", "speaker"):
            classes = tuple(sorted({_name(u, self.target) for u in kept}))
        strange = [*_strange((*kept, *valid), chosen), *(_unknown(valid, self.target, classes) if classes else ())]
        if strange:
            wrong = {problem.where for problem in strange}
            kept, valid = ([u for u in part if u.utterance.where not in wrong] for part in (kept, valid))
            left_out.append(self._judged(Examined((), tuple(strange), ())))
        return PreparedAudio(self, chosen, classes, tuple(kept), tuple(valid), tuple(left_out))

    def _entries(self, path: str | list[str] | None, given: Entries | None) -> Entries:
        if given is not None:
            return given
        paths = [path] if isinstance(path, str) else path or []
        if not paths:
            raise DataError("no data was named", where="data.path", fix="set data.path=my_manifest.jsonl")
        return [e for p in paths for e in read_audio(p, text_key=self.text_key, shards=self.shards)]

    def _examined(self, entries: Entries, progress: Progress | None) -> Examined:
        needs = () if self.target == "none" else (self.target,)
        rules = AudioRules(
            needs,
            self.min_seconds,
            self.max_seconds,
            sample_rate=None if self.resample else self.sample_rate,
            channels=self.channels,
        )
        update = progress("look into recordings", len(entries)) if progress is not None else None
        cache = Path(self.cache or os.environ.get("NEMOLET_CACHE") or Path.home() / ".cache" / "nemolet")
        found = examine(entries, rules, decode=self.decode, workers=self.workers, cache=cache, progress=update)
        return self._judged(found)

    def _judged(self, found: Examined) -> Examined:
        """Refuse bad entries, or say that they are left out."""
        if self.on_bad == "error":
            found.refuse_problems("data.path")
        for problem in (*found.problems, *found.outside)[:20]:
            _log.warning("left out: %s", problem)
        if found.problems or found.outside:
            _log.warning("left out: %d of all entries", len(found.problems) + len(found.outside))
        return found

    def _split(self, usable: Sequence[Usable]) -> tuple[list[Usable], list[Usable]]:
        """By speaker, or at random, always the same: manifests are often in the order of their labels."""
        if self.valid_speakers is not None:
            known = {u.utterance.speaker for u in usable}
            missing = [name for name in self.valid_speakers if name not in known]
            if missing:
                raise DataError(
                    "there are no recordings of these speakers",
                    where="data.valid_speakers",
                    expected=", ".join(sorted(filter(None, known))) or "speakers in the manifest",
                    found=", ".join(missing),
                )
            aside = np.array([u.utterance.speaker in self.valid_speakers for u in usable], bool)
        else:
            aside = np.zeros(len(usable), bool)
            count = max(1, round(len(usable) * self.valid_fraction))
            aside[np.random.default_rng(0).permutation(len(usable))[:count]] = True
        parts = [u for u, out in zip(usable, aside) if not out], [u for u, out in zip(usable, aside) if out]
        if not all(parts):
            raise DataError(
                "nothing is left for training" if parts[1] else "nothing is set aside for validation",
                where="data.valid_speakers" if self.valid_speakers is not None else "data.valid_fraction",
                found=f"{len(usable)} usable utterances",
                expected="at least one on either side",
                fix="use more data, or set data.valid_path",
            )
        return parts

    def _tokenizer(self, tokenizer: TokenizerSpec | Tokenizer | None, usable: Sequence[Usable]) -> Tokenizer:
        if isinstance(tokenizer, Tokenizer):
            return tokenizer
        if tokenizer is None:
            raise DataError(
                "texts need a tokenizer",
                where="tokenizer",
                fix="choose tokenizer=char, or data.target=label for classes",
            )
        between = () if self.join is None else (" ",)  # joined texts have a space between them
        return tokenizer.make_of_texts((*(u.utterance.text or "" for u in usable), *between))


@dataclass(frozen=True)
class PreparedAudio:
    """Recordings that are ready to be learned from.

    Args:
        corpus: the settings.
        tokenizer: of texts; None for other targets.
        classes: the names of labels or speakers, in the order of their numbers.
        train: utterances for training.
        valid: utterances for validation.
        examined: what was found, and what is left out.
    """

    corpus: AudioCorpus
    tokenizer: Tokenizer | None
    classes: tuple[str, ...]
    train: tuple[Usable, ...]
    valid: tuple[Usable, ...]
    examined: tuple[Examined, ...]

    def train_loader(self, *, rank: int = 0, ranks: int = 1) -> AudioLoader:
        """Batches without end."""
        return AudioLoader(self._train_batcher, self._plan(self.train), rank=rank, ranks=ranks)

    def valid_loader(self, *, rank: int = 0, ranks: int = 1, max_batches: int | None = None) -> AudioValidationLoader:
        """Every utterance for validation once."""
        plan = replace(self._plan(self.valid), shuffle=False)
        return AudioValidationLoader(self._valid_batcher, plan, rank=rank, ranks=ranks, max_batches=max_batches)

    @property
    def ports(self) -> dict[str, NeuralType]:
        """Types of what a batch holds."""
        return self.corpus.ports

    @property
    def fields(self) -> tuple[str, ...]:
        """The entries of a batch."""
        return ("audio", "audio_lengths") + (() if self.corpus.target == "none" else ("labels",))

    @property
    def unit(self) -> Unit:
        """Progress is counted in seconds of audio, padding included."""
        return Unit("seconds", self.corpus.sample_rate)

    @property
    def sizes(self) -> dict[str, int]:
        """What a model has to know."""
        if self.tokenizer is not None:
            return {"vocab_size": self.tokenizer.vocab_size}
        return {"classes": len(self.classes)} if self.classes else {}

    @property
    def summary(self) -> str:
        """For a card."""
        source = self.corpus.path or "recordings in memory"
        seconds = spoken_time(sum(u.seconds for u in self.train))
        left = sum(len(e.problems) + len(e.outside) for e in self.examined)
        return (
            f"{source if isinstance(source, str) else ', '.join(source)} ({len(self.train):,} utterances, {seconds}; "
            f"{len(self.valid):,} for validation; {left:,} left out)"
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Settings, and what is known of every recording."""
        return {**lasting(self.corpus), "train": digest(_known(self.train)), "valid": digest(_known(self.valid))}

    def derived(self, valid_loss: float) -> dict[str, float]:
        """A loss of audio has no other names."""
        return {}

    @functools.cached_property  # so that all loaders share what is decoded
    def _train_batcher(self) -> Batcher:
        return self._batcher(self.train)

    @functools.cached_property
    def _valid_batcher(self) -> Batcher:
        return self._batcher(self.valid)

    def _batcher(self, usable: Sequence[Usable]) -> Batcher:
        corpus = self.corpus
        store = AudioStore(usable, sample_rate=corpus.sample_rate, channels=corpus.channels, memory_mb=corpus.memory_mb)
        return Batcher(store, self._target(usable))

    def _plan(self, usable: Sequence[Usable]) -> BatchPlan:
        corpus = self.corpus
        names = [u.utterance.speaker or "" for u in usable]
        return BatchPlan(
            np.array([u.seconds for u in usable]),
            batch_seconds=corpus.batch_seconds,
            batch_size=corpus.batch_size,
            seed=corpus.seed or 0,
            spread=corpus.spread,
            groups=np.unique(names, return_inverse=True)[1] if names else None,
            joining=None if corpus.join is None else Joining(*corpus.join, *corpus.pause),
        )

    def _target(self, usable: Sequence[Usable]) -> Target | None:
        corpus = self.corpus
        if self.tokenizer is not None:
            return TextTarget([u.utterance.text or "" for u in usable], self.tokenizer)
        if self.classes:
            numbers = {name: index for index, name in enumerate(self.classes)}
            return ClassTarget([_name(u, corpus.target) for u in usable], numbers)
        if corpus.target == "segments":
            return SpeechTarget(
                [_spans(u) for u in usable],
                [u.seconds for u in usable],
                sample_rate=corpus.sample_rate,
                hop=round(corpus.hop * corpus.sample_rate),
            )
        return None


def _known(usable: Sequence[Usable]) -> list[tuple[Any, ...]]:
    """What tells utterances apart; the loudest sample tells one recording from another of its length."""
    each = ((u, u.utterance) for u in usable)
    return [(u.start, u.stop, *u.facts, s.text, s.label, s.speaker, s.segments) for u, s in each]


def _name(usable: Usable, target: TargetName) -> str:
    return (usable.utterance.label if target == "label" else usable.utterance.speaker) or ""


def _spans(usable: Usable) -> tuple[tuple[float, float], ...]:
    """Segments of a file, counted from the start of the utterance."""
    start = usable.start / usable.facts.sample_rate
    inside = ((max(a - start, 0.0), min(b - start, usable.seconds)) for a, b in usable.utterance.segments or ())
    return tuple((a, b) for a, b in inside if a < b)


def _strange(usable: Sequence[Usable], tokenizer: Tokenizer | None) -> list[Problem]:
    """Texts that the tokenizer cannot write."""
    problems: list[Problem] = []
    if tokenizer is None:
        return problems
    for each in usable:
        try:
            tokenizer.encode(each.utterance.text or "")
        except NemoletError as error:
            problems.append(Problem(each.utterance.where, "a text outside the vocabulary", f"{error.found}"))
    return problems


def _unknown(usable: Sequence[Usable], target: TargetName, classes: Sequence[str]) -> list[Problem]:
    """Utterances for validation of a class that training does not have."""
    return [
        Problem(u.utterance.where, f"a {target} that training does not have", _name(u, target))
        for u in usable
        if _name(u, target) not in classes
    ]
