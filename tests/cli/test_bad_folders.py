"""Broken folders go through the commands: an error with place, expectation, find and fix, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

import nemolet as nl
from nemolet.cli import main
from nemolet.convert import write
from nemolet.tokenizers import ByteTokenizer

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A model in several shards, with a tokenizer."""
    torch.manual_seed(0)
    model = nl.language.CausalLM(vocab_size=260, layers=2, width=16, heads=2, context=32)
    folder = tmp_path_factory.mktemp("good") / "folder"
    return write(folder, model=model, tokenizer=ByteTokenizer(), shard_bytes=6000)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit_index(folder: Path, change: Callable[[dict], None]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content)
    (folder / INDEX).write_text(json.dumps(content))


def point_first_tensor_at(place: str) -> Callable[[Path], None]:
    def change(content: dict) -> None:
        content["weight_map"][next(iter(content["weight_map"]))] = place

    return lambda folder: edit_index(folder, change)


def cut(name: str, share: float = 0.5) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return apply


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def another_type(dtype: torch.dtype) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = safetensors.torch.load_file(shards(folder)[1])
        safetensors.torch.save_file({name: t.to(dtype) for name, t in tensors.items()}, shards(folder)[1])

    return apply


def listed_twice(folder: Path) -> None:
    first, second, *_ = shards(folder)
    shutil.copy(first, folder / "again.safetensors")
    names = list(safetensors.torch.load_file(second))
    edit_index(folder, lambda content: content["weight_map"].update({names[0]: "again.safetensors"}))


def pickle_only(folder: Path) -> None:
    for file in (*shards(folder), folder / INDEX):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Canary(folder.parent / "canary")}))


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def circle(name: str) -> Callable[[Path], None]:
    """A link that leads to itself."""

    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder / name)

    return apply


def circle_of_a_shard(folder: Path) -> None:
    circle(shards(folder)[0].name)(folder)


def folder_in_place_of_a_shard(folder: Path) -> None:
    shard = shards(folder)[0]
    shard.unlink()
    shard.mkdir()


def larger_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    mark = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": 257 + n, "content": f"<{n}>", **mark} for n in range(9)]
    (folder / "tokenizer.json").write_text(json.dumps(content))


BAD: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # what is done to the folder; what is wrong; where
    "a cut index": (cut(INDEX), "this is no JSON", INDEX),
    "an index that is a list": (written(INDEX, b"[]"), "this is no JSON object", INDEX),
    "an index without a map": (written(INDEX, b"{}"), "the index has no map of weights", INDEX),
    "a missing shard": (lambda folder: shards(folder)[0].unlink(), "shards are missing", "folder"),
    "a shard under two names": (listed_twice, "two files hold the same tensor", ".safetensors"),
    "a cut shard": (lambda folder: cut(shards(folder)[0].name)(folder), "the file is cut short", "model-00001"),
    "an empty shard": (lambda folder: shards(folder)[0].write_bytes(b""), "no safetensors file", "model-00001"),
    "a path out of the folder": (point_first_tensor_at("../../etc/passwd"), "no map of weights", INDEX),
    "an absolute path": (point_first_tensor_at("/etc/passwd"), "no map of weights", INDEX),
    "the folder above": (point_first_tensor_at(".."), "no map of weights", INDEX),
    "a path of Windows": (point_first_tensor_at("..\\x.safetensors"), "no map of weights", INDEX),
    "a shard that is a folder": (folder_in_place_of_a_shard, "shards are missing", "folder"),
    "no shard at all": (lambda folder: [file.unlink() for file in shards(folder)], "shards are missing", "folder"),
    "a tensor that is not listed": (
        lambda folder: edit_index(folder, lambda content: content["weight_map"].popitem()),
        "the index and the shards disagree",
        INDEX,
    ),
    "a config that is no JSON": (written("config.json", b"model_type: llama"), "this is no JSON", "config.json"),
    "a config that is a list": (written("config.json", b"[1]"), "this is no JSON object", "config.json"),
    "an empty config": (written("config.json", b""), "this is no JSON", "config.json"),
    "a config of bytes": (written("config.json", b"\xff\xfe\x00"), "this is no JSON", "config.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no folder of a Hugging Face model", "folder"),
    "a cut tokenizer": (cut("tokenizer.json"), "this is no tokenizer.json", "tokenizer.json"),
    "a tokenizer that is a list": (written("tokenizer.json", b"[]"), "this is no tokenizer.json", "tokenizer.json"),
    "settings of a tokenizer that are no JSON": (
        written("tokenizer_config.json", b"{"),
        "this file is no JSON",
        "tokenizer_config.json",
    ),
    "a tokenizer larger than the model": (larger_tokenizer, "the tokenizer does not fit the model", "folder"),
    "whole numbers": (another_type(torch.int8), "the weights are not those of a", "folder"),
    "another half of the weights": (another_type(torch.float8_e4m3fn), "the weights are not those of a", "folder"),
    "only a pickle": (pickle_only, "a pickle can run code", "pytorch_model.bin"),
    "a config that is a circle": (circle("config.json"), "no folder of a Hugging Face model", "folder"),
    "an index that is a circle": (circle(INDEX), "there are no weights", "folder"),
    "a shard that is a circle": (circle_of_a_shard, "shards are missing", "folder"),
}


@pytest.mark.parametrize("verb", ["convert", "generate"])
@pytest.mark.parametrize("kind", BAD)
def test_a_broken_folder_is_refused(kind, verb, good, tmp_path, capsys):
    breaks, what, where = BAD[kind]
    folder, target = tmp_path / "folder", tmp_path / "target.nemolet"
    shutil.copytree(good, folder)
    breaks(folder)
    before = sorted(os.walk(tmp_path))
    command = ["convert", f"from={folder}", f"to={target}"] if verb == "convert" else ["generate", str(folder), "a"]
    assert main(command) == 1
    captured = capsys.readouterr()
    place, *rows = captured.err.splitlines()
    assert what in place and where in place, captured.err
    assert place.startswith(("ConversionError: ", "TokenizerError: ")) and str(folder) in place
    assert [row for row in ("expected", "found", "fix") if not any(r.startswith(f"  {row} ") for r in rows)] == []
    assert len(captured.err) < 2000 and not captured.out
    assert sorted(os.walk(tmp_path)) == before


def test_a_folder_that_is_a_circle(tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.symlink_to(folder)
    assert main(["convert", f"from={folder}", f"to={tmp_path / 'm.nemolet'}"]) == 1
    assert f"{folder}: this is no folder of a Hugging Face model" in capsys.readouterr().err
    assert main(["generate", str(folder), "a"]) == 1
    assert f"{folder}: there is no such file" in capsys.readouterr().err


def test_the_good_folder_is_read(good, tmp_path, capsys):
    assert main(["convert", f"from={good}", f"to={tmp_path / 'm.nemolet'}"]) == 0
    assert main(["convert", f"from={tmp_path / 'm.nemolet'}", f"to={tmp_path / 'again'}"]) == 0
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (good / name).read_bytes()


def test_a_folder_that_cannot_be_finished_is_not_begun(good, tmp_path, capsys, monkeypatch):
    """A disk that is full after some of the files."""
    file, target = tmp_path / "m.nemolet", tmp_path / "new" / "target"
    assert main(["convert", f"from={good}", f"to={file}"]) == 0
    capsys.readouterr()
    written, sync = [], os.fsync

    def full(number: int) -> None:
        written.append(number)
        if len(written) > 2:
            raise OSError(28, "No space left on device")
        sync(number)

    monkeypatch.setattr(os, "fsync", full)
    assert main(["convert", f"from={file}", f"to={target}", "shard_gb=0.000006"]) == 1
    error = capsys.readouterr().err
    assert "this cannot be written" in error and "No space left on device" in error and "free space" in error
    assert not target.exists()
    target.mkdir()
    assert main(["convert", f"from={file}", f"to={target}", "shard_gb=0.000006"]) == 1
    assert target.is_dir() and not list(target.iterdir())


@pytest.mark.parametrize("make", [lambda path: path.touch(), lambda path: (path.mkdir(), (path / "old").touch())])
def test_a_target_that_is_taken_stays_as_it_was(make, good, tmp_path, capsys):
    file, target = tmp_path / "m.nemolet", tmp_path / "target"
    assert main(["convert", f"from={good}", f"to={file}"]) == 0
    capsys.readouterr()
    make(target)
    before = sorted(os.walk(tmp_path))
    assert main(["convert", f"from={file}", f"to={target}"]) == 1
    error = capsys.readouterr().err
    assert "the folder is not empty" in error and all(f"  {row}" in error for row in ("expected", "found", "fix"))
    assert sorted(os.walk(tmp_path)) == before
