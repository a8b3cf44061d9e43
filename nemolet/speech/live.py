"""Recognition of audio that is still arriving."""

from __future__ import annotations

import torch
from torch import Tensor

from nemolet.errors import GenerationError
from nemolet.speech.conformer import ConformerEncoder
from nemolet.speech.decoding import Hypothesis, greedy_ctc, greedy_transducer
from nemolet.speech.feature_stream import FeatureStream
from nemolet.speech.models import CTCRecognizer, HybridRecognizer, Recognizer, TransducerRecognizer
from nemolet.speech.prediction import History
from nemolet.speech.streaming import ConformerStream


class LiveRecognizer:
    """Labels of one recording that arrives in chunks; equal to those of the whole (final).

    Args:
        model: with an encoder that reads in chunks, and features that are not normalised over the utterance.

    Attributes:
        hypothesis: everything that was written so far.

    Raises:
        GenerationError: for a model that has to see the whole recording.
    """

    def __init__(self, model: Recognizer) -> None:
        front_end, encoder = model.front_end, model.encoder
        normalize = front_end.normalize
        if not isinstance(encoder, ConformerEncoder) or encoder.chunk is None or front_end.needs_whole:
            raise GenerationError(
                "the model has to see the whole recording",
                where=model.label,
                expected="a Conformer with chunk=..., features with fixed statistics or none, audio as it is",
                found=f"{type(encoder).__name__}, normalised over {normalize.over if normalize else 'nothing'}, "
                f"level={front_end.level}",
                fix="train one with encoder.chunk=..., front_end.level=null, front_end.normalize=null or over=fixed",
            )
        if not isinstance(model, (CTCRecognizer, TransducerRecognizer, HybridRecognizer)):
            raise GenerationError(
                "the decoder looks at the whole recording",
                where=model.label,
                expected="CTC or a transducer",
                found=type(model).__name__,
                fix="train model=conformer_ctc, conformer_transducer or conformer_hybrid",
            )
        if isinstance(model, TransducerRecognizer) and model.durations is not None:
            raise GenerationError(
                "a model that skips frames is not read in chunks", where=model.label, fix="use RNN-T or CTC"
            )
        self.model, self.normalize = model, normalize
        self.features, self.encoder = FeatureStream(front_end.features), ConformerStream(encoder)
        self.hypothesis = Hypothesis()
        self.frames = 0
        self.last_logits: Tensor | None = None
        self.history: History | None = None
        if isinstance(model, (TransducerRecognizer, HybridRecognizer)) and not model.decode_by_ctc:
            self.history = model.decoder.start(1)

    def push(self, audio_N: Tensor) -> list[int]:
        """Take samples; returns the labels that are new."""
        return self._decode(self.encoder.push(self._normalized(self.features.push(audio_N[None]))))

    def flush(self) -> list[int]:
        """The labels that were waiting for the end."""
        rest_BTC = self._normalized(self.features.flush())
        return self._decode(torch.cat((self.encoder.push(rest_BTC), self.encoder.flush()), 1))

    def _normalized(self, features_BTC: Tensor) -> Tensor:
        if self.normalize is None or not features_BTC.shape[1]:
            return features_BTC
        out: Tensor = self.normalize(features_BTC, torch.tensor([features_BTC.shape[1]], device=features_BTC.device))
        return out

    @torch.inference_mode()
    def _decode(self, hidden_BTD: Tensor) -> list[int]:
        length = hidden_BTD.shape[1]
        if not length:
            return []
        new = self._by_labels(hidden_BTD) if self.history is not None else self._by_frames(hidden_BTD)
        self.hypothesis.labels += new.labels
        self.hypothesis.first += [self.frames + frame for frame in new.first]
        self.hypothesis.last += [self.frames + frame for frame in new.last]
        self.hypothesis.confidence += new.confidence
        self.hypothesis.score += new.score
        self.frames += length
        return new.labels

    def _by_labels(self, hidden_BTD: Tensor) -> Hypothesis:
        model = self.model
        assert isinstance(model, (TransducerRecognizer, HybridRecognizer))
        lengths_B = torch.tensor([hidden_BTD.shape[1]], device=hidden_BTD.device)
        return greedy_transducer(
            model.decoder, hidden_BTD, lengths_B, max_symbols=model.max_symbols, history=self.history
        )[0]

    def _by_frames(self, hidden_BTD: Tensor) -> Hypothesis:
        """CTC goes on from the last frame: a label that only lasts longer is not new."""
        model = self.model
        assert isinstance(model, (CTCRecognizer, HybridRecognizer))
        logits_BTV = model.frame_logits(hidden_BTD)
        overlap = 0 if self.last_logits is None else 1
        seen_BTV = logits_BTV if self.last_logits is None else torch.cat((self.last_logits, logits_BTV), 1)
        new = greedy_ctc(seen_BTV, torch.tensor([seen_BTV.shape[1]], device=seen_BTV.device))[0]
        if self.last_logits is not None:
            new.score -= float(self.last_logits.float().log_softmax(-1).max())
        self.last_logits = logits_BTV[:, -1:]
        if overlap and new.first and new.first[0] == 0:
            self.hypothesis.last[-1] = self.frames + new.last[0] - 1
            self.hypothesis.confidence[-1] = max(self.hypothesis.confidence[-1], new.confidence[0])
            new = Hypothesis(new.labels[1:], new.first[1:], new.last[1:], new.confidence[1:], new.score)
        new.first = [frame - overlap for frame in new.first]
        new.last = [frame - overlap for frame in new.last]
        return new
