"""What is special to text: task models, losses, decoding, metrics."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "CausalLM": "nemolet.language.models",
    "ClassLoss": "nemolet.language.classification",
    "Completion": "nemolet.language.decoding",
    "CrossEntropy": "nemolet.language.losses",
    "Decoder": "nemolet.nn.transformer",
    "Decoding": "nemolet.language.decoding",
    "IntentAccuracy": "nemolet.language.tagging",
    "LabelF1": "nemolet.language.classification",
    "LanguageScore": "nemolet.language.metrics",
    "MultiLabelLoss": "nemolet.language.classification",
    "NgramEmbedding": "nemolet.language.ngrams",
    "NgramEncoder": "nemolet.language.ngrams",
    "Pool": "nemolet.language.classification",
    "RequestLoss": "nemolet.language.tagging",
    "RequestTagger": "nemolet.language.tagging",
    "Sampling": "nemolet.language.sampling",
    "SpanF1": "nemolet.language.spans",
    "TagLoss": "nemolet.language.tagging",
    "TextClassifier": "nemolet.language.classification",
    "TokenClassifier": "nemolet.language.tagging",
    "TokenLoss": "nemolet.language.losses",
    "chain_log_likelihood": "nemolet.language.crf",
    "generate": "nemolet.language.decoding",
    "likeliest_chain": "nemolet.language.crf",
    "span_score": "nemolet.language.spans",
    "spans_of": "nemolet.language.spans",
    "stream": "nemolet.language.decoding",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"nemolet.language has no {name!r}; it has {', '.join(_EXPORTS)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


if TYPE_CHECKING:
    from nemolet.language.classification import ClassLoss, LabelF1, MultiLabelLoss, Pool, TextClassifier
    from nemolet.language.crf import chain_log_likelihood, likeliest_chain
    from nemolet.language.decoding import Completion, Decoding, generate, stream
    from nemolet.language.losses import CrossEntropy, TokenLoss
    from nemolet.language.metrics import LanguageScore
    from nemolet.language.models import CausalLM
    from nemolet.language.ngrams import NgramEmbedding, NgramEncoder
    from nemolet.language.sampling import Sampling
    from nemolet.language.spans import SpanF1, span_score, spans_of
    from nemolet.language.tagging import IntentAccuracy, RequestLoss, RequestTagger, TagLoss, TokenClassifier
    from nemolet.nn.transformer import Decoder
