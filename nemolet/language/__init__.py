"""What is special to text: task models, losses, decoding, metrics."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "AnswerLoss": "nemolet.language.answering",
    "AttentionMap": "nemolet.language.attention_maps",
    "Beam": "nemolet.generation_rules",
    "Calibration": "nemolet.language.mistakes",
    "CausalLM": "nemolet.language.models",
    "LanguageModel": "nemolet.language.language_model",
    "ClassLoss": "nemolet.language.classification",
    "Completion": "nemolet.language.decoding",
    "Confusion": "nemolet.language.mistakes",
    "Constraints": "nemolet.language.constraints",
    "ContrastiveLoss": "nemolet.language.embedding",
    "CrossEntropy": "nemolet.language.losses",
    "Decoder": "nemolet.nn.transformer",
    "Decoding": "nemolet.language.decoding",
    "DistillationLoss": "nemolet.language.distillation",
    "Distilled": "nemolet.language.distillation",
    "EncoderDecoder": "nemolet.language.seq2seq",
    "ExactSpan": "nemolet.language.answering",
    "GenerationRules": "nemolet.generation_rules",
    "IntentAccuracy": "nemolet.language.tagging",
    "LabelF1": "nemolet.language.classification",
    "LanguageScore": "nemolet.language.metrics",
    "Likelihood": "nemolet.language.likelihood",
    "MaskedLM": "nemolet.language.encoders",
    "MultiLabelLoss": "nemolet.language.classification",
    "NearestIsRight": "nemolet.language.embedding",
    "NgramEmbedding": "nemolet.language.ngrams",
    "NgramEncoder": "nemolet.language.ngrams",
    "Pool": "nemolet.language.classification",
    "PreferenceLoss": "nemolet.language.preference",
    "PreferenceModel": "nemolet.language.preference",
    "PromptTuned": "nemolet.language.prompt_tuning",
    "QuestionAnswerer": "nemolet.language.answering",
    "RequestLoss": "nemolet.language.tagging",
    "RequestTagger": "nemolet.language.tagging",
    "RewardModel": "nemolet.language.reward",
    "RewardPairs": "nemolet.language.reward",
    "Sampling": "nemolet.sampling",
    "SentenceEmbedder": "nemolet.language.embedding",
    "SpanF1": "nemolet.language.spans",
    "SpelledEmbedding": "nemolet.language.spelling",
    "SpellingEncoder": "nemolet.language.spelling",
    "TagLoss": "nemolet.language.tagging",
    "TaskModel": "nemolet.language.tasks",
    "TextClassifier": "nemolet.language.classification",
    "TextEncoder": "nemolet.language.encoders",
    "TokenClassifier": "nemolet.language.tagging",
    "TokenLoss": "nemolet.language.losses",
    "Translator": "nemolet.language.translation",
    "beam_search": "nemolet.language.beam",
    "bleu": "nemolet.language.scores",
    "chain_log_likelihood": "nemolet.language.crf",
    "chrf": "nemolet.language.scores",
    "exact_match": "nemolet.language.scores",
    "explain": "nemolet.language.saliency",
    "fill": "nemolet.language.masked",
    "generate": "nemolet.language.decoding",
    "likelihoods": "nemolet.language.likelihood",
    "likeliest_chain": "nemolet.language.crf",
    "load_prompt": "nemolet.language.prompt_tuning",
    "nearest_vectors": "nemolet.language.embedding",
    "save_prompt": "nemolet.language.prompt_tuning",
    "span_score": "nemolet.language.spans",
    "spans_of": "nemolet.language.spans",
    "stream": "nemolet.language.decoding",
    "word_f1": "nemolet.language.scores",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"nemolet.language has no {name!r}; it has {', '.join(_EXPORTS)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


if TYPE_CHECKING:
    from nemolet.generation_rules import Beam, GenerationRules
    from nemolet.language.answering import AnswerLoss, ExactSpan, QuestionAnswerer
    from nemolet.language.attention_maps import AttentionMap
    from nemolet.language.beam import beam_search
    from nemolet.language.classification import ClassLoss, LabelF1, MultiLabelLoss, Pool, TextClassifier
    from nemolet.language.constraints import Constraints
    from nemolet.language.crf import chain_log_likelihood, likeliest_chain
    from nemolet.language.decoding import Completion, Decoding, generate, stream
    from nemolet.language.distillation import DistillationLoss, Distilled
    from nemolet.language.embedding import ContrastiveLoss, NearestIsRight, SentenceEmbedder, nearest_vectors
    from nemolet.language.encoders import MaskedLM, TextEncoder
    from nemolet.language.language_model import LanguageModel
    from nemolet.language.likelihood import Likelihood, likelihoods
    from nemolet.language.losses import CrossEntropy, TokenLoss
    from nemolet.language.masked import fill
    from nemolet.language.metrics import LanguageScore
    from nemolet.language.mistakes import Calibration, Confusion
    from nemolet.language.models import CausalLM
    from nemolet.language.ngrams import NgramEmbedding, NgramEncoder
    from nemolet.language.preference import PreferenceLoss, PreferenceModel
    from nemolet.language.prompt_tuning import PromptTuned, load_prompt, save_prompt
    from nemolet.language.reward import RewardModel, RewardPairs
    from nemolet.language.saliency import explain
    from nemolet.language.scores import bleu, chrf, exact_match, word_f1
    from nemolet.language.seq2seq import EncoderDecoder
    from nemolet.language.spans import SpanF1, span_score, spans_of
    from nemolet.language.spelling import SpelledEmbedding, SpellingEncoder
    from nemolet.language.tagging import IntentAccuracy, RequestLoss, RequestTagger, TagLoss, TokenClassifier
    from nemolet.language.tasks import TaskModel
    from nemolet.language.translation import Translator
    from nemolet.nn.transformer import Decoder
    from nemolet.sampling import Sampling
