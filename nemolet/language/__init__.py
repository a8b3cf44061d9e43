"""What is special to text: task models, losses, decoding, metrics."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "CausalLM": "nemolet.language.models",
    "MaskedLM": "nemolet.language.encoders",
    "TextEncoder": "nemolet.language.encoders",
    "EncoderDecoder": "nemolet.language.seq2seq",
    "CrossEntropy": "nemolet.language.losses",
    "TokenLoss": "nemolet.language.losses",
    "LanguageScore": "nemolet.language.metrics",
    "Sampling": "nemolet.language.sampling",
    "Completion": "nemolet.language.decoding",
    "Decoding": "nemolet.language.decoding",
    "generate": "nemolet.language.decoding",
    "stream": "nemolet.language.decoding",
    "Decoder": "nemolet.nn.transformer",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"nemolet.language has no {name!r}; it has {', '.join(_EXPORTS)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


if TYPE_CHECKING:
    from nemolet.language.decoding import Completion, Decoding, generate, stream
    from nemolet.language.encoders import MaskedLM, TextEncoder
    from nemolet.language.losses import CrossEntropy, TokenLoss
    from nemolet.language.metrics import LanguageScore
    from nemolet.language.models import CausalLM
    from nemolet.language.sampling import Sampling
    from nemolet.language.seq2seq import EncoderDecoder
    from nemolet.nn.transformer import Decoder
