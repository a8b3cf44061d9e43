"""Whisper in use (Radford et al., 2022): its features, the rules of its prompts, and recordings to text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemolet.errors import ConfigError, GenerationError
from nemolet.generation_rules import GenerationRules
from nemolet.module import NeuralModule
from nemolet.speech.features import power_spectrum
from nemolet.speech.filterbank import slaney_mel_filters
from nemolet.speech.spectrogram_to_text import SpectrogramToText
from nemolet.speech.transcription import Piece, Transcript
from nemolet.speech.whisper_times import Segment, Times
from nemolet.tokenizers import Tokenizer
from nemolet.types import AudioBN, SpectrogramBTC


class WhisperMel(NeuralModule):
    """Logarithms of mel energies of a part of fixed length, as Whisper reads them (final).

    Audio is cut off, or filled up with silence. Frames are centred on multiples of the hop, mirrored at the beginning,
    and no energy lies more than eight powers of ten below the largest of its row.

    Args:
        frames: T, of each part.
        bins: C, number of mel filters.
        sample_rate: in hertz.
        fft_size: points of the Fourier transform, and samples of a frame.
        hop: samples from one frame to the next.

    Shape: audio_BN -> ``B T C``; with ``frames`` for so many instead.

    Example:
        >>> WhisperMel(frames=3000)(torch.randn(1, 16000)).shape
        torch.Size([1, 3000, 80])
    """

    def __init__(
        self, *, frames: int, bins: int = 80, sample_rate: int = 16000, fft_size: int = 400, hop: int = 160
    ) -> None:
        super().__init__(sample_rate=sample_rate, C=bins, hop=hop / sample_rate)
        self.frames, self.sample_rate, self.fft_size, self.hop = frames, sample_rate, fft_size, hop
        high = min(8000.0, sample_rate / 2)
        filters = slaney_mel_filters(sample_rate=sample_rate, fft_size=fft_size, bins=bins, high=high)
        self.window: Tensor
        self.filters: Tensor
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    @property
    def samples(self) -> int:
        """Of a part."""
        return self.frames * self.hop

    def forward(self, audio: AudioBN, frames: int | None = None) -> SpectrogramBTC:
        frames = self.frames if frames is None else frames
        samples = frames * self.hop
        whole_BN = F.pad(audio[:, :samples].float(), (0, max(0, samples - audio.shape[1])))
        edge = self.fft_size // 2
        centred_BN = F.pad(whole_BN[:, None], (edge, edge), mode="reflect")[:, 0]
        frames_BTN = centred_BN.unfold(1, self.fft_size, self.hop)[:, :frames]
        power = [power_spectrum(part * self.window, self.fft_size) @ self.filters for part in frames_BTN.split(3000, 1)]
        energy_BTC = torch.cat(power, 1).clamp_min(1e-10).log10()
        return (energy_BTC.clamp_min(energy_BTC.amax((1, 2), keepdim=True) - 8.0) + 4.0) / 4.0


class Written(NamedTuple):
    """The tokens of a window, and the log-probability of each and of the end."""

    tokens: list[int]
    log_probs: list[float]


class Writer:
    """A Whisper model that writes down recordings (final).

    Args:
        model: in evaluation.
        tokenizer: the model's.
        language: code of the spoken language, such as ``"de"``; None to let the model find it in each part.
        task: ``"transcribe"``, or ``"translate"`` to write English whatever is spoken.
        rules: how it writes, but for beams and sampling: each token is the likeliest. Lengths are of what is written,
            without the prompt. None for the rules that the model came with.

    Raises:
        ConfigError: for a language or a task that the model does not know.
        GenerationError: for rules without beginning or end, or that ask for what is not done here.
    """

    def __init__(
        self,
        model: SpectrogramToText,
        tokenizer: Tokenizer,
        *,
        language: str | None = None,
        task: str = "transcribe",
        rules: GenerationRules | None = None,
    ) -> None:
        prompt, rules = model.prompt, rules or model.generation
        for name, value, known in (("language", language, prompt.languages), ("task", task, prompt.tasks)):
            if value is not None and value not in known and (known or value != "transcribe"):
                raise ConfigError(
                    f"the model does not know this {name}",
                    where=name,
                    expected=", ".join(known) or "none: the model knows one only",
                    found=value,
                )
        rules.check()
        self.model, self.tokenizer, self.rules, self.start = model, tokenizer, rules, rules.beginning()
        self.language, self.task = language, task
        self.features = WhisperMel(frames=2 * model.source_frames, bins=model.bins).to(next(model.parameters()).device)
        plain = prompt.no_times
        timed = plain is not None and plain + 1 < model.vocab_size
        self.times = Times(plain + 1, plain, rules.stop[0], prompt.latest) if plain is not None and timed else None

    @property
    def sample_rate(self) -> int:
        """Of the audio it reads, in hertz."""
        return self.features.sample_rate

    def transcribe(self, audio: Sequence[Tensor], *, batch_size: int = 8, times: bool = False) -> list[Transcript]:
        """Texts of recordings.

        Where times are wanted, and for recordings that are longer than what the model reads at once, segments have
        times, and each window begins where the last segment that was finished ends.

        Args:
            audio: recordings ``[N]`` at the sample rate.
            batch_size: windows that are read together.
            times: whether segments have times; the model has to know them.

        Raises:
            GenerationError: where times are wanted of a model without, or a recording is too long for it.
        """
        timed = [row for row, samples in enumerate(audio) if times or len(samples) > self.features.samples]
        if timed and self.times is None:
            raise GenerationError(
                "the model writes no times, so it reads no more than one window",
                where="Writer",
                expected=f"at most {self.features.samples / self.sample_rate:g} s, and text alone",
                found=f"{max(len(audio[row]) for row in timed) / self.sample_rate:g} s, times={times}",
                fix="cut the recording, and ask for format=text",
            )
        plain = [row for row in range(len(audio)) if row not in timed]
        found: dict[int, Transcript] = {}
        for rows in (plain[first : first + batch_size] for first in range(0, len(plain), batch_size)):
            for row, written in zip(rows, self.write([audio[row] for row in rows])):
                found[row] = self._transcript(audio[row], [], self._text(written.tokens), sum(written.log_probs))
        for rows in (timed[first : first + batch_size] for first in range(0, len(timed), batch_size)):
            found |= dict(zip(rows, self._sought([audio[row] for row in rows])))
        return [found[row] for row in range(len(audio))]

    @torch.inference_mode()
    def write(self, audio: Sequence[Tensor]) -> list[Written]:
        """The likeliest token each time for recordings of one window, without times."""
        device, longest = next(self.model.parameters()).device, max(len(part) for part in audio)
        padded_BN = torch.stack([F.pad(part, (0, longest - len(part))) for part in audio])
        memory_BSD = self.model.encode(self.features(padded_BN.to(device)))
        return self._written(memory_BSD, self._languages(memory_BSD), None)

    @torch.inference_mode()
    def _sought(self, audio: Sequence[Tensor]) -> list[Transcript]:
        """Window after window, of all recordings together; the language is that of the first."""
        assert self.times is not None
        device, hop, window = next(self.model.parameters()).device, self.features.hop, self.features.frames
        # Behind each recording lies a window of silence, as the model knows it from its training.
        heard = [self.features(part[None].to(device), window + max(1, len(part) // hop))[0] for part in audio]
        ends, seeks = [len(rows) - window for rows in heard], [0] * len(audio)
        languages: list[int | None] = [None] * len(audio)
        pieces: list[list[Piece]] = [[] for _ in audio]
        scores = [0.0] * len(audio)
        while rows := [row for row, end in enumerate(ends) if seeks[row] < end]:
            memory_BSD = self.model.encode(torch.stack([heard[row][seeks[row] : seeks[row] + window] for row in rows]))
            if not any(seeks):
                languages = self._languages(memory_BSD)
            for row, written in zip(
                rows, self._written(memory_BSD, [languages[row] for row in rows], self.times), strict=True
            ):
                left = min(window, ends[row] - seeks[row])
                segments, stop = self.times.segments(written.tokens, left // 2)
                for segment in segments:
                    size = segment.place + len(segment.tokens) + 2
                    pieces[row].append(self._piece(segment, seeks[row], written.log_probs[segment.place : size]))
                scores[row] += sum(written.log_probs)
                seeks[row] += left if stop is None else min(left, max(2, 2 * stop))
        said = [" ".join(piece.text for piece in each if piece.text) for each in pieces]
        return [self._transcript(*each) for each in zip(audio, pieces, said, scores)]

    def _piece(self, segment: Segment, seek: int, log_probs: Sequence[float]) -> Piece:
        """A segment with seconds, from the frame of the spectrogram at which its window begins."""
        start, end = ((seek + 2 * at) * self.features.hop / self.sample_rate for at in (segment.start, segment.end))
        confidence = math.exp(sum(log_probs) / max(1, len(log_probs)))
        return Piece(self._text(segment.tokens), round(start, 4), round(end, 4), round(confidence, 4))

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens).strip()

    def _transcript(self, samples: Tensor, pieces: Sequence[Piece], text: str, score: float) -> Transcript:
        spoken = tuple(piece for piece in pieces if piece.text)
        return Transcript(text, (), (), round(len(samples) / self.sample_rate, 4), score, spoken)

    def _written(self, memory_BSD: Tensor, languages: Sequence[int | None], times: Times | None) -> list[Written]:
        """The likeliest token each time.

        Raises:
            GenerationError: for a prompt that leaves no room for a text.
        """
        rules, prompts = self.rules, self._prompts(languages, times)
        before, device = len(prompts[0]), memory_BSD.device
        room = min(rules.room(0) or self.model.context, self.model.context - before)
        if room < 1:
            raise GenerationError("the prompt leaves no room for a text", where="Writer", found=before)
        cache = self.model.new_cache(len(memory_BSD), before + room)
        written = [Written([], []) for _ in memory_BSD]
        tokens_BT, open_rows = torch.tensor(prompts, device=device), set(range(len(memory_BSD)))
        for _ in range(room):
            logits_BV = self.model.decode(tokens_BT, memory_BSD, cache=cache, last_only=True)[:, -1].float()
            texts = [[*prompt, *each.tokens] for prompt, each in zip(prompts, written)]
            logits_BV = rules.bound(logits_BV, [(text, before, before + room) for text in texts])
            if times is not None:
                times.bound(logits_BV, [each.tokens for each in written])
            best_B, token_B = logits_BV.log_softmax(-1).max(-1)
            for row in sorted(open_rows):
                written[row].log_probs.append(float(best_B[row]))
                if int(token_B[row]) in rules.stop:
                    open_rows.remove(row)
                else:
                    written[row].tokens.append(int(token_B[row]))
            if not open_rows:
                break
            tokens_BT = token_B[:, None]
        return written

    def _languages(self, memory_BSD: Tensor) -> list[int | None]:
        """The token of the language of each row, given or heard; None for a model that knows one only."""
        known = self.model.prompt.languages
        if not known:
            return [None] * len(memory_BSD)
        if self.language is not None:
            return [known[self.language]] * len(memory_BSD)
        ids = torch.tensor(list(known.values()), device=memory_BSD.device)
        start_B1 = torch.full((len(memory_BSD), 1), self.start, device=memory_BSD.device)
        best_B = self.model.decode(start_B1, memory_BSD)[:, -1][:, ids].argmax(-1)
        return [int(token) for token in ids[best_B]]

    def _prompts(self, languages: Sequence[int | None], times: Times | None) -> list[list[int]]:
        """What stands before each text: beginning, language, task, and whether no times are wanted."""
        known = self.model.prompt
        after = [known.tasks[self.task]] if self.task in known.tasks else []
        after += [] if known.no_times is None or times is not None else [known.no_times]
        return [[self.start, *([] if each is None else [each]), *after] for each in languages]
