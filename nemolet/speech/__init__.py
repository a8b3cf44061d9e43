"""What is special to audio: features, augmentation, encoders, losses, decoding, task models, metrics."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "AddNoise": "nemolet.speech.augmentation",
    "AngularMargin": "nemolet.speech.losses",
    "align": "nemolet.speech.ctc_prefix",
    "AttentionRecognizer": "nemolet.speech.attention_recognizer",
    "attention_picture": "nemolet.speech.pictures",
    "AttentivePooling": "nemolet.speech.pooling",
    "AudioClassifier": "nemolet.speech.classifiers",
    "Beam": "nemolet.speech.beam",
    "BlankShare": "nemolet.speech.guards",
    "Boost": "nemolet.speech.scorers",
    "character_error_rate": "nemolet.speech.word_error",
    "ClassCrossEntropy": "nemolet.speech.losses",
    "ConformerEncoder": "nemolet.speech.conformer",
    "ConformerStream": "nemolet.speech.streaming",
    "Confusion": "nemolet.speech.metrics",
    "Conv2dEncoder": "nemolet.speech.planar",
    "ConvEncoder": "nemolet.speech.convolutional",
    "CTC": "nemolet.speech.losses",
    "CTCPrefix": "nemolet.speech.ctc_prefix",
    "CTCRecognizer": "nemolet.speech.models",
    "DetectionScore": "nemolet.speech.metrics",
    "ECAPAEncoder": "nemolet.speech.ecapa",
    "SpeechEncoder": "nemolet.speech.encoder",
    "ErrorRate": "nemolet.speech.word_error",
    "evaluate": "nemolet.speech.evaluation",
    "Features": "nemolet.speech.features",
    "FeatureStream": "nemolet.speech.feature_stream",
    "FilterAugment": "nemolet.speech.augmentation",
    "FrequencyWarp": "nemolet.speech.augmentation",
    "FrontEnd": "nemolet.speech.front_end",
    "Gain": "nemolet.speech.augmentation",
    "greedy_ctc": "nemolet.speech.decoding",
    "greedy_transducer": "nemolet.speech.decoding",
    "Hybrid": "nemolet.speech.transducer",
    "HybridRecognizer": "nemolet.speech.models",
    "Hypothesis": "nemolet.speech.decoding",
    "JointAttention": "nemolet.speech.attention_recognizer",
    "KaldiFbank": "nemolet.speech.features",
    "LiveRecognizer": "nemolet.speech.live",
    "LogMel": "nemolet.speech.features",
    "LSTMEncoder": "nemolet.speech.recurrent",
    "MeanPooling": "nemolet.speech.pooling",
    "MFCC": "nemolet.speech.features",
    "NeuralScorer": "nemolet.speech.scorers",
    "NgramModel": "nemolet.speech.scorers",
    "Normalize": "nemolet.speech.front_end",
    "PromptTokens": "nemolet.speech.spectrogram_to_text",
    "Recognizer": "nemolet.speech.models",
    "RoomImpulse": "nemolet.speech.augmentation",
    "Shift": "nemolet.speech.augmentation",
    "SpeakerVerifier": "nemolet.speech.classifiers",
    "SpecAugment": "nemolet.speech.augmentation",
    "SpectrogramToText": "nemolet.speech.spectrogram_to_text",
    "SpeechDetector": "nemolet.speech.classifiers",
    "SpeedPerturbation": "nemolet.speech.augmentation",
    "spectrogram_picture": "nemolet.speech.pictures",
    "SpokenDigits": "nemolet.speech.synthesis",
    "TempoPerturbation": "nemolet.speech.augmentation",
    "TokenAndDuration": "nemolet.speech.transducer",
    "transcribe": "nemolet.speech.transcription",
    "Transcript": "nemolet.speech.transcription",
    "Transducer": "nemolet.speech.transducer",
    "TransducerDecoder": "nemolet.speech.prediction",
    "TransducerRecognizer": "nemolet.speech.models",
    "verification": "nemolet.speech.metrics",
    "WaveEncoder": "nemolet.speech.wave_encoder",
    "Waveform": "nemolet.speech.wave_encoder",
    "WaveStem": "nemolet.speech.wave_encoder",
    "WhisperMel": "nemolet.speech.whisper",
    "Writer": "nemolet.speech.whisper",
    "WhiteNoise": "nemolet.speech.augmentation",
    "Windows": "nemolet.speech.transcription",
    "word_error_rate": "nemolet.speech.word_error",
    "worst_utterances": "nemolet.speech.word_error",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"nemolet.speech has no {name!r}; it has {', '.join(_EXPORTS)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


if TYPE_CHECKING:
    from nemolet.speech.attention_recognizer import AttentionRecognizer, JointAttention
    from nemolet.speech.augmentation import (
        AddNoise,
        FilterAugment,
        FrequencyWarp,
        Gain,
        RoomImpulse,
        Shift,
        SpecAugment,
        SpeedPerturbation,
        TempoPerturbation,
        WhiteNoise,
    )
    from nemolet.speech.beam import Beam
    from nemolet.speech.classifiers import AudioClassifier, SpeakerVerifier, SpeechDetector
    from nemolet.speech.conformer import ConformerEncoder
    from nemolet.speech.convolutional import ConvEncoder
    from nemolet.speech.ctc_prefix import CTCPrefix, align
    from nemolet.speech.decoding import Hypothesis, greedy_ctc, greedy_transducer
    from nemolet.speech.ecapa import ECAPAEncoder
    from nemolet.speech.encoder import SpeechEncoder
    from nemolet.speech.evaluation import evaluate
    from nemolet.speech.feature_stream import FeatureStream
    from nemolet.speech.features import MFCC, Features, KaldiFbank, LogMel
    from nemolet.speech.front_end import FrontEnd, Normalize
    from nemolet.speech.guards import BlankShare
    from nemolet.speech.live import LiveRecognizer
    from nemolet.speech.losses import CTC, AngularMargin, ClassCrossEntropy
    from nemolet.speech.metrics import Confusion, DetectionScore, verification
    from nemolet.speech.models import CTCRecognizer, HybridRecognizer, Recognizer, TransducerRecognizer
    from nemolet.speech.pictures import attention_picture, spectrogram_picture
    from nemolet.speech.planar import Conv2dEncoder
    from nemolet.speech.pooling import AttentivePooling, MeanPooling
    from nemolet.speech.prediction import TransducerDecoder
    from nemolet.speech.recurrent import LSTMEncoder
    from nemolet.speech.scorers import Boost, NeuralScorer, NgramModel
    from nemolet.speech.spectrogram_to_text import PromptTokens, SpectrogramToText
    from nemolet.speech.streaming import ConformerStream
    from nemolet.speech.synthesis import SpokenDigits
    from nemolet.speech.transcription import Transcript, Windows, transcribe
    from nemolet.speech.transducer import Hybrid, TokenAndDuration, Transducer
    from nemolet.speech.wave_encoder import WaveEncoder, Waveform, WaveStem
    from nemolet.speech.whisper import WhisperMel, Writer
    from nemolet.speech.word_error import ErrorRate, character_error_rate, word_error_rate, worst_utterances
