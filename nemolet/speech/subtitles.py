"""Transcripts as subtitles: SubRip and WebVTT."""

from __future__ import annotations

from typing import NamedTuple

from nemolet.speech.transcription import Piece, Transcript

MOST_CHARACTERS, MOST_SECONDS, PAUSE = 84, 7.0, 1.0  # of one cue; a longer pause begins another


class Cue(NamedTuple):
    """A line of text that is shown from one second to another."""

    start: float
    end: float
    text: str


def cues(transcript: Transcript) -> list[Cue]:
    """Words in lines that can be read: neither long nor over a pause. Segments are lines already.

    Example:
        >>> words = (Piece("one", 0.0, 0.4, 1.0), Piece("two", 0.5, 0.9, 1.0), Piece("six", 3.0, 3.4, 1.0))
        >>> [cue.text for cue in cues(Transcript("one two six", words, (), 4.0, 0.0))]
        ['one two', 'six']
    """
    if transcript.segments:
        return [Cue(segment.start, segment.end, segment.text) for segment in transcript.segments]
    lines: list[list[Piece]] = []
    for word in transcript.words:
        line = lines[-1] if lines else []
        text = " ".join(w.text for w in (*line, word))
        fits = line and word.start - line[-1].end <= PAUSE and word.end - line[0].start <= MOST_SECONDS
        if fits and len(text) <= MOST_CHARACTERS:
            line.append(word)
        else:
            lines.append([word])
    return [Cue(line[0].start, line[-1].end, " ".join(word.text for word in line)) for line in lines]


def srt(transcript: Transcript) -> str:
    """As a SubRip file."""
    blocks = [
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{cue.text}\n"
        for number, cue in enumerate(cues(transcript), 1)
    ]
    return "\n".join(blocks)


def vtt(transcript: Transcript) -> str:
    """As a WebVTT file."""
    blocks = [
        f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{_escaped(cue.text)}\n" for cue in cues(transcript)
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def _clock(seconds: float, point: str) -> str:
    """Hours, minutes, seconds and thousandths."""
    thousandths = round(seconds * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
