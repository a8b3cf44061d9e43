"""What is special to audio: features, augmentation, encoders, losses, decoding, task models, metrics."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "ConformerEncoder": "nemolet.speech.conformer",
    "ConformerStream": "nemolet.speech.streaming",
    "CTC": "nemolet.speech.losses",
    "CTCRecognizer": "nemolet.speech.models",
    "Encoder": "nemolet.speech.encoder",
    "Features": "nemolet.speech.features",
    "FeatureStream": "nemolet.speech.feature_stream",
    "FrontEnd": "nemolet.speech.front_end",
    "Hybrid": "nemolet.speech.transducer",
    "HybridRecognizer": "nemolet.speech.models",
    "Hypothesis": "nemolet.speech.decoding",
    "KaldiFbank": "nemolet.speech.features",
    "LiveRecognizer": "nemolet.speech.live",
    "LogMel": "nemolet.speech.features",
    "MFCC": "nemolet.speech.features",
    "Normalize": "nemolet.speech.front_end",
    "Recognizer": "nemolet.speech.models",
    "TokenAndDuration": "nemolet.speech.transducer",
    "transcribe": "nemolet.speech.transcription",
    "Transcript": "nemolet.speech.transcription",
    "Transducer": "nemolet.speech.transducer",
    "TransducerDecoder": "nemolet.speech.prediction",
    "TransducerRecognizer": "nemolet.speech.models",
    "Windows": "nemolet.speech.transcription",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"nemolet.speech has no {name!r}; it has {', '.join(_EXPORTS)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


if TYPE_CHECKING:
    from nemolet.speech.conformer import ConformerEncoder
    from nemolet.speech.decoding import Hypothesis
    from nemolet.speech.encoder import Encoder
    from nemolet.speech.feature_stream import FeatureStream
    from nemolet.speech.features import MFCC, Features, KaldiFbank, LogMel
    from nemolet.speech.front_end import FrontEnd, Normalize
    from nemolet.speech.live import LiveRecognizer
    from nemolet.speech.losses import CTC
    from nemolet.speech.models import CTCRecognizer, HybridRecognizer, Recognizer, TransducerRecognizer
    from nemolet.speech.prediction import TransducerDecoder
    from nemolet.speech.streaming import ConformerStream
    from nemolet.speech.transcription import Transcript, Windows, transcribe
    from nemolet.speech.transducer import Hybrid, TokenAndDuration, Transducer
