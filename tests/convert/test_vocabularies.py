"""Folders without a whole ``tokenizer.json``: ids are those of AutoTokenizer, or there is an error with a way out."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import transformers

import nemolet as nl
from nemolet.cli import main
from nemolet.convert import read, write
from nemolet.convert.folder import CARRIED, Folder
from nemolet.convert.tokenizer_files import read_tokenizer
from nemolet.errors import ConversionError, TokenizerError
from nemolet.tensor_files import Shards
from nemolet.tokenizers import Tokenizer

from .test_own_tokenizers import TEXTS
from .tiny_tokenizers import CHATML, TOKENIZERS, _byte_level, save_tokenizer
from .tiny_tokenizers import TEXTS as LINES

CHAT = {"__type": "AddedToken", "content": "<|chat|>", "special": True}
CHAT |= {"lstrip": False, "rstrip": False, "normalized": False}
MORE = (
    "<|chat|>x <mask>y",
    "<|im_start|>user\n<|im_end|>",
    "[MASK] [SEP]",
    "to <extra_id_0> or</s>",
    "ÀÉÎ Straße 中文 ab",
)


def ours(folder: Path, vocab_size: int = 1 << 20) -> Tokenizer:
    """What we read there."""
    carried = {name: (folder / name).read_bytes() for name in CARRIED if (folder / name).is_file()}
    config = json.loads((folder / "config.json").read_text())
    found = read_tokenizer(Folder(folder, config, Shards([]), carried), vocab_size=vocab_size)
    assert found is not None
    return found


def equal(folder: Path) -> None:
    """Ids with the marks of a text and without, special tokens read and spelled; and texts."""
    theirs, mine = transformers.AutoTokenizer.from_pretrained(folder), ours(folder)
    assert mine.vocab_size == len(theirs)
    numbers = random.Random(1)
    made = [mine.decode([numbers.randrange(mine.vocab_size) for _ in range(20)]) for _ in range(100)]
    for text in (*TEXTS, *MORE, *LINES[:3], *made):
        for special in (False, True):
            ids = mine.encode(text, special=special)
            assert theirs(text, add_special_tokens=False, split_special_tokens=not special).input_ids == ids, text
        before, after = mine.marks
        assert theirs(text).input_ids == [*before, *ids, *after]
        assert theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == mine.decode(ids)
    for name in ("eos_token_id", "sep_token_id"):
        if getattr(theirs, name) is not None:
            assert mine.eos_id == getattr(theirs, name)
            break


def put(folder: Path, kind: str, **files: object) -> Path:
    """Files beside a config of this type; objects as JSON."""
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    for name, content in files.items():
        name = name.replace("__", ".")
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def byte_pairs(special: list[str]) -> dict[str, object]:
    made = _byte_level(special)
    merges = "".join(f"{left} {right}\n" for left, right in made["merges"])
    return {"vocab__json": made["vocab"], "merges__txt": f"#version: 0.2\n{merges}"}


def word_pieces() -> str:
    ids = TOKENIZERS["bert"]().get_vocab()
    return "\n".join(sorted(ids, key=ids.get)) + "\n"


BART = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@pytest.mark.parametrize(
    ("kind", "special", "settings"),
    [
        ("gpt2", CHATML[:1], {}),
        ("gpt2", CHATML[:1], {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "add_bos_token": True}),
        ("gpt2", [], {}),  # its token is put behind the vocabulary
        ("llama", ["<s>", "</s>"], {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}),
        ("qwen2", CHATML, {}),
        ("qwen2", CHATML, {"additional_special_tokens": CHATML[1:3], "eos_token": "<|im_end|>"}),
        ("qwen3", CHATML, {"tokenizer_class": "Qwen2Tokenizer", "eos_token": {**CHAT, "content": "<|im_end|>"}}),
        ("roberta", BART, {}),
        ("bart", BART, {"tokenizer_class": "BartTokenizer", "add_prefix_space": True}),
        ("roberta", BART, {"mask_token": {**CHAT, "content": "<mask>", "lstrip": True}}),
    ],
)
def test_byte_pairs_in_two_files(kind, special, settings, tmp_path):
    files = byte_pairs(special) | ({"tokenizer_config__json": settings} if settings else {})
    equal(put(tmp_path, kind, **files))


@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"do_lower_case": False}, {"strip_accents": False, "tokenize_chinese_chars": False}, {"sep_token": "[PAD]"}],
)
def test_word_pieces_in_a_list(kind, settings, tmp_path):
    equal(put(tmp_path, kind, vocab__txt=word_pieces(), tokenizer_config__json=settings))


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_tokens_that_were_added_in_old_files(kind, tmp_path):
    files = byte_pairs(CHATML[:1]) if kind == "gpt2" else {"vocab__txt": word_pieces()}
    count = len(files.get("vocab__json", word_pieces().splitlines()))
    added = {"<|chat|>": count, "plain": count + 1}
    names = {"additional_special_tokens": ["<|chat|>"], "pad_token": "<|chat|>"}
    equal(put(tmp_path, kind, **files, added_tokens__json=added, special_tokens_map__json=names))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
def test_what_is_declared_beside_a_whole_file(kind, tmp_path):
    """The end and further tokens stand in the settings only, as in many folders that were changed by hand."""
    save_tokenizer(kind, tmp_path)
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    size = max([*(token["id"] for token in table["added_tokens"]), len(table["model"]["vocab"]) - 1]) + 1
    settings["added_tokens_decoder"] = {
        str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in table["added_tokens"]
    }
    settings["added_tokens_decoder"][str(size)] = {k: v for k, v in CHAT.items() if k != "__type"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    equal(tmp_path)
    assert ours(tmp_path).special_tokens["<|chat|>"] == size


def test_names_in_an_older_file_count_where_the_settings_lack_them(tmp_path):
    save_tokenizer("gpt2", tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for key in ("bos_token", "eos_token", "unk_token"):
        settings.pop(key, None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|chat|>", "pad_token": "<|chat|>"}))
    equal(tmp_path)
    mine = ours(tmp_path)
    assert mine.eos_id == mine.special_tokens["<|chat|>"] == mine.vocab_size - 1


def test_a_name_alone_makes_no_token_that_the_model_lacks(tmp_path):
    """transformers adds one that no embedding has; a token whose id is declared is an error, as it always was."""
    files = byte_pairs(CHATML[:1])
    size = len(files["vocab__json"])
    put(tmp_path, "gpt2", **files, special_tokens_map__json={"pad_token": "[PAD]"})
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == size + 1
    assert (ours(tmp_path, size).vocab_size, ours(tmp_path, size + 1).vocab_size) == (size, size + 1)
    put(tmp_path, "gpt2", **files, added_tokens__json={"[PAD]": size})
    with pytest.raises(ConversionError, match="does not fit the model"):
        ours(tmp_path, size)


def pieces(**options: object) -> bytes:
    target = io.BytesIO()
    settings = {"vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    settings |= {"remove_extra_whitespaces": False, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=target, **settings)
    return target.getvalue()


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
@pytest.mark.parametrize("added", [{}, {"<|chat|>": 330, "<pad>": 331}])
def test_a_model_of_sentencepiece_with_tokens_beside_it(settings, added, tmp_path):
    """Of which transformers follows the model; where it says nothing of marks, the model's own beginning counts."""
    content = pieces()
    (tmp_path / "tokenizer.model").write_bytes(content)
    names = {"additional_special_tokens": ["<|chat|>"], "pad_token": "<pad>"} if added else {}
    files = {"added_tokens__json": added, "special_tokens_map__json": names} if added else {}
    put(tmp_path, "mistral", **files, **({"tokenizer_config__json": settings} if settings else {}))
    theirs, mine = transformers.AutoTokenizer.from_pretrained(tmp_path), ours(tmp_path)
    assert mine.vocab_size == len(theirs) == 330 + len(added)
    for text in (*TEXTS, *MORE, *LINES[:3]):
        assert theirs(text, add_special_tokens=False).input_ids == mine.encode(text, special=True), text
        if "<|chat|>" not in text:
            assert theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids == mine.encode(text)
    marked = theirs("be").input_ids
    if settings:
        assert mine.marks == (
            marked[:1] if settings["add_bos_token"] else [],
            [2] if "add_eos_token" in settings else [],
        )
    else:
        assert mine.opener == 1
    if added:
        assert mine.encode("be<|chat|>", special=True)[-1] == 330
        assert theirs.decode([*mine.encode("be"), 330]) == mine.decode([*mine.encode("be"), 330], special=True)


@pytest.mark.parametrize("settings", [{}, {"extra_ids": 2}])
def test_pieces_of_t5(settings, tmp_path):
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "remove_extra_whitespaces": True}
    options = {"model_type": "unigram", "byte_fallback": False, "normalization_rule_name": "nmt_nfkc", "vocab_size": 35}
    (tmp_path / "spiece.model").write_bytes(pieces(**ids, **options))
    equal(put(tmp_path, "t5", **({"tokenizer_config__json": settings} if settings else {})))


@pytest.mark.parametrize(
    ("kind", "files", "words"),
    [
        (
            "whisper",
            {"vocab__json": {}, "merges__txt": ""},
            ("vocab.json, merges.txt", "tokenizer without a known class"),
        ),
        ("marian", {"vocab__json": {}, "source__spm": "x"}, ("source.spm",)),
        (
            "llama",
            {"vocab__json": {}, "tokenizer_config__json": {"tokenizer_class": "CTRLTokenizer"}},
            ("CTRLTokenizer",),
        ),
        ("gpt2", {"vocab__json": {"a": 0}}, ("vocab.json of a GPT2Tokenizer",)),
        ("llama", {"vocab__txt": "a\n"}, ("vocab.txt",)),
    ],
)
def test_other_files_are_refused_with_a_way_out(kind, files, words, tmp_path):
    with pytest.raises(ConversionError, match="the vocabulary of this folder is not read") as refused:
        ours(put(tmp_path, kind, **files))
    assert all(word in refused.value.found for word in words)
    assert "save_pretrained" in refused.value.fix and "with_tokenizer=false" in refused.value.fix


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"vocab__json": {"a": 0}, "merges__txt": "a b c\n"}, "no vocabulary of byte pairs"),
        ({"vocab__json": {"a": "x"}, "merges__txt": ""}, "no vocabulary of byte pairs"),
        ({"vocab__json": [], "merges__txt": ""}, "this is no JSON object"),
        ({"vocab__json": {"a": 0}, "merges__txt": "a b\n"}, "this is no tokenizer.json"),
        ({"vocab__json": {"a": 0}, "merges__txt": "", "added_tokens__json": {"x": 7}}, "has another id than"),
        ({"vocab__json": {"a": 0}, "merges__txt": "", "added_tokens__json": {"x": "y"}}, "which tokens were added"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"0": {}}}}, "which tokens were added"),
        ({"tokenizer_config__json": {"eos_token": 5}}, "which tokens were added"),
        ({"tokenizer_config__json": {"added_tokens_decoder": [1]}}, "which tokens were added"),
    ],
)
def test_broken_files_are_named(files, what, tmp_path):
    with pytest.raises((ConversionError, TokenizerError), match=what) as refused:
        ours(put(tmp_path, "gpt2", **files))
    assert str(tmp_path) in str(refused.value) and refused.value.fix


def test_a_folder_goes_through_a_file_and_stays_what_it_was(tmp_path):
    """The old files come along, and AutoTokenizer reads the new folder as it read the old one."""
    folder = tmp_path / "folder"
    write(folder, model=nl.language.CausalLM(vocab_size=310, layers=1, width=16, heads=2, context=32))
    put(folder, "llama", **byte_pairs(CHATML), tokenizer_config__json={"tokenizer_class": "GPT2Tokenizer"})
    config = {"architectures": ["LlamaForCausalLM"], **json.loads((folder / "config.json").read_text())}
    write(tmp_path / "other", model=nl.language.CausalLM(vocab_size=310, layers=1, width=16, heads=2, context=32))
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["convert", f"from={folder}", f"to={tmp_path / 'm.nemolet'}"]) == 0
    assert main(["convert", f"from={tmp_path / 'm.nemolet'}", f"to={tmp_path / 'again'}"]) == 0
    before, after = map(transformers.AutoTokenizer.from_pretrained, (folder, tmp_path / "again"))
    for text in (*TEXTS, *MORE):
        assert before(text).input_ids == after(text).input_ids
    assert (tmp_path / "again" / "merges.txt").read_bytes() == (folder / "merges.txt").read_bytes()


def test_a_model_without_its_tokenizer(tmp_path):
    folder = write(tmp_path / "folder", model=nl.language.CausalLM(vocab_size=300, layers=1, width=16, heads=2))
    (folder / "vocab.txt").write_text("a\n")
    with pytest.raises(ConversionError, match="vocabulary of this folder is not read"):
        read(folder)
    assert read(folder, tokenizer=False).tokenizer is None
