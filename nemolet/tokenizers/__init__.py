"""Text <-> ids: SentencePiece, ``tokenizer.json``, characters, bytes."""

from nemolet.tokenizers.base import StreamDecoder, Tokenizer
from nemolet.tokenizers.huggingface import HuggingFaceTokenizer
from nemolet.tokenizers.sentencepiece import SentencePieceTokenizer
from nemolet.tokenizers.simple import ByteTokenizer, CharTokenizer
from nemolet.tokenizers.storage import describe, load_tokenizer, rebuild, save_tokenizer

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "describe",
    "load_tokenizer",
    "rebuild",
    "save_tokenizer",
]
