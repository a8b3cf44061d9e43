"""Whisper in use (Radford et al., 2022): its features, the rules of its prompts, and recordings to text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemolet.errors import ConfigError, GenerationError
from nemolet.module import NeuralModule
from nemolet.speech.features import power_spectrum
from nemolet.speech.filterbank import slaney_mel_filters
from nemolet.speech.spectrogram_to_text import SpectrogramToText
from nemolet.speech.transcription import Transcript
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

    Shape: audio_BN -> ``B T C``.

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

    def forward(self, audio: AudioBN) -> SpectrogramBTC:
        whole_BN = F.pad(audio[:, : self.samples].float(), (0, max(0, self.samples - audio.shape[1])))
        edge = self.fft_size // 2
        centred_BN = F.pad(whole_BN[:, None], (edge, edge), mode="reflect")[:, 0]
        frames_BTN = centred_BN.unfold(1, self.fft_size, self.hop)[:, : self.frames]
        power_BTF = power_spectrum(frames_BTN * self.window, self.fft_size)
        energy_BTC = (power_BTF @ self.filters).clamp_min(1e-10).log10()
        return (energy_BTC.clamp_min(energy_BTC.amax((1, 2), keepdim=True) - 8.0) + 4.0) / 4.0


@dataclass(frozen=True)
class WritingRules:
    """What a Whisper model is to be told before it writes, and what it may not write.

    Args:
        start: the first token.
        end: the last one.
        languages: token of each language, by its code; none for a model that knows one only.
        tasks: token of each task.
        plain: the token after which no times are written; None where there is none.
        never: tokens that are not written.
        not_first: tokens that are not written at the beginning.
        longest: most tokens with the prompt.
    """

    start: int
    end: int
    languages: Mapping[str, int] = field(default_factory=dict)
    tasks: Mapping[str, int] = field(default_factory=dict)
    plain: int | None = None
    never: tuple[int, ...] = ()
    not_first: tuple[int, ...] = ()
    longest: int = 448

    @classmethod
    def read(cls, files: Mapping[str, bytes], where: str) -> WritingRules:
        """The rules in the generation config that came with a model.

        Raises:
            ConfigError: where there is none, or it lacks the tokens of beginning and end.
        """
        known: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json"):
            known |= {key: value for key, value in json.loads(files.get(name, b"{}")).items() if value is not None}
        lacking = [key for key in ("decoder_start_token_id", "eos_token_id") if key not in known]
        if lacking:
            raise ConfigError(
                "it is not known how this model begins and ends a text",
                where=where,
                expected="generation_config.json with decoder_start_token_id and eos_token_id",
                found=f"no {lacking[0]}",
                fix="convert the whole folder, with the small files beside the weights",
            )
        end = known["eos_token_id"]
        return cls(
            start=known["decoder_start_token_id"],
            end=end[0] if isinstance(end, list) else end,
            languages={name.strip("<|>"): token for name, token in known.get("lang_to_id", {}).items()},
            tasks=known.get("task_to_id", {}),
            plain=known.get("no_timestamps_token_id"),
            never=tuple(known.get("suppress_tokens", ())),
            not_first=tuple(known.get("begin_suppress_tokens", ())),
            longest=known.get("max_length", 448),
        )


class Writer:
    """A Whisper model that writes down recordings (final).

    Args:
        model: in evaluation.
        tokenizer: the model's.
        rules: of its prompts.
        language: code of the spoken language, such as ``"de"``; None to let the model find it in each part.
        task: ``"transcribe"``, or ``"translate"`` to write English whatever is spoken.

    Raises:
        ConfigError: for a language or a task that the model does not know.
    """

    def __init__(
        self,
        model: SpectrogramToText,
        tokenizer: Tokenizer,
        rules: WritingRules,
        *,
        language: str | None = None,
        task: str = "transcribe",
    ) -> None:
        for name, value, known in (("language", language, rules.languages), ("task", task, rules.tasks)):
            if value is not None and value not in known and (known or value != "transcribe"):
                raise ConfigError(
                    f"the model does not know this {name}",
                    where=name,
                    expected=", ".join(known) or "none: the model knows one only",
                    found=value,
                )
        self.model, self.tokenizer, self.rules, self.language, self.task = model, tokenizer, rules, language, task
        self.features = WhisperMel(frames=2 * model.source_frames, bins=model.bins).to(next(model.parameters()).device)

    @property
    def sample_rate(self) -> int:
        """Of the audio it reads, in hertz."""
        return self.features.sample_rate

    def transcribe(self, audio: Sequence[Tensor], *, batch_size: int = 8) -> list[Transcript]:
        """Texts of recordings, each cut into parts as long as the model reads; without times of words.

        Args:
            audio: recordings ``[N]`` at the sample rate.
            batch_size: parts that are read together.
        """
        parts = [(row, part) for row, samples in enumerate(audio) for part in samples.split(self.features.samples)]
        texts: list[list[str]] = [[] for _ in audio]
        scores = [0.0] * len(audio)
        for first in range(0, len(parts), batch_size):
            batch = parts[first : first + batch_size]
            for (row, _), (tokens, score) in zip(batch, self.write([part for _, part in batch]), strict=True):
                texts[row].append(self.tokenizer.decode(tokens).strip())
                scores[row] += score
        return [
            Transcript(" ".join(filter(None, said)), (), (), round(len(samples) / self.sample_rate, 4), score)
            for said, samples, score in zip(texts, audio, scores)
        ]

    @torch.inference_mode()
    def write(self, audio: Sequence[Tensor]) -> list[tuple[list[int], float]]:
        """The likeliest token each time for parts of recordings, and the log-probability of all.

        Raises:
            GenerationError: for a prompt that leaves no room for a text.
        """
        rules, device = self.rules, next(self.model.parameters()).device
        longest = max(len(part) for part in audio)
        padded_BN = torch.stack([F.pad(part, (0, longest - len(part))) for part in audio])
        memory_BSD = self.model.encode(self.features(padded_BN.to(device)))
        tokens_BT = self._prompts(memory_BSD)
        room = min(rules.longest, self.model.context) - tokens_BT.shape[1]
        if room < 1:
            raise GenerationError("the prompt leaves no room for a text", where="Writer", found=tokens_BT.shape[1])
        cache = self.model.new_cache(len(audio), tokens_BT.shape[1] + room)
        written: list[list[int]] = [[] for _ in audio]
        scores, open_rows = [0.0] * len(audio), set(range(len(audio)))
        for step in range(room):
            logits_BV = self.model.decode(tokens_BT, memory_BSD, cache=cache, last_only=True)[:, -1].float()
            logits_BV[:, list(rules.never) + (list(rules.not_first) if step == 0 else [])] = -torch.inf
            best_B, token_B = logits_BV.log_softmax(-1).max(-1)
            for row in sorted(open_rows):
                token = int(token_B[row])
                scores[row] += float(best_B[row])
                if token == rules.end:
                    open_rows.remove(row)
                else:
                    written[row].append(token)
            if not open_rows:
                break
            tokens_BT = token_B[:, None]
        return list(zip(written, scores))

    def _prompts(self, memory_BSD: Tensor) -> Tensor:
        """What stands before each text: beginning, language, task, and that no times are wanted. Shape: [B, T]."""
        rules = self.rules
        start_B1 = torch.full((len(memory_BSD), 1), rules.start, device=memory_BSD.device)
        columns = [start_B1]
        if rules.languages:
            ids = torch.tensor(list(rules.languages.values()), device=memory_BSD.device)
            if self.language is None:
                heard_BL = self.model.decode(start_B1, memory_BSD)[:, -1][:, ids]
                columns.append(ids[heard_BL.argmax(-1)][:, None])
            else:
                columns.append(torch.full_like(start_B1, rules.languages[self.language]))
        after = [rules.tasks[self.task]] if self.task in rules.tasks else []
        after += [] if rules.plain is None else [rules.plain]
        return torch.cat([*columns, *(torch.full_like(start_B1, token) for token in after)], 1)
