"""Text <-> ids: SentencePiece, ``tokenizer.json``, characters, words, phones, bytes."""

from nemolet.tokenizers.base import StreamDecoder, Tokenizer
from nemolet.tokenizers.huggingface import HuggingFaceTokenizer
from nemolet.tokenizers.letters import LetterTokenizer
from nemolet.tokenizers.sentencepiece import SentencePieceTokenizer
from nemolet.tokenizers.simple import ByteTokenizer, CharTokenizer
from nemolet.tokenizers.storage import (
    describe,
    files_for_others,
    load_tokenizer,
    original,
    rebuild,
    save_tokenizer,
)
from nemolet.tokenizers.tokenizer_json import tokenizer_json
from nemolet.tokenizers.words import PhoneTokenizer, WordTokenizer

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "HuggingFaceTokenizer",
    "LetterTokenizer",
    "PhoneTokenizer",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "WordTokenizer",
    "describe",
    "files_for_others",
    "load_tokenizer",
    "original",
    "rebuild",
    "save_tokenizer",
    "tokenizer_json",
]
