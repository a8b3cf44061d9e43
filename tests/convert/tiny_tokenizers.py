"""Tiny tokenizers of each kind, trained on a few lines and saved as transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers as hf
import transformers

from nemolet.convert.folder import CARRIED, Folder
from nemolet.convert.tokenizer_files import read_tokenizer
from nemolet.tensor_files import Shards
from nemolet.tokenizers import Tokenizer

TEXTS = ["def f(x):\n    return x + 1\n", "to be, or not to be: that is the question. ", "naïve café"] * 40
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]


def _byte_level(special: list[str]) -> dict[str, Any]:
    inner = hf.Tokenizer(hf.models.BPE())
    inner.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained(inner, special, hf.pre_tokenizers.ByteLevel.alphabet())


def _metaspace(special: list[str]) -> dict[str, Any]:
    inner = hf.Tokenizer(hf.models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    return _trained(inner, [*special, *(f"<0x{byte:02X}>" for byte in range(256))], [])


def _trained(inner: hf.Tokenizer, special: list[str], alphabet: list[str]) -> dict[str, Any]:
    trainer = hf.trainers.BpeTrainer(
        vocab_size=len(special) + 300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXTS, trainer)
    model = json.loads(inner.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def _bert() -> Any:
    inner = hf.Tokenizer(hf.models.WordPiece(unk_token="[UNK]"))
    inner.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = hf.trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    return transformers.BertTokenizer(vocab=inner.get_vocab())


def _t5() -> Any:
    inner = hf.Tokenizer(hf.models.Unigram())
    inner.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = hf.trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    pieces = json.loads(inner.to_str())["model"]["vocab"]
    return transformers.T5Tokenizer(vocab=[tuple(piece) for piece in pieces], extra_ids=2)


_LLAMA = ["<unk>", "<s>", "</s>"]
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Tokenizer(**_byte_level(CHATML[:1])),
    "qwen2": lambda: transformers.Qwen2Tokenizer(**_byte_level(CHATML), additional_special_tokens=CHATML[1:]),
    "llama": lambda: transformers.LlamaTokenizer(**_metaspace(_LLAMA), add_bos_token=True),
    "llama-bare": lambda: transformers.LlamaTokenizer(**_metaspace(_LLAMA)),
    "bart": lambda: transformers.BartTokenizer(**_byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])),
    "bert": _bert,
    "t5": _t5,
}


def save_tokenizer(kind: str, folder: Path, **settings: Any) -> Any:
    """Save a tokenizer into a folder; returns what transformers reads there."""
    made = TOKENIZERS[kind]()
    for name, value in settings.items():
        setattr(made, name, value)
    made.save_pretrained(folder)
    if not (folder / "config.json").is_file():
        (folder / "config.json").write_text(json.dumps({"model_type": kind.split("-")[0]}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def ours(folder: Path) -> Tokenizer:
    """What we read there."""
    carried = {name: (folder / name).read_bytes() for name in CARRIED if (folder / name).is_file()}
    found = read_tokenizer(Folder(folder, {"architectures": []}, Shards([]), carried), vocab_size=1 << 20)
    assert found is not None
    return found
