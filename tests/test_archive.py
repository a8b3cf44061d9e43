"""Archives: what is saved comes back."""

from __future__ import annotations

import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import nemolet as nl
from nemolet.archive import described
from nemolet.container import WEIGHTS
from nemolet.errors import ArchiveError, ConfigError, DeclarationError, NemoletError
from nemolet.tokenizers import ByteTokenizer, CharTokenizer, SentencePieceTokenizer
from nemolet.types import HiddenBTD, LogitsBTV, TokenIdsBT
from tests.hostile_archives import TOKENS, configured, make, members_of, small


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A whole archive, which no test changes."""
    return make(tmp_path_factory.mktemp("archive") / "good.nemolet")


# ---------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": False},
        {"position": "learned", "norm": "layer", "bias": True, "gated": False, "activation": "gelu"},
        {"kv_heads": 1, "qk_norm": True, "softcap": 5.0, "pad_vocab_to": 16, "window": 4},
        {"rope_scaling": {"kind": "linear", "factor": 2.0}},
    ],
)
def test_a_model_comes_back_equal(changes, tmp_path):
    model = small(**changes).eval()
    archive = nl.load(nl.save(tmp_path / "m.nemolet", model=model))
    assert torch.equal(archive.model(TOKENS), model(TOKENS))
    assert not archive.model.training
    assert archive.tokenizer is None
    assert archive.config == {"model": model.config()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_in_the_type_they_were_saved_in(dtype, tied, tmp_path):
    model = small(tied=tied).eval().to(dtype)
    path = nl.save(tmp_path / "m.nemolet", model=model)
    loaded = nl.load(path).model
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert sum(1 for _ in loaded.parameters()) == sum(1 for _ in model.parameters())
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert path.read_bytes() == nl.save(tmp_path / "again.nemolet", model=loaded).read_bytes()
    wide = nl.load(path, dtype=torch.float32).model
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert all(torch.equal(a, b.float()) for a, b in zip(wide.parameters(), model.parameters()))


def test_the_folder_of_a_run_stands_for_its_archive(good, tmp_path):
    (tmp_path / "model.nemolet").write_bytes(good.read_bytes())
    assert nl.load(tmp_path).config == nl.load(good).config


def test_types_may_differ_within_a_model(tmp_path):
    model = small().eval().bfloat16()
    model.graph.decoder.float()
    loaded = nl.load(nl.save(tmp_path / "m.nemolet", model=model)).model
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in model.parameters()]


@pytest.mark.parametrize(
    "tokenizer",
    [
        ByteTokenizer(),
        CharTokenizer("abcdefghijk", byte_fallback=True),
        SentencePieceTokenizer.train(["the rain in spain"] * 20, vocab_size=270),
    ],
)
def test_a_tokenizer_comes_back_with_its_ids(tokenizer, tmp_path):
    model = small(vocab_size=tokenizer.vocab_size)
    again = nl.load(nl.save(tmp_path / "m.nemolet", model=model, tokenizer=tokenizer)).tokenizer
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode("abc dé") == tokenizer.encode("abc dé") if tokenizer.lossless else True


def test_a_card_comes_back(good):
    assert nl.load(good).card == "# A card\n"


def test_tied_weights_are_stored_once(tmp_path):
    path = nl.save(tmp_path / "m.nemolet", model=small(tied=True))
    names = set(safetensors.torch.load(members_of(path)[WEIGHTS]))
    assert len([n for n in names if n.endswith(("embed.weight", "head.weight"))]) == 1
    again = nl.load(path).model
    assert len({p.data_ptr() for p in again.parameters()}) == len(list(again.parameters()))


def test_equal_input_gives_equal_bytes(good, tmp_path):
    again = nl.save(tmp_path / "b.nemolet", model=small(), tokenizer=CharTokenizer("abcdefghijk"), card="# A card\n")
    assert again.read_bytes() == good.read_bytes()
    loaded = nl.load(good)
    third = nl.save(tmp_path / "c.nemolet", model=loaded.model, tokenizer=loaded.tokenizer, card=loaded.card)
    assert third.read_bytes() == good.read_bytes()


def test_a_graph_is_a_model_too(tmp_path):
    embed, head = nl.nn.Embedding("V", "D", 11, 4), nl.nn.Head("D", "V", 4, 11)
    graph = nl.Graph(head(embed(nl.Input(TokenIdsBT, "tokens"))), names={"embed": embed, "head": head})
    again = nl.load(nl.save(tmp_path / "g.nemolet", model=graph)).model
    assert torch.equal(again(TOKENS), graph(TOKENS))


def test_a_value_that_occurs_twice_is_written_twice(tmp_path):
    scaling = {"kind": "linear", "factor": 2.0}
    parts = {n: nl.nn.Decoder(layers=1, width=8, heads=2, rope_scaling=scaling) for n in ("first", "second")}
    graph = nl.compose(parts, wires={"second.hidden": "first.output"})
    assert nl.load(nl.save(tmp_path / "g.nemolet", model=graph)).model(torch.ones(1, 2, 8)).shape == (1, 2, 8)


def test_training_state_of_the_caller_is_left_alone(tmp_path):
    model = small().train()
    nl.save(tmp_path / "m.nemolet", model=model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@nl.register
class Doubled(nl.NeuralModule):
    """A module of a user that looks at its values while it is built."""

    def __init__(self, *, width: int, shift: float = 0.0) -> None:
        super().__init__(D=width)
        self.inner = nl.nn.Linear("D", "D", width, width)
        self.start = float(self.inner.weight.abs().sum().item())
        self.shift = shift

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        return 2 * self.inner(hidden) + self.shift


def test_a_registered_class_comes_back(tmp_path):
    model = Doubled(width=4, shift=0.5)
    again = nl.load(nl.save(tmp_path / "m.nemolet", model=model)).model
    assert torch.equal(again(torch.ones(1, 1, 4)), model(torch.ones(1, 1, 4)))


def test_a_class_that_could_not_be_loaded_is_not_saved(tmp_path):
    class Unknown(nl.NeuralModule):
        def forward(self, tokens: TokenIdsBT) -> LogitsBTV: ...

    with pytest.raises(ConfigError, match="register"):
        nl.save(tmp_path / "m.nemolet", model=Unknown())
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_are_no_plain_data_are_not_saved(tmp_path):
    with pytest.raises(DeclarationError, match="cannot be written to a config"):
        nl.save(tmp_path / "m.nemolet", model=Doubled(width=4, shift=object()))


def test_another_process_reads_it(good):
    code = (
        "import sys, torch, nemolet as nl\n"
        "archive = nl.load(sys.argv[1])\n"
        "print(archive.model(torch.tensor([[1, 2, 3, 4]])).double().sum().item(), archive.tokenizer.encode('bad'))"
    )
    done = subprocess.run([sys.executable, "-c", code, good], capture_output=True, text=True, check=True)
    total, ids = done.stdout.split(" ", 1)
    assert float(total) == pytest.approx(small().eval()(TOKENS).double().sum().item(), abs=1e-6)
    assert ids.strip() == str(CharTokenizer("abcdefghijk").encode("bad"))


def test_a_member_of_more_than_eight_gibibytes_has_a_header():
    member = tarfile.TarInfo(WEIGHTS)
    member.size = 27 * 2**30
    assert tarfile.TarInfo.frombuf(member.tobuf(tarfile.GNU_FORMAT), "utf-8", "strict").size == member.size


# ---------------------------------------------------------------- writing whole or not at all


def test_a_save_that_fails_leaves_the_old_file(good, tmp_path, monkeypatch):
    path = tmp_path / "m.nemolet"
    path.write_bytes(good.read_bytes())
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ArchiveError, match="No space left") as error:
        nl.save(path, model=small(width=16))
    assert "untouched" in error.value.fix
    assert path.read_bytes() == good.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(good, tmp_path):
    path = tmp_path / "m.nemolet"
    path.write_bytes(good.read_bytes())
    code = (
        "import resource, sys, nemolet as nl\n"
        "model = nl.language.CausalLM(vocab_size=11, layers=1, width=64, heads=2)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n    nl.save(sys.argv[1], model=model)\n"
        "except nl.errors.ArchiveError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert "the archive cannot be written" in done.stdout
    assert path.read_bytes() == good.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["file/m.nemolet", "folder"])
def test_a_place_that_cannot_be_written(place, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(ArchiveError, match="cannot be written"):
        nl.save(tmp_path / place, model=small())


def test_folders_are_made(tmp_path):
    assert nl.save(tmp_path / "a/b/m.nemolet", model=small()).is_file()


def test_an_older_version_is_brought_up_to_date(good, tmp_path, monkeypatch):
    """As if this were version 2, whose CausalLM calls ``blocks`` ``layers``."""

    def rename(config):
        model = dict(config["model"])
        model["layers"] = model.pop("blocks")
        return {**config, "model": model}

    old = configured(good, blocks=1, layers="absent")
    path = tmp_path / "m.nemolet"
    path.write_bytes(old)
    with pytest.raises(ArchiveError):
        nl.load(path)
    monkeypatch.setattr("nemolet.archive.VERSION", 2)
    monkeypatch.setitem(nl.archive.MIGRATIONS, 1, rename)
    assert torch.equal(nl.load(path).model(TOKENS), small().eval()(TOKENS))


def test_a_device_that_is_not_there_is_no_fault_of_the_archive(good):
    with pytest.raises(ConfigError, match="device"):
        nl.load(good, device="nonsense")


def test_limits_stay_those_of_the_process(good):
    """Loading leaves no hook behind."""
    nl.load(good)
    assert not torch.nn.modules.module._global_parameter_registration_hooks
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_streamed_weights_give_the_same_bytes(tmp_path):
    model = nl.language.CausalLM(vocab_size=11, layers=1, width=8, heads=2, context=16)
    weights, asked = model.state_dict(), []

    def read(name):
        asked.append(name)
        return weights[name]

    whole = nl.save(tmp_path / "whole.nemolet", model=model)
    streamed = nl.save(tmp_path / "streamed.nemolet", model=model, weights=read)
    assert whole.read_bytes() == streamed.read_bytes()
    assert len(asked) == len(set(asked)) == len(list(model.parameters()))
    assert [path.name for path in tmp_path.glob(".*")] == []
    with pytest.raises(ArchiveError, match=r"do not fit(.|\n)*\(11, 8\)(.|\n)*\(3,\)"):
        nl.save(tmp_path / "bad.nemolet", model=model, weights=lambda name: torch.zeros(3))


def test_what_could_not_be_loaded_is_told_before_training():
    norm = nl.nn.LayerNorm("D", 4, eps=np.float64(1e-5))
    with pytest.raises(NemoletError, match="cannot be written"):
        described(norm)
    module = nl.nn.LayerNorm("D", 4)
    for _ in range(16):
        module = nl.compose({"inner": module})
    with pytest.raises(NemoletError, match="cannot hold"):
        described(module)
