"""Token files, packing, blending and loaders; each knows how to resume."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "FeatureCorpus": "nemolet.data.feature_corpus",
    "AudioArray": "nemolet.data.audio",
    "AudioCorpus": "nemolet.data.audio_corpus",
    "AudioFile": "nemolet.data.audio",
    "AudioLoader": "nemolet.data.audio_loader",
    "AudioValidationLoader": "nemolet.data.audio_loader",
    "BatchPlan": "nemolet.data.buckets",
    "Blend": "nemolet.data.packing",
    "Chain": "nemolet.data.packing",
    "ChatTemplate": "nemolet.data.chat_template",
    "Corpus": "nemolet.data.corpus",
    "EmbeddedText": "nemolet.data.embedded",
    "Examples": "nemolet.data.examples",
    "IndexedTokens": "nemolet.data.indexed",
    "IndexedWriter": "nemolet.data.indexed",
    "Instructions": "nemolet.data.instructions",
    "IntentsAndSlots": "nemolet.data.labelled",
    "LabelledTexts": "nemolet.data.labelled",
    "MaskedText": "nemolet.data.masking",
    "MultiLabelledTexts": "nemolet.data.labelled",
    "PackedTokens": "nemolet.data.packing",
    "ParallelTexts": "nemolet.data.pairs",
    "Preferences": "nemolet.data.instructions",
    "PreparedAudio": "nemolet.data.audio_corpus",
    "PreparedCorpus": "nemolet.data.corpus",
    "PreparedExamples": "nemolet.data.examples",
    "Questions": "nemolet.data.labelled",
    "SimilarTexts": "nemolet.data.pairs",
    "TaggedWords": "nemolet.data.labelled",
    "TextEncoding": "nemolet.data.encoding",
    "TextFiles": "nemolet.data.sources",
    "TokenLoader": "nemolet.data.loader",
    "TokenizerSpec": "nemolet.data.corpus",
    "Utterance": "nemolet.data.manifest",
    "ValidationLoader": "nemolet.data.loader",
    "collate": "nemolet.data.batches",
    "encode_chat": "nemolet.data.chat",
    "examine": "nemolet.data.inspection",
    "load_audio": "nemolet.data.audio",
    "read_audio": "nemolet.data.manifest",
    "tokenize": "nemolet.data.tokenization",
    "utterances_of_arrays": "nemolet.data.manifest",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"nemolet.data has no {name!r}; it has {', '.join(_EXPORTS)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


if TYPE_CHECKING:
    from nemolet.data.audio import AudioArray, AudioFile, load_audio
    from nemolet.data.audio_corpus import AudioCorpus, PreparedAudio
    from nemolet.data.audio_loader import AudioLoader, AudioValidationLoader
    from nemolet.data.batches import collate
    from nemolet.data.buckets import BatchPlan
    from nemolet.data.chat import encode_chat
    from nemolet.data.chat_template import ChatTemplate
    from nemolet.data.corpus import Corpus, PreparedCorpus, TokenizerSpec
    from nemolet.data.embedded import EmbeddedText
    from nemolet.data.encoding import TextEncoding
    from nemolet.data.examples import Examples, PreparedExamples
    from nemolet.data.feature_corpus import FeatureCorpus
    from nemolet.data.indexed import IndexedTokens, IndexedWriter
    from nemolet.data.inspection import examine
    from nemolet.data.instructions import Instructions, Preferences
    from nemolet.data.labelled import IntentsAndSlots, LabelledTexts, MultiLabelledTexts, Questions, TaggedWords
    from nemolet.data.loader import TokenLoader, ValidationLoader
    from nemolet.data.manifest import Utterance, read_audio, utterances_of_arrays
    from nemolet.data.masking import MaskedText
    from nemolet.data.packing import Blend, Chain, PackedTokens
    from nemolet.data.pairs import ParallelTexts, SimilarTexts
    from nemolet.data.sources import TextFiles
    from nemolet.data.tokenization import tokenize
