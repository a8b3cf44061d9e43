"""``nemolet transcribe``: recordings to text, with times."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemolet.cli.archives import opened
from nemolet.errors import ConfigError, DataError, GenerationError

if TYPE_CHECKING:
    from nemolet.speech.arrival import Arrived
    from nemolet.speech.transcription import Transcript


@dataclass(frozen=True)
class Settings:
    """What to write down, and how.

    Args:
        archive: a ``.nemolet`` file with a recognizer, or one with Whisper; or its Hugging Face folder.
        audio: a file, a folder, a pattern such as ``calls/*.wav``, or a list of them.
        format: what is written: ``text``, ``json`` with times, ``srt`` or ``vtt``.
        out: a folder for one file for each recording; null prints them.
        pictures: a folder for the spectrogram of each recording with what was written where; null for none.
        window: seconds that are read together where a recording is longer; Whisper has parts of its own length.
        margin: seconds of its neighbours that a window sees.
        batch_size: recordings that are read together.
        beam: hypotheses that are searched; 1 takes the likeliest label at each step.
        language_model: of what follows what: a text with one sentence in a line, or the archive of a causal model
            with the recognizer's tokenizer; null for none.
        language_weight: of its log-probabilities.
        order: labels that a text's n-grams look at.
        boost: phrases that are expected.
        boost_weight: what each of their labels is worth.
        stream: seconds of the pieces in which audio arrives, to see what a live model writes when; null for whole
            recordings.
        language: code of the spoken language, such as ``de``, for Whisper; null to let it find out.
        to_english: whether Whisper writes English whatever is spoken.
        with_adapter: a folder with an adapter of nemolet or PEFT for that model; null for none.
        device: where to compute.
        imports: modules of yours that register classes which the archive names.
    """

    archive: str
    audio: str | list[str]
    format: Literal["text", "json", "srt", "vtt"] = "text"
    out: str | None = None
    pictures: str | None = None
    window: float = 30.0
    margin: float = 2.0
    batch_size: int = 8
    beam: int = 1
    language_model: str | None = None
    language_weight: float = 0.5
    order: int = 4
    boost: list[str] | None = None
    boost_weight: float = 1.0
    stream: float | None = None
    language: str | None = None
    to_english: bool = False
    with_adapter: str | None = None
    device: str = "cpu"
    imports: list[str] | None = None

    CONFIG_RULES = (
        ("window > 0 and margin >= 0", "window is above 0 and margin at least 0"),
        ("batch_size >= 1", "batch_size is at least 1"),
        ("beam >= 1 and order >= 1", "beam and order are at least 1"),
        ("beam == 1 or stream is None", "audio that arrives is decoded with beam=1"),
        ("stream > 0", "stream is above 0; null for whole recordings"),
    )


def run(settings: Settings) -> int:
    """Transcribe every file; one that cannot be read is named and the others go on."""
    model, tokenizer = _opened(settings)
    hear = _hearing(settings, model, tokenizer)
    recordings = files(settings.audio)
    if settings.format in ("srt", "vtt") and settings.out is None and len(recordings) > 1:
        raise ConfigError(
            "the subtitles of several recordings are several files",
            where="out",
            expected="a folder",
            found=f"{len(recordings)} recordings",
            fix="set out=..., or name one recording",
        )
    unread: list[Path] = []
    size = 1 if settings.stream else settings.batch_size
    for batch in _batches(recordings, size, model.sample_rate, unread):
        found = hear([samples for _, samples in batch])
        for (path, _), (transcript, more) in zip(batch, found, strict=True):
            _write(path, transcript, settings, more)
        if settings.pictures is not None:
            _draw(model, batch, [transcript for transcript, _ in found], Path(settings.pictures))
    return 1 if unread else 0


def _batches(
    recordings: list[Path], size: int, sample_rate: int, unread: list[Path]
) -> Iterator[list[tuple[Path, Any]]]:
    """Recordings with their samples, so many at a time; those that cannot be read are named and put aside."""
    batch: list[tuple[Path, Any]] = []
    for path in recordings:
        try:
            batch.append((path, _samples(path, sample_rate)))
        except DataError as error:
            print(error, file=sys.stderr)
            unread.append(path)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _hearing(
    settings: Settings, model: Any, tokenizer: Any
) -> Callable[[list[Any]], list[tuple[Transcript, dict[str, Any]]]]:
    """What makes transcripts of recordings, each with what else there is to write of it."""
    from nemolet.speech.transcription import Windows, transcribe
    from nemolet.speech.whisper import Writer

    windows, search = Windows(settings.window, settings.margin), _search(settings, model, tokenizer)
    size = settings.batch_size

    def hear(audio: list[Any]) -> list[tuple[Transcript, dict[str, Any]]]:
        if settings.stream:
            arrived = [_live(model, tokenizer, samples, settings.stream) for samples in audio]
            return [(each.transcript, {"stream": each.as_json()}) for each in arrived]
        if isinstance(model, Writer):
            times = settings.format in ("srt", "vtt") or (settings.format == "json" and model.times is not None)
            found = model.transcribe(audio, batch_size=size, times=times)
        else:
            found = transcribe(model, tokenizer, audio, search=search, batch_size=size, windows=windows)
        return [(transcript, {}) for transcript in found]

    return hear


def files(audio: str | list[str]) -> list[Path]:
    """The recordings that paths, folders and patterns name.

    Raises:
        DataError: for a path that names none.
    """
    from nemolet.data.audio import SUFFIXES

    found: list[Path] = []
    for name in [audio] if isinstance(audio, str) else audio:
        place = Path(name).expanduser()
        if place.is_dir():
            here = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif place.exists():
            here = [place]
        else:
            anchor = Path(place.anchor)
            here = sorted(p for p in anchor.glob(str(place.relative_to(anchor))) if p.is_file())
        if not here:
            raise DataError(
                "no recording is named so",
                where=name,
                expected="a file, a folder or a pattern of " + " ".join(SUFFIXES),
                fix="check the path; quote a pattern",
            )
        found += here
    return list(dict.fromkeys(found))


def _opened(settings: Settings) -> tuple[Any, Any]:
    """A recognizer, or what writes with a Whisper model; and the tokenizer."""
    from nemolet.speech.models import Recognizer
    from nemolet.speech.spectrogram_to_text import SpectrogramToText
    from nemolet.speech.whisper import Writer

    archive = opened(settings.archive, device=settings.device, adapter=settings.with_adapter)
    model, tokenizer = archive.model.eval(), archive.tokenizer
    if not isinstance(model, Recognizer | SpectrogramToText) or tokenizer is None:
        raise ConfigError(
            "the archive does not hold a recognizer",
            where=settings.archive,
            expected="a model such as nemolet.speech.CTCRecognizer, with its tokenizer",
            found=type(model).__name__ + ("" if tokenizer else " without a tokenizer"),
        )
    whisper = isinstance(model, SpectrogramToText)
    usual: dict[str, Any] = {"language": None, "to_english": None}
    if whisper:
        usual = {"beam": 1, "language_model": None, "boost": None, "stream": None, "pictures": None}
    odd = [name for name, value in usual.items() if (getattr(settings, name) or None) != value]
    if odd:
        raise ConfigError(
            "this model has no such setting",
            where=", ".join(odd),
            expected="greedy text from Whisper; language and to_english for Whisper alone",
            found=", ".join(str(getattr(settings, name)) for name in odd),
        )
    if isinstance(model, SpectrogramToText):
        task: Literal["translate", "transcribe"] = "translate" if settings.to_english else "transcribe"
        return Writer(model, tokenizer, language=settings.language, task=task), tokenizer
    return model, tokenizer


def _search(settings: Settings, model: Any, tokenizer: Any) -> Any:
    """The beam that settings describe, or None for the model's greedy way."""
    if settings.beam == 1:
        if settings.language_model is not None or settings.boost:
            raise ConfigError(
                "a language model and phrases need a beam above 1", where="beam", found=1, fix="set beam=8"
            )
        return None
    from nemolet.speech.beam import Beam
    from nemolet.speech.scorers import Boost

    boost = None
    if settings.boost:
        boost = Boost([tokenizer.encode(phrase) for phrase in settings.boost], weight=settings.boost_weight)
    scorer = None if settings.language_model is None else _scorer(settings, settings.language_model, tokenizer)
    return functools.partial(Beam(settings.beam, scorer, settings.language_weight, boost=boost), model)


def _scorer(settings: Settings, path: str, tokenizer: Any) -> Any:
    from nemolet.archive import load
    from nemolet.speech.scorers import NeuralScorer, NgramModel

    if not path.endswith(".nemolet"):
        place = Path(path)
        if not place.is_file():
            raise DataError("there is no such text", where=path, fix="name a file with one sentence in a line")
        lines = [line.strip() for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
        labels = [tokenizer.encode(line) for line in lines]
        return NgramModel(labels, vocab_size=tokenizer.vocab_size, order=settings.order)
    archive = load(path, device=settings.device)
    if archive.tokenizer is None or archive.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            "the language model has another tokenizer",
            where="language_model",
            expected=tokenizer,
            found=archive.tokenizer,
            fix="train it with tokenizer=file tokenizer.path=... of the recognizer",
        )
    eos = tokenizer.eos_id
    return NeuralScorer(archive.model, vocab_size=tokenizer.vocab_size, start=eos, end_token=eos)


def _samples(path: Path, sample_rate: int) -> Any:
    import torch

    from nemolet.data.audio import load_audio

    samples, _ = load_audio(path, sample_rate=sample_rate)
    audio = torch.from_numpy(samples)
    if not audio.isfinite().all():
        raise DataError("samples are no numbers", where=str(path), expected="finite samples", found="NaN or infinity")
    return audio


def _live(model: Any, tokenizer: Any, audio: Any, seconds: float) -> Arrived:
    """Hand audio over in pieces; what is new after each is shown with its time, and at the end what it took."""
    from nemolet.speech.arrival import arrive

    def show(heard: float, text: str) -> None:
        print(f"{heard:8.2f}s  {text!r}", file=sys.stderr)

    try:
        found = arrive(model, tokenizer, audio, piece=seconds, written=show)
    except GenerationError as error:
        raise ConfigError(
            error.what, where="stream", expected=error.expected, found=error.found, fix=error.fix
        ) from error
    print(found, file=sys.stderr)
    return found


def _draw(model: Any, heard: list[tuple[Path, Any]], found: list[Transcript], folder: Path) -> None:
    from nemolet.speech.pictures import spectrogram_picture

    folder.mkdir(parents=True, exist_ok=True)
    for (path, audio), transcript in zip(heard, found):
        title = f"{path.name}: {transcript.text}"
        spectrogram_picture(model, audio, folder / f"{path.stem}.svg", title=title, tokens=transcript.tokens)


def _write(path: Path, transcript: Transcript, settings: Settings, more: dict[str, Any]) -> None:
    from nemolet.speech.subtitles import srt, vtt

    if settings.format == "json":
        text = json.dumps({"audio_filepath": str(path), **transcript.as_json(), **more}, ensure_ascii=False) + "\n"
    else:
        text = {"text": lambda t: t.text + "\n", "srt": srt, "vtt": vtt}[settings.format](transcript)
    if settings.out is None:
        print(text if settings.format != "text" else f"{path}\t{text}", end="")
        return
    suffix = "txt" if settings.format == "text" else settings.format
    target = Path(settings.out) / f"{path.stem}.{suffix}"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)
