"""Recordings: files, members of tar shards and arrays in memory, decoded to one channel at one rate.

soundfile decodes WAV, FLAC, OGG and MP3; soxr resamples. Both come with ``pip install nemolet[speech]``.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nemolet.errors import DataError, needs

Samples = NDArray[np.float32]
Channels = Literal["mix", "first", "refuse"]  # what becomes of several channels
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
_BLOCK = 1 << 16  # samples that are inspected together


class Facts(NamedTuple):
    """What was found in a recording; ``peak`` is not a number where a sample is none, and None if nobody looked."""

    sample_rate: int
    channels: int
    frames: int
    peak: float | None

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.frames / self.sample_rate


class Recording(Protocol):
    """Where samples come from."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def identity(self) -> tuple[Any, ...] | None:
        """What tells its content from another; None where nothing does."""

    def facts(self, *, decode: bool = True) -> Facts:
        """What it holds: by its header, or by decoding all of it."""

    def read(self, start: int = 0, stop: int | None = None) -> tuple[Samples, int]:
        """Samples ``[N, channels]`` from one place to another, and their rate."""


@dataclass(frozen=True)
class AudioFile:
    """A file, or a member of a tar shard where it lies ``size`` bytes long at ``offset`` (final).

    Raises:
        DataError: for a file that is missing, empty or does not decode; when it is read.
    """

    path: Path
    offset: int = 0
    size: int | None = None
    member: str | None = None

    @property
    def name(self) -> str:
        """The path, and the member of a shard."""
        return str(self.path) if self.member is None else f"{self.path}:{self.member}"

    @property
    def identity(self) -> tuple[Any, ...]:
        """Path, size and time."""
        stat = self.path.stat()
        return (str(self.path.resolve()), stat.st_size, stat.st_mtime_ns, self.offset, self.size)

    def facts(self, *, decode: bool = True) -> Facts:
        """What it holds."""
        with self._opened() as sound:
            peak: float | None = None
            frames = sound.frames
            if decode:
                peak, frames = 0.0, 0
                while len(block := sound.read(_BLOCK, dtype="float32", always_2d=True)):
                    largest = float(np.abs(block).max())
                    peak = math.nan if math.isnan(peak) or not math.isfinite(largest) else max(peak, largest)
                    frames += len(block)
                if frames < sound.frames:
                    raise self._broken(f"only {frames} of {sound.frames} samples decode")
            return Facts(sound.samplerate, sound.channels, frames, peak)

    def read(self, start: int = 0, stop: int | None = None) -> tuple[Samples, int]:
        """Decode from one sample to another."""
        with self._opened() as sound:
            if start:
                sound.seek(min(start, sound.frames))
            wanted = max(0, min(sound.frames, sound.frames if stop is None else stop) - start)
            samples = sound.read(wanted, dtype="float32", always_2d=True)
            if len(samples) < wanted:
                raise self._broken(f"only {len(samples)} of {wanted} samples decode")
            return samples, sound.samplerate

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        with needs("soundfile", extra="speech"):
            import soundfile

        try:
            with self._bytes() as stream, soundfile.SoundFile(stream) as sound:
                if "should be" in sound.extra_info:  # libsndfile repairs the header of a cut file and goes on
                    raise self._broken("the file is shorter than its header says")
                yield sound
        except soundfile.LibsndfileError as error:
            raise self._broken(error.error_string) from error

    @contextmanager
    def _bytes(self) -> Iterator[BinaryIO]:
        if not self.path.is_file():
            raise DataError("there is no such audio file", where=self.name, fix="check the path, or remove the entry")
        if not (self.path.stat().st_size if self.size is None else self.size):
            raise DataError("the audio file is empty", where=self.name, expected="audio", found="0 bytes")
        with self.path.open("rb") as stream:
            if self.size is None:
                yield stream
            else:
                stream.seek(self.offset)
                yield io.BytesIO(stream.read(self.size))

    def _broken(self, found: str) -> DataError:
        return DataError(
            "the audio cannot be decoded",
            where=self.name,
            expected="a whole file of " + " ".join(s[1:].upper() for s in SUFFIXES),
            found=found.strip().removeprefix("Error : "),
            fix="make or copy it again, or remove it",
        )


@dataclass(frozen=True, eq=False)
class AudioArray:
    """Samples in memory, ``[N]`` or ``[N, channels]``, in [-1, 1] (final).

    Example:
        >>> AudioArray(np.zeros(8000, np.float32), 16000).facts().seconds
        0.5
    """

    samples: NDArray[np.floating[Any]]
    sample_rate: int
    name: str = "an array"

    @property
    def identity(self) -> None:
        """Nothing tells what is in it without looking."""
        return None

    def facts(self, *, decode: bool = True) -> Facts:
        """What it holds."""
        samples = self._wide()
        peak = float(np.abs(samples).max(initial=0.0)) if decode else None
        if peak is not None and not math.isfinite(peak):
            peak = math.nan
        return Facts(self.sample_rate, samples.shape[1], len(samples), peak)

    def read(self, start: int = 0, stop: int | None = None) -> tuple[Samples, int]:
        """A part of it."""
        return self._wide()[start:stop], self.sample_rate

    def _wide(self) -> Samples:
        samples = np.asarray(self.samples)
        if not np.issubdtype(samples.dtype, np.floating) or samples.ndim not in (1, 2):
            raise DataError(
                "these samples are no audio",
                where=self.name,
                expected="floating-point samples in [-1, 1], as [N] or [N, channels]",
                found=f"{samples.dtype} {list(samples.shape)}",
                fix="divide 16-bit samples by 32768",
            )
        return samples.astype(np.float32).reshape(len(samples), -1)


def load_audio(
    source: str | Path | Recording,
    *,
    sample_rate: int | None = None,
    start: float = 0.0,
    duration: float | None = None,
    channels: Channels = "mix",
) -> tuple[Samples, int]:
    """Decode a recording, or a part of it, to one channel.

    Args:
        source: a path or a recording.
        sample_rate: what it is resampled to; None for its own.
        start: first second.
        duration: how many seconds; None for all that follow.
        channels: ``"mix"`` takes the mean of several channels, ``"first"`` the first; ``"refuse"`` is an error.

    Returns:
        The samples ``[N]``, float32, and their rate.

    Raises:
        DataError: for a file that is missing, empty or does not decode.

    Example:
        >>> samples, rate = load_audio(AudioArray(np.zeros((8000, 2)), 8000), sample_rate=16000)
        >>> samples.shape, rate
        ((16000,), 16000)
    """
    recording = AudioFile(Path(source)) if isinstance(source, (str, Path)) else source
    rate = recording.facts(decode=False).sample_rate if start or duration is not None else 0
    stop = None if duration is None else round((start + duration) * rate)
    samples, rate = recording.read(round(start * rate), stop)
    if samples.shape[1] > 1 and channels == "refuse":
        raise DataError(
            "the audio has several channels",
            where=recording.name,
            expected="one",
            found=samples.shape[1],
            fix="choose channels=mix or channels=first",
        )
    mono = samples[:, 0] if samples.shape[1] == 1 or channels == "first" else samples.mean(1)
    return resample(mono, rate, sample_rate or rate), sample_rate or rate


def resample(samples: Samples, rate: int, wanted: int) -> Samples:
    """Change the sample rate; the length becomes ``N * wanted / rate``, rounded.

    Example:
        >>> resample(np.zeros(100, np.float32), 8000, 16000).shape
        (200,)
    """
    if rate == wanted or not len(samples):
        return samples
    with needs("soxr", extra="speech"):
        import soxr

    result: Samples = soxr.resample(samples, rate, wanted)
    return result
