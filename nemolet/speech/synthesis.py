"""Spoken digits out of formulas: a small formant synthesiser, so that a demo and tests need no recordings.

What it says is synthetic and easy to tell apart. A score on it says that a program works, and nothing about speech.
Voiced sounds are sums of harmonics, weighed by the resonances (formants) of a vocal tract that moves from sound to
sound (Fant, 1960); hissing and bursts are noise of a changing colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemolet.data.audio_corpus import AudioCorpus, PreparedAudio
from nemolet.data.corpus import TokenizerSpec
from nemolet.data.manifest import Utterance, utterances_of_arrays
from nemolet.data.prepared import Progress
from nemolet.errors import DataError, did_you_mean
from nemolet.rules import Checked
from nemolet.tokenizers import Tokenizer
from nemolet.types import NeuralType

Track = NDArray[np.float64]
STEP = 0.005  # seconds between two settings of the synthesiser


class Sound(NamedTuple):
    """What the tract does for a while: formants in hertz for a man, and how loud voice and noise are."""

    seconds: float
    formants: tuple[float, float, float]
    voice: float = 1.0
    noise: float = 0.0
    colour: float = 2500.0  # hertz around which the noise lies
    width: float = 1500.0


# Averages of vowels after Peterson and Barney (1952), and consonants by ear. A diphthong is two sounds.
SOUNDS: dict[str, tuple[Sound, ...]] = {
    "AH": (Sound(0.11, (640, 1190, 2390)),),
    "AO": (Sound(0.15, (570, 840, 2410)),),
    "AY": (Sound(0.12, (750, 1200, 2400)), Sound(0.10, (350, 2050, 2600))),
    "EH": (Sound(0.11, (530, 1840, 2480)),),
    "EY": (Sound(0.09, (480, 1900, 2500)), Sound(0.09, (330, 2250, 2800))),
    "IH": (Sound(0.09, (390, 1990, 2550)),),
    "IY": (Sound(0.17, (270, 2290, 3010)),),
    "OW": (Sound(0.11, (500, 950, 2350)), Sound(0.11, (350, 800, 2250))),
    "UW": (Sound(0.18, (300, 870, 2240)),),
    "F": (Sound(0.10, (400, 1200, 2400), voice=0.0, noise=0.10, colour=3000, width=4000),),
    "K": (
        Sound(0.06, (400, 1800, 2500), voice=0.0),
        Sound(0.03, (400, 1800, 2500), voice=0.0, noise=0.5, colour=1800, width=700),
    ),
    "N": (Sound(0.08, (280, 1500, 2500), voice=0.35),),
    "R": (Sound(0.07, (330, 1100, 1500), voice=0.7),),
    "S": (Sound(0.12, (400, 1700, 2600), voice=0.0, noise=0.6, colour=3900, width=700),),
    "T": (
        Sound(0.05, (400, 1800, 2600), voice=0.0),
        Sound(0.03, (400, 1800, 2600), voice=0.0, noise=0.6, colour=3400, width=900),
    ),
    "TH": (Sound(0.10, (400, 1400, 2600), voice=0.0, noise=0.07, colour=2600, width=4000),),
    "V": (Sound(0.07, (300, 1200, 2300), voice=0.35, noise=0.04, colour=3000, width=3000),),
    "W": (Sound(0.07, (300, 610, 2200), voice=0.6),),
    "Z": (Sound(0.09, (280, 1700, 2500), voice=0.25, noise=0.3, colour=3800, width=800),),
}
PRONUNCIATIONS: dict[str, tuple[str, ...]] = {
    "zero": ("Z", "IH", "R", "OW"),
    "one": ("W", "AH", "N"),
    "two": ("T", "UW"),
    "three": ("TH", "R", "IY"),
    "four": ("F", "AO", "R"),
    "five": ("F", "AY", "V"),
    "six": ("S", "IH", "K", "S"),
    "seven": ("S", "EH", "V", "AH", "N"),
    "eight": ("EY", "T"),
    "nine": ("N", "AY", "N"),
}


@dataclass(frozen=True)
class Voice:
    """Who speaks.

    Args:
        pitch: of the voice, in hertz.
        tract: formants are those of a man times this; a shorter tract has higher ones.
        pace: sounds are longer by this.
        breath: noise in the voice.
    """

    pitch: float = 110.0
    tract: float = 1.0
    pace: float = 1.0
    breath: float = 0.01

    @classmethod
    def draw(cls, random: np.random.Generator) -> Voice:
        """A voice at random, from low to high."""
        height = random.uniform(0.0, 1.0)
        return cls(
            pitch=90.0 + 130.0 * height + random.normal(0.0, 8.0),
            tract=0.95 + 0.22 * height + random.normal(0.0, 0.015),
            pace=random.uniform(0.85, 1.25),
            breath=random.uniform(0.003, 0.02),
        )


def say(
    word: str, *, voice: Voice | None = None, sample_rate: int = 8000, random: np.random.Generator | None = None
) -> NDArray[np.float32]:
    """Speak a digit.

    Args:
        word: ``"zero"`` to ``"nine"``.
        voice: who speaks.
        sample_rate: in hertz.
        random: makes every take a little different.

    Raises:
        DataError: for a word that is no digit.

    Example:
        >>> say("seven").dtype, 3000 < len(say("seven")) < 6000
        (dtype('float32'), True)
    """
    if word not in PRONUNCIATIONS:
        raise DataError(
            "this word cannot be said",
            where="say",
            expected=", ".join(PRONUNCIATIONS),
            found=repr(word),
            fix=did_you_mean(word, PRONUNCIATIONS),
        )
    voice, random = voice or Voice(), random or np.random.default_rng(0)
    step = round(STEP * sample_rate)
    controls = _controls([sound for phone in PRONUNCIATIONS[word] for sound in SOUNDS[phone]], voice, random)
    voiced = _voiced(controls, voice, sample_rate, step, random)
    spoken = voiced + _noise(controls, sample_rate, step, random)[: len(voiced)]
    spoken *= random.uniform(0.25, 0.6) / max(1e-9, np.abs(spoken).max())
    return (spoken + random.normal(0.0, 5e-4, len(spoken))).astype(np.float32)


def _controls(sounds: Sequence[Sound], voice: Voice, random: np.random.Generator) -> Track:
    """Settings at every step, ``[steps, 7]``: three formants, voice, noise, its colour and width."""
    rows: list[Track] = []
    for sound in sounds:
        steps = max(3, round(sound.seconds * voice.pace * random.uniform(0.85, 1.15) / STEP))
        formants = np.array(sound.formants) * voice.tract * random.normal(1.0, 0.02, 3)
        noise = sound.noise + voice.breath * sound.voice
        row = [*formants, sound.voice, noise, sound.colour * voice.tract, sound.width]
        rows.append(np.repeat(np.array([row]), steps, 0))
    table = np.concatenate(rows)
    table[:, :3] = _smooth(table[:, :3], 9)  # the tongue is slower than the breath
    table[:, 3:5] = _smooth(table[:, 3:5], 3)
    edge = np.minimum(1.0, np.arange(1, len(table) + 1) / 4)
    table[:, 3:5] *= (edge * edge[::-1])[:, None]
    return table


def _smooth(table: Track, size: int) -> Track:
    """A moving average along the first axis, with a Hann window."""
    weights = np.hanning(size + 2)[1:-1] / np.hanning(size + 2)[1:-1].sum()
    padded = np.pad(table, ((size // 2, size // 2), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, weights, "valid") for column in padded.T], 1)


def _voiced(table: Track, voice: Voice, sample_rate: int, step: int, random: np.random.Generator) -> Track:
    """Harmonics of the pitch, weighed by the formants."""
    steps = np.arange(len(table))
    falling = np.linspace(1.08, 0.9, len(table)) * random.normal(1.0, 0.04)
    wavering = 1.0 + 0.01 * _smooth(random.normal(0.0, 3.0, (len(table), 1)), 9)[:, 0]
    pitch = voice.pitch * falling * wavering
    places = np.arange(len(table) * step) / step
    phase = 2 * np.pi * np.cumsum(np.interp(places, steps, pitch)) / sample_rate
    total = np.zeros(len(places))
    for harmonic in range(1, int(0.48 * sample_rate / pitch.max()) + 1):
        frequency = harmonic * pitch
        gain = table[:, 3] / harmonic  # the spectrum of the glottis falls
        for formant, width in zip((*table[:, :3].T, np.full(len(table), 3500.0 * voice.tract)), (70, 90, 130, 200)):
            gain = gain * formant**2 / np.hypot(formant**2 - frequency**2, width * frequency)
        total += np.interp(places, steps, gain) * np.sin(harmonic * phase)
    return total


def _noise(table: Track, sample_rate: int, step: int, random: np.random.Generator) -> Track:
    """Noise whose colour changes, in windows that overlap by half."""
    window = np.hanning(2 * step + 1)[:-1]
    frequencies = np.fft.rfftfreq(2 * step, 1 / sample_rate)
    gains = table[:, 4:5] * np.exp(-(((frequencies - table[:, 5:6]) / table[:, 6:7]) ** 2))
    spectra = np.fft.rfft(random.normal(0.0, 1.0, (len(table), 2 * step)))
    pieces = np.fft.irfft(spectra * gains, n=2 * step) * window
    total = np.zeros((len(table) + 1) * step)
    for index, piece in enumerate(pieces):
        total[index * step : (index + 2) * step] += piece
    return total


@dataclass(frozen=True)
class SpokenDigits(Checked):
    """Data for demos: digits of synthetic voices, with other voices for validation (final).

    Args:
        voices: for training.
        valid_voices: for validation.
        takes: how often each voice says each digit.
        target: ``label`` for digits one by one, ``text`` to write them.
        join: fewest and most digits that are joined into one utterance; None for single digits.
        pause: shortest and longest silence between joined digits, in seconds.
        sample_rate: in hertz.
        batch_seconds: most seconds in a batch, padding included.
        batch_size: most utterances in it.
        seed: of the order; None for 0, or for the seed of a run. The voices are always the same.

    Example:
        >>> data = SpokenDigits(voices=1, valid_voices=1, takes=1, target="label").prepare()
        >>> len(data.train), len(data.valid), data.classes[:3]
        (10, 10, ('eight', 'five', 'four'))
    """

    voices: int = 12
    valid_voices: int = 4
    takes: int = 4
    target: Literal["label", "text"] = "text"
    join: tuple[int, int] | None = None
    pause: tuple[float, float] = (0.1, 0.3)
    sample_rate: int = 8000
    batch_seconds: float = 60.0
    batch_size: int = 64
    seed: int | None = None

    __buildable__ = True
    CONFIG_RULES = (("voices >= 1 and valid_voices >= 1 and takes >= 1", "voices and takes are at least 1"),)

    @property
    def ports(self) -> dict[str, NeuralType]:
        """Types of what a batch holds."""
        return self._corpus().ports

    @property
    def typical(self) -> dict[str, int]:
        """Sizes of a batch."""
        return self._corpus().typical

    def prepare(
        self, tokenizer: TokenizerSpec | Tokenizer | None = None, *, progress: Progress | None = None
    ) -> PreparedAudio:
        """Let all voices speak."""
        train = self._spoken(range(self.voices))
        valid = self._spoken(range(self.voices, self.voices + self.valid_voices))
        return self._corpus().prepare(tokenizer, progress=progress, entries=train, valid_entries=valid)

    def _corpus(self) -> AudioCorpus:
        return AudioCorpus(
            path="digits of a formant synthesiser, no recordings",
            target=self.target,
            sample_rate=self.sample_rate,
            batch_seconds=self.batch_seconds,
            batch_size=self.batch_size,
            join=self.join,
            pause=self.pause,
            seed=self.seed,
        )

    def _spoken(self, voices: range) -> list[Utterance]:
        waves, words, speakers = [], [], []
        for number in voices:
            random = np.random.default_rng([20, number])
            voice = Voice.draw(random)
            for word in PRONUNCIATIONS:
                for _ in range(self.takes):
                    waves.append(say(word, voice=voice, sample_rate=self.sample_rate, random=random))
                    words.append(word)
                    speakers.append(f"synthetic {number}")
        return utterances_of_arrays(waves, sample_rate=self.sample_rate, texts=words, labels=words, speakers=speakers)
