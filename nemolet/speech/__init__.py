"""What is special to audio: features, augmentation, encoders, losses, decoding, task models, metrics."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "CTC": "nemolet.speech.losses",
    "FeatureStream": "nemolet.speech.feature_stream",
    "Features": "nemolet.speech.features",
    "FrontEnd": "nemolet.speech.front_end",
    "KaldiFbank": "nemolet.speech.features",
    "LogMel": "nemolet.speech.features",
    "MFCC": "nemolet.speech.features",
    "Normalize": "nemolet.speech.front_end",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"nemolet.speech has no {name!r}; it has {', '.join(_EXPORTS)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


if TYPE_CHECKING:
    from nemolet.speech.feature_stream import FeatureStream
    from nemolet.speech.features import MFCC, Features, KaldiFbank, LogMel
    from nemolet.speech.front_end import FrontEnd, Normalize
    from nemolet.speech.losses import CTC
