"""What is special to audio: features, augmentation, encoders, losses, decoding, task models, metrics."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "AddNoise": "nemolet.speech.augmentation",
    "AngularMargin": "nemolet.speech.losses",
    "AttentivePooling": "nemolet.speech.pooling",
    "AudioClassifier": "nemolet.speech.classifiers",
    "ClassCrossEntropy": "nemolet.speech.losses",
    "ConformerEncoder": "nemolet.speech.conformer",
    "ConformerStream": "nemolet.speech.streaming",
    "ConvEncoder": "nemolet.speech.convolutional",
    "CTC": "nemolet.speech.losses",
    "CTCRecognizer": "nemolet.speech.models",
    "ECAPAEncoder": "nemolet.speech.ecapa",
    "Encoder": "nemolet.speech.encoder",
    "Features": "nemolet.speech.features",
    "FeatureStream": "nemolet.speech.feature_stream",
    "FrontEnd": "nemolet.speech.front_end",
    "Gain": "nemolet.speech.augmentation",
    "Hybrid": "nemolet.speech.transducer",
    "HybridRecognizer": "nemolet.speech.models",
    "Hypothesis": "nemolet.speech.decoding",
    "KaldiFbank": "nemolet.speech.features",
    "LiveRecognizer": "nemolet.speech.live",
    "LogMel": "nemolet.speech.features",
    "LSTMEncoder": "nemolet.speech.recurrent",
    "MeanPooling": "nemolet.speech.pooling",
    "MFCC": "nemolet.speech.features",
    "Normalize": "nemolet.speech.front_end",
    "Recognizer": "nemolet.speech.models",
    "RoomImpulse": "nemolet.speech.augmentation",
    "Shift": "nemolet.speech.augmentation",
    "SpeakerVerifier": "nemolet.speech.classifiers",
    "SpecAugment": "nemolet.speech.augmentation",
    "SpeechDetector": "nemolet.speech.classifiers",
    "SpeedPerturbation": "nemolet.speech.augmentation",
    "TempoPerturbation": "nemolet.speech.augmentation",
    "TokenAndDuration": "nemolet.speech.transducer",
    "transcribe": "nemolet.speech.transcription",
    "Transcript": "nemolet.speech.transcription",
    "Transducer": "nemolet.speech.transducer",
    "TransducerDecoder": "nemolet.speech.prediction",
    "TransducerRecognizer": "nemolet.speech.models",
    "WhiteNoise": "nemolet.speech.augmentation",
    "Windows": "nemolet.speech.transcription",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"nemolet.speech has no {name!r}; it has {', '.join(_EXPORTS)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


if TYPE_CHECKING:
    from nemolet.speech.augmentation import (
        AddNoise,
        Gain,
        RoomImpulse,
        Shift,
        SpecAugment,
        SpeedPerturbation,
        TempoPerturbation,
        WhiteNoise,
    )
    from nemolet.speech.classifiers import AudioClassifier, SpeakerVerifier, SpeechDetector
    from nemolet.speech.conformer import ConformerEncoder
    from nemolet.speech.convolutional import ConvEncoder
    from nemolet.speech.decoding import Hypothesis
    from nemolet.speech.ecapa import ECAPAEncoder
    from nemolet.speech.encoder import Encoder
    from nemolet.speech.feature_stream import FeatureStream
    from nemolet.speech.features import MFCC, Features, KaldiFbank, LogMel
    from nemolet.speech.front_end import FrontEnd, Normalize
    from nemolet.speech.live import LiveRecognizer
    from nemolet.speech.losses import CTC, AngularMargin, ClassCrossEntropy
    from nemolet.speech.models import CTCRecognizer, HybridRecognizer, Recognizer, TransducerRecognizer
    from nemolet.speech.pooling import AttentivePooling, MeanPooling
    from nemolet.speech.prediction import TransducerDecoder
    from nemolet.speech.recurrent import LSTMEncoder
    from nemolet.speech.streaming import ConformerStream
    from nemolet.speech.transcription import Transcript, Windows, transcribe
    from nemolet.speech.transducer import Hybrid, TokenAndDuration, Transducer
