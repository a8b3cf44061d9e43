"""Values of a wrong type, at every key of the small files that is read, are named or of no consequence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemolet.convert.folder import CARRIED, Folder
from nemolet.convert.tokenizer_files import read_tokenizer
from nemolet.errors import NemoletError
from nemolet.tensor_files import Shards

from .test_vocabularies import BART, byte_pairs, pieces, put, word_pieces
from .tiny_tokenizers import CHATML, save_tokenizer

WRONG: tuple[Any, ...] = (None, "x", [], ["x"], [7], {}, {"x": 1}, {"content": 1}, -1, 0.5, True, 1 << 40)
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SETTINGS = (
    *(*NAMES, "extra_special_tokens", "additional_special_tokens", "added_tokens_decoder", "tokenizer_class"),
    *("add_bos_token", "add_eos_token", "add_prefix_space", "extra_ids", "word_delimiter_token"),
    *("do_lower_case", "strip_accents", "tokenize_chinese_chars"),
)
KEYS = {
    "tokenizer_config.json": SETTINGS,
    "special_tokens_map.json": (*NAMES, "additional_special_tokens"),
    "added_tokens.json": ("<|chat|>",),
    "config.json": ("model_type", "tokenizer_class", "architectures", "pad_token_id"),
    "vocab.json": ("a",),
}
LETTERS = {letter: index for index, letter in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", "a", "b"])}


def made(kind: str, folder: Path) -> Path:
    """A folder of one kind of tokenizers, which is read as it is."""
    if kind == "whole":
        save_tokenizer("gpt2", folder)
    elif kind == "letters":
        put(folder, "wav2vec2", vocab__json=LETTERS)
        (folder / "config.json").write_text(json.dumps({"architectures": ["Wav2Vec2ForCTC"], "pad_token_id": 0}))
    elif kind == "t5":
        ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "model_type": "unigram", "byte_fallback": False}
        (put(folder, kind) / "spiece.model").write_bytes(pieces(vocab_size=35, **ids))
    elif kind == "llama":
        (put(folder, kind) / "tokenizer.model").write_bytes(pieces())
    elif kind == "bert":
        put(folder, kind, vocab__txt=word_pieces())
    else:
        put(folder, kind, **byte_pairs(CHATML if kind == "qwen2" else BART))
    return folder


def carried(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in CARRIED if (folder / name).is_file()}


def opened(folder: Path, files: dict[str, bytes]) -> None:
    config = json.loads(files["config.json"])
    assert read_tokenizer(Folder(folder, config, Shards([]), files), vocab_size=1 << 20) is not None


@pytest.mark.parametrize("kind", ["whole", "letters", "t5", "llama", "bert", "gpt2", "qwen2", "roberta"])
def test_a_value_of_a_wrong_type_is_named_or_of_no_consequence(kind, tmp_path):
    folder = made(kind, tmp_path)
    files = carried(folder)
    opened(folder, files)
    for name, keys in KEYS.items():
        there = json.loads(files.get(name, b"{}"))
        for key in keys:
            for value in WRONG:
                odd = {**files, name: json.dumps({**there, key: value}).encode()}
                try:
                    opened(folder, odd)
                except NemoletError as error:
                    assert str(tmp_path) in str(error) and error.found and error.fix, (name, key, value, str(error))
                except Exception as error:
                    raise AssertionError(f"{name}: {key}={value!r} of {kind}") from error
