"""How good a model of speech is on recordings, in the numbers of its task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemolet.errors import DataError
from nemolet.module import NeuralModule
from nemolet.speech.classifiers import AudioClassifier, SpeakerVerifier, SpeechDetector
from nemolet.speech.features import masked
from nemolet.speech.metrics import Confusion, DetectionScore, verification
from nemolet.speech.models import Recognizer
from nemolet.speech.transcription import Search
from nemolet.speech.word_error import character_error_rate, word_error_rate, worst_utterances
from nemolet.tokenizers.base import Tokenizer
from nemolet.types import IGNORED

Batches = Iterable[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Report:
    """What was found (final).

    Args:
        numbers: by name.
        text: the same for people, with the worst mistakes.
        entries: one for each utterance, in the order they were read.
    """

    numbers: Mapping[str, float]
    text: str
    entries: tuple[Mapping[str, Any], ...] = ()


def evaluates(model: NeuralModule) -> bool:
    """Whether :func:`evaluate` knows the task of a model."""
    return isinstance(model, (Recognizer, AudioClassifier, SpeakerVerifier, SpeechDetector))


def evaluate(
    model: NeuralModule, batches: Batches, *, tokenizer: Tokenizer | None = None, search: Search | None = None
) -> Report:
    """Run a model over recordings and count.

    Args:
        model: of speech.
        batches: ``audio``, ``audio_lengths`` and ``labels``.
        tokenizer: a recognizer's.
        search: how a recognizer finds labels; None for its greedy way.

    Raises:
        DataError: for a model of another kind, or without its tokenizer.
    """
    model.eval()
    with torch.inference_mode():
        if isinstance(model, Recognizer) and tokenizer is not None:
            return _recognizer(model, batches, tokenizer, search or model.greedy)
        if isinstance(model, AudioClassifier):
            return _classifier(model, batches)
        if isinstance(model, SpeechDetector):
            return _detector(model, batches)
        if isinstance(model, SpeakerVerifier):
            return _verifier(model, batches)
    raise DataError(
        "this model is not evaluated on recordings",
        where=model.label,
        expected="a recognizer with its tokenizer, a classifier, a detector or a verifier",
        found=type(model).__name__,
    )


def _recognizer(model: Recognizer, batches: Batches, tokenizer: Tokenizer, search: Search) -> Report:
    """Word and character errors; blanks alone are told, since they mean that nothing was learned."""
    said: list[str] = []
    heard: list[str] = []
    for batch in batches:
        encoded = model.encode(*_inputs(model, batch))
        heard += [tokenizer.decode(found.labels).strip() for found in search(encoded)]
        said += [tokenizer.decode([label for label in row if label != IGNORED]) for row in batch["labels"].tolist()]
    words, characters = word_error_rate(said, heard), character_error_rate(said, heard)
    empty = sum(not text for text in heard)
    lines = [f"word error rate {words}", f"character error rate {characters}"]
    if empty:
        lines.append(f"nothing was heard in {empty} of {len(heard)} utterances")
    lines += ["", worst_utterances(said, heard, count=5)]
    entries = tuple({"text": right, "pred_text": found} for right, found in zip(said, heard))
    numbers = {"word_error_rate": words.rate, "character_error_rate": characters.rate}
    return Report(numbers, "\n".join(lines), entries)


def _classifier(model: AudioClassifier, batches: Batches) -> Report:
    labels, found = _collected(batches, lambda batch: model(*_inputs(model, batch)).argmax(-1))
    confusion = Confusion.of(labels, found, names=model.names)
    mistakes = ", ".join(f"{right} as {taken} ({count})" for right, taken, count in confusion.worst())
    text = f"accuracy {100 * confusion.accuracy:.2f}% of {len(labels)}\n\n{confusion}"
    entries = tuple({"label": model.names[a], "pred_label": model.names[b]} for a, b in zip(labels, found))
    return Report({"accuracy": confusion.accuracy}, text + (f"\ncommonest: {mistakes}" if mistakes else ""), entries)


def _verifier(model: SpeakerVerifier, batches: Batches) -> Report:
    """Every pair of utterances once."""
    labels, vectors = _collected(batches, lambda batch: model.vectors(*_inputs(model, batch)))
    one, other = np.triu_indices(len(labels), k=1)
    scores = (vectors[one] * vectors[other]).sum(-1)
    result = verification(scores, labels[one] == labels[other])
    text = (
        f"equal error rate {100 * result.equal_error_rate:.2f}%  minDCF {result.minimum_cost:.3f}  "
        f"threshold {result.threshold:.3f}  over {len(one):,} pairs"
    )
    return Report({"equal_error_rate": result.equal_error_rate, "minimum_cost": result.minimum_cost}, text)


def _detector(model: SpeechDetector, batches: Batches) -> Report:
    """Beside the model, loudness alone at the threshold that is best for just these recordings."""
    labels, found, loudness = [], [], []
    hop = model.front_end.features.framing.hop * model.encoder.factor
    for batch in batches:
        audio, lengths = _inputs(model, batch)
        frames = batch["labels"].shape[1]
        labels.append(batch["labels"].numpy().ravel())
        found.append(model(audio, lengths).logits[:, :frames].argmax(-1).cpu().numpy().ravel())
        loudness.append(_energy(masked(audio, lengths), hop, frames).cpu().numpy().ravel())
    score = DetectionScore.of_frames(np.concatenate(labels), np.concatenate(found))
    baseline = loudest(np.concatenate(labels), np.concatenate(loudness))
    text = f"speech detection  {score}\nby energy alone   {baseline}"
    return Report({"f1": score.f1, "detection_error": score.error_rate, "energy_f1": baseline.f1}, text)


def loudest(labels: NDArray[np.int64], loudness: NDArray[np.float32]) -> DetectionScore:
    """Speech is what is louder than a threshold: the one that fits these labels best."""
    thresholds = np.quantile(loudness[labels >= 0], np.linspace(0.01, 0.99, 99))
    return max((DetectionScore.of_frames(labels, loudness > level) for level in thresholds), key=lambda s: s.f1)


def _energy(audio_BN: Tensor, hop: int, frames: int) -> Tensor:
    """Mean power around each frame, over five of them, [B, T]."""
    padded_BN = torch.nn.functional.pad(audio_BN.square(), (0, max(0, frames * hop - audio_BN.shape[1])))
    power_BT = padded_BN[:, : frames * hop].unflatten(1, (frames, hop)).mean(-1)
    return torch.nn.functional.avg_pool1d(power_BT[:, None], 5, stride=1, padding=2)[:, 0]


def _inputs(model: NeuralModule, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    return batch["audio"].to(device), batch["audio_lengths"].to(device)


def _collected(
    batches: Batches, run: Callable[[Mapping[str, Tensor]], Tensor]
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    pairs = [(batch["labels"].numpy(), run(batch).cpu().numpy()) for batch in batches]
    return np.concatenate([labels for labels, _ in pairs]), np.concatenate([found for _, found in pairs])
