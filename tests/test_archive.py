"""Archives: what is saved comes back, and whatever else a file holds is refused without running any of it."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

import nemolet as nl
from nemolet.archive import described
from nemolet.container import CARD, CONFIG, MANIFEST, WEIGHTS
from nemolet.errors import ArchiveError, ConfigError, ConversionError, DeclarationError, NemoletError
from nemolet.tokenizers import ByteTokenizer, CharTokenizer, SentencePieceTokenizer
from nemolet.types import HiddenBTD, LogitsBTV, TokenIdsBT

TOKENS = torch.tensor([[1, 2, 3, 4]])


def small(**changes):
    torch.manual_seed(0)
    return nl.language.CausalLM(**{"vocab_size": 11, "layers": 1, "width": 8, "heads": 2, "context": 8, **changes})


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A whole archive, which no test changes."""
    return nl.save(
        tmp_path_factory.mktemp("archive") / "good.nemolet",
        model=small(),
        tokenizer=CharTokenizer("abcdefghijk"),
        card="# A card\n",
    )


def members_of(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def listed(members):
    return {n: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in members.items() if n != MANIFEST}


def packed(members, /, **manifest):
    """Members as a tar with the manifest that belongs to them."""
    members = {n: c for n, c in members.items() if n != MANIFEST}
    content = json.dumps({"format": "nemolet", "version": 1, "members": listed(members), **manifest}).encode()
    return tar_of([(tarfile.TarInfo(n), c) for n, c in {MANIFEST: content, **members}.items()])


def tar_of(entries, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for member, content in entries:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


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


# ---------------------------------------------------------------- hostile archives


def changed(good, name, content):
    return packed({**members_of(good), name: content})


def configured(good, **changes):
    """The archive with another config of the model."""
    config = yaml.safe_load(members_of(good)[CONFIG])
    config["model"] = {k: v for k, v in {**config["model"], **changes}.items() if v != "absent"}
    return changed(good, CONFIG, yaml.safe_dump(config).encode())


def texted(good, text):
    return changed(good, CONFIG, text.encode())


def with_weights(good, edit):
    tensors = safetensors.torch.load(members_of(good)[WEIGHTS])
    edit(tensors)
    return changed(good, WEIGHTS, safetensors.torch.save(tensors))


def extra(good, kind=tarfile.REGTYPE, name="evil", content=b"", **attributes):
    """The archive with one more member, of any type, and a manifest that lists it."""
    members = members_of(good)
    manifest = {"format": "nemolet", "version": 1, "members": {**listed(members), **listed({name: content})}}
    entries = [(tarfile.TarInfo(n), c) for n, c in {**members, MANIFEST: json.dumps(manifest).encode()}.items()]
    odd = tarfile.TarInfo(name)
    odd.type = kind
    for key, value in attributes.items():
        setattr(odd, key, value)
    return tar_of([*entries, (odd, content)], format=tarfile.PAX_FORMAT)


def typed(good, kind, **attributes):
    """The archive whose card is of another type."""
    entries = []
    for name, content in members_of(good).items():
        member = tarfile.TarInfo(name)
        if name == CARD:
            member.type = kind
            for key, value in attributes.items():
                setattr(member, key, value)
        entries.append((member, content if member.isreg() else b""))
    return tar_of(entries)


def claimed(good, size, name=WEIGHTS):
    """The archive with a header that claims another size."""
    content = bytearray(good.read_bytes())
    with tarfile.open(good) as tar:
        member = tar.getmember(name)
    header = tarfile.TarInfo(name)
    header.size, header.mode = size, 0o644
    content[member.offset : member.offset + 512] = header.tobuf(tarfile.GNU_FORMAT)
    return bytes(content)


def pax_bomb(good, size):
    """A pax header that claims to be huge, before the first member."""
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, size
    return header.tobuf(tarfile.GNU_FORMAT) + good.read_bytes()


def manifested(good, content):
    members = {**members_of(good), MANIFEST: content if isinstance(content, bytes) else json.dumps(content).encode()}
    return tar_of([(tarfile.TarInfo(n), c) for n, c in members.items()])


def without(good, name, relist=True):
    members = {n: c for n, c in members_of(good).items() if n != name}
    return packed(members) if relist else tar_of([(tarfile.TarInfo(n), c) for n, c in members.items()])


def tokenized(good, description, files=None):
    members = {n: c for n, c in members_of(good).items() if not n.startswith("tokenizer/") or files is None}
    config = yaml.safe_load(members[CONFIG])
    config["tokenizer"] = description
    return packed({**members, CONFIG: yaml.safe_dump(config).encode(), **(files or {})})


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 8)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)
MODEL = "model: {_target_: nemolet.nn.Linear, in_axis: D, out_axis: D, in_size: 2, out_size: 2}\n"
LISTED = {"format": "nemolet", "version": 1}

HOSTILE = {
    # members
    "traversal": lambda good, canary: extra(good, name="../evil"),
    "traversal below a known folder": lambda good, canary: extra(good, name="tokenizer/../../evil"),
    "absolute path": lambda good, canary: extra(good, name=str(canary)),
    "absolute path to a known name": lambda good, canary: extra(good, name=f"/{CARD}"),
    "known name with a dot": lambda good, canary: extra(good, name=f"./{CARD}"),
    "hidden file": lambda good, canary: extra(good, name="tokenizer/.bashrc"),
    "folder of a tokenizer": lambda good, canary: extra(good, name="tokenizer/a/b"),
    "line break in a name": lambda good, canary: extra(good, name="tokenizer/characters.json\n"),
    "unknown member": lambda good, canary: extra(good, name="notes.txt"),
    "pickle": lambda good, canary: extra(good, name="data.pkl", content=pickle.dumps(Evil(canary))),
    "pickle beside the tokenizer": lambda good, canary: extra(
        good, name="tokenizer/data.pkl", content=pickle.dumps(Evil(canary))
    ),
    "pickled weights": lambda good, canary: changed(good, WEIGHTS, pickle.dumps(Evil(canary))),
    "pickled config": lambda good, canary: changed(good, CONFIG, pickle.dumps(Evil(canary))),
    "duplicate": lambda good, canary: extra(good, name=CARD, content=members_of(good)[CARD]),
    "folder": lambda good, canary: extra(good, tarfile.DIRTYPE, "tokenizer"),
    "symlink": lambda good, canary: typed(good, tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": lambda good, canary: typed(good, tarfile.LNKTYPE, linkname=CONFIG),
    "character device": lambda good, canary: typed(good, tarfile.CHRTYPE, devmajor=1, devminor=5),
    "block device": lambda good, canary: typed(good, tarfile.BLKTYPE, devmajor=8),
    "pipe": lambda good, canary: typed(good, tarfile.FIFOTYPE),
    "old type": lambda good, canary: typed(good, tarfile.AREGTYPE),
    "contiguous": lambda good, canary: typed(good, tarfile.CONTTYPE),
    "sparse": lambda good, canary: typed(good, tarfile.GNUTYPE_SPARSE),
    "unknown type": lambda good, canary: typed(good, b"Z"),
    "long name": lambda good, canary: extra(good, name="tokenizer/" + "a" * 300),
    "pax header": lambda good, canary: extra(good, name="tokenizer/x", pax_headers={"comment": "hello"}),
    "sparse by pax": lambda good, canary: extra(
        good, name="tokenizer/x", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.realsize": str(10**13)}
    ),
    "too many members": lambda good, canary: packed(
        {**members_of(good), **{f"tokenizer/{i}": b"" for i in range(100)}}
    ),
    # sizes
    "ten terabytes": lambda good, canary: claimed(good, 10**13),
    "ten terabytes of config": lambda good, canary: claimed(good, 10**13, CONFIG),
    "negative size": lambda good, canary: claimed(good, -1),
    "a little more": lambda good, canary: claimed(good, len(members_of(good)[WEIGHTS]) + 1),
    "a little less": lambda good, canary: claimed(good, len(members_of(good)[WEIGHTS]) - 600),
    "pax of ten terabytes": lambda good, canary: pax_bomb(good, 10**13),
    "negative pax": lambda good, canary: pax_bomb(good, -512),
    "something after the end": lambda good, canary: good.read_bytes() + b"x" * tarfile.RECORDSIZE,
    "much after the end": lambda good, canary: good.read_bytes() + b"\0" * 9 * tarfile.RECORDSIZE,
    "no end": lambda good, canary: good.read_bytes().rstrip(b"\0"),
    "twice": lambda good, canary: good.read_bytes() * 2,
    # other files
    "compressed": lambda good, canary: gzip.compress(good.read_bytes()),
    "empty": lambda good, canary: b"",
    "zeros": lambda good, canary: b"\0" * tarfile.RECORDSIZE,
    "noise": lambda good, canary: random.Random(0).randbytes(3 * tarfile.RECORDSIZE),
    "text": lambda good, canary: b"#!/bin/sh\ntouch " + str(canary).encode(),
    "zip": lambda good, canary: b"PK\x03\x04" + bytes(tarfile.RECORDSIZE - 4),
    "empty tar": lambda good, canary: tar_of([]),
    # manifest
    "no manifest": lambda good, canary: without(good, MANIFEST, relist=False),
    "no config": lambda good, canary: without(good, CONFIG),
    "no weights": lambda good, canary: without(good, WEIGHTS),
    "no card": lambda good, canary: without(good, CARD),
    "a member that is not listed": lambda good, canary: packed(
        members_of(good), members={n: e for n, e in listed(members_of(good)).items() if n != CARD}
    ),
    "a listed member that is not there": lambda good, canary: packed(
        members_of(good), members={**listed(members_of(good)), "tokenizer/x": {}}
    ),
    "wrong hash": lambda good, canary: packed(
        members_of(good), members={**listed(members_of(good)), CARD: {"size": 9, "sha256": "0" * 64}}
    ),
    "wrong size": lambda good, canary: packed(
        members_of(good), members={**listed(members_of(good)), CARD: {**listed(members_of(good))[CARD], "size": 8}}
    ),
    "manifest without members": lambda good, canary: manifested(good, LISTED),
    "no hash": lambda good, canary: packed(members_of(good), members=dict.fromkeys(listed(members_of(good)))),
    "list of members": lambda good, canary: packed(members_of(good), members=[[n, e] for n, e in LISTED.items()]),
    "numbers for members": lambda good, canary: packed(members_of(good), members=[[1, 2]]),
    "text for members": lambda good, canary: packed(members_of(good), members="all"),
    "manifest is no JSON": lambda good, canary: manifested(good, b"{"),
    "manifest is a list": lambda good, canary: manifested(good, []),
    "manifest is null": lambda good, canary: manifested(good, None),
    "manifest is empty": lambda good, canary: manifested(good, {}),
    "manifest is deep": lambda good, canary: manifested(good, b"[" * 100_000),
    "manifest is no text": lambda good, canary: manifested(good, b"\xff\xfe\x00"),
    "another format": lambda good, canary: packed(members_of(good), format="nemo"),
    "format is a list": lambda good, canary: packed(members_of(good), format=["nemolet"]),
    **{
        f"version {version!r}": (lambda good, canary, version=version: packed(members_of(good), version=version))
        for version in (2, 10**30, 0, -1, True, "1", 1.0, None, [1])
    },
    # config
    "interpolation": lambda good, canary: configured(good, checkpointing="${oc.env:HOME}"),
    "interpolation of the target": lambda good, canary: configured(good, _target_="${nope}"),
    "target outside": lambda good, canary: configured(good, _target_="os.system"),
    "builtin": lambda good, canary: configured(good, _target_="builtins.eval"),
    "two hops": lambda good, canary: texted(good, f"model: {{_target_: nemolet.module.torch.load, f: '{canary}'}}\n"),
    "two hops to a system call": lambda good, canary: texted(
        good, f"model: {{_target_: nemolet.archive.os.system, command: 'touch {canary}'}}\n"
    ),
    "function of nemolet": lambda good, canary: texted(
        good, f"model: {{_target_: nemolet.draw.write, path: '{canary}', text: x}}\n"
    ),
    "class that may not be built": lambda good, canary: texted(
        good, f"model: {{_target_: nemolet.data.IndexedWriter, path: '{canary}', vocab_size: 5}}\n"
    ),
    "hidden deep inside": lambda good, canary: configured(
        good, rope_scaling={"kind": "linear", "factor": {"_target_": "os.system", "command": f"touch {canary}"}}
    ),
    "private name": lambda good, canary: configured(good, _target_="nemolet.nn._EXPORTS"),
    "target is no text": lambda good, canary: configured(good, _target_=["nemolet.nn.Linear"]),
    "no target": lambda good, canary: configured(good, _target_="absent"),
    "no model": lambda good, canary: texted(good, "tokenizer: {kind: byte}\n"),
    "model is text": lambda good, canary: texted(good, "model: nemolet.language.CausalLM\n"),
    "another part": lambda good, canary: texted(good, MODEL + "more: 1\n"),
    "unknown argument": lambda good, canary: configured(good, evil=1),
    "missing argument": lambda good, canary: configured(good, layers="absent"),
    "wrong type": lambda good, canary: configured(good, layers="one"),
    "broken rule": lambda good, canary: configured(good, heads=3),
    "negative width": lambda good, canary: configured(good, width=-8),
    "no vocabulary": lambda good, canary: configured(good, vocab_size=0),
    "reference to nothing": lambda good, canary: configured(good, rope_scaling={"_ref_": "evil"}),
    "reference that is a list": lambda good, canary: configured(good, rope_scaling={"_ref_": [1]}),
    "value left open": lambda good, canary: configured(good, checkpointing="???"),
    "graph of plain data": lambda good, canary: texted(good, "model: {_target_: nemolet.graph.Graph}\n"),
    "graph without modules": lambda good, canary: texted(
        good, "model: {_target_: nemolet.graph.compose, modules: {}}\n"
    ),
    "abstract module": lambda good, canary: texted(good, "model: {_target_: nemolet.module.NeuralModule, D: 3}\n"),
    "not YAML": lambda good, canary: texted(good, "model: [}"),
    "not text": lambda good, canary: changed(good, CONFIG, b"\xff\xff"),
    "control characters": lambda good, canary: texted(good, "model: \x00\x07"),
    "empty config": lambda good, canary: texted(good, ""),
    "config is a list": lambda good, canary: texted(good, "[model]"),
    "two documents": lambda good, canary: texted(good, MODEL + "---\n" + MODEL),
    "number as a key": lambda good, canary: texted(good, MODEL.replace("in_size: 2", "in_size: 2, 3: 4")),
    "null as a key": lambda good, canary: texted(good, MODEL.replace("in_size: 2", "in_size: 2, null: 4")),
    "date": lambda good, canary: texted(good, MODEL.replace("in_size: 2", "in_size: 2024-01-01")),
    "Python object": lambda good, canary: texted(good, f"model: !!python/object/apply:os.system ['touch {canary}']\n"),
    "Python name": lambda good, canary: texted(good, "model: {_target_: !!python/name:os.system ''}\n"),
    "harmless tag": lambda good, canary: texted(good, MODEL.replace("D,", "!!str D,", 1)),
    "set": lambda good, canary: texted(good, "model: !!set {a, b}\n"),
    "anchor and alias": lambda good, canary: texted(
        good, MODEL.replace("in_size: 2", "in_size: &n 2").replace("out_size: 2", "out_size: *n")
    ),
    "alias bomb": lambda good, canary: texted(good, BOMB + "model: *i\n"),
    "merge key": lambda good, canary: texted(good, "a: &a {b: 1}\nmodel: {<<: *a}\n"),
    "deep": lambda good, canary: texted(good, "model: " + "[" * 5000 + "]" * 5000),
    "deep, but not too deep for YAML": lambda good, canary: configured(
        good, rope_scaling=json.loads('{"a":' * 90 + "1" + "}" * 90)
    ),
    "long": lambda good, canary: texted(good, MODEL + "#" * (1 << 20)),
    # weights
    "missing tensor": lambda good, canary: with_weights(good, lambda t: t.pop(sorted(t)[0])),
    "unknown tensor": lambda good, canary: with_weights(good, lambda t: t.update(evil=torch.zeros(2))),
    "another shape": lambda good, canary: with_weights(
        good, lambda t: t.update({k: torch.zeros(3, 3) for k in sorted(t)[:1]})
    ),
    "another kind": lambda good, canary: with_weights(good, lambda t: t.update({k: v.int() for k, v in t.items()})),
    "complex": lambda good, canary: with_weights(
        good, lambda t: t.update({k: v.to(torch.complex64) for k, v in t.items()})
    ),
    "no tensors": lambda good, canary: with_weights(good, lambda t: t.clear()),
    "junk": lambda good, canary: changed(good, WEIGHTS, b"junk"),
    "empty weights": lambda good, canary: changed(good, WEIGHTS, b""),
    "weights of a huge header": lambda good, canary: changed(good, WEIGHTS, b"\xff" * 8 + b"{}"),
    "cut weights": lambda good, canary: changed(good, WEIGHTS, members_of(good)[WEIGHTS][:-4]),
    "config of another size": lambda good, canary: configured(good, width=16),
    "more layers than weights": lambda good, canary: configured(good, layers=2),
    "a billion layers": lambda good, canary: configured(good, layers=10**9),
    "a table of terabytes": lambda good, canary: configured(good, vocab_size=10**12),
    "terabytes of width": lambda good, canary: configured(good, width=2 * 10**12),
    "terabytes of padding": lambda good, canary: configured(good, pad_vocab_to=10**12),
    "terabytes of positions": lambda good, canary: configured(good, position="learned", context=10**12),
    # tokenizer
    "unknown kind": lambda good, canary: tokenized(good, {"kind": "evil"}),
    "kind is a list": lambda good, canary: tokenized(good, {"kind": ["char"]}),
    "no kind": lambda good, canary: tokenized(good, {}),
    "description is text": lambda good, canary: tokenized(good, "char"),
    "unknown setting": lambda good, canary: tokenized(good, {"kind": "char", "evil": 1}),
    "setting of another kind": lambda good, canary: tokenized(good, {"kind": "byte", "evil": 1}, {}),
    "files of another kind": lambda good, canary: tokenized(good, {"kind": "byte"}),
    "files missing": lambda good, canary: tokenized(good, {"kind": "char", "byte_fallback": False}, {}),
    "files without a tokenizer": lambda good, canary: packed(
        {
            **members_of(good),
            CONFIG: yaml.safe_dump({"model": yaml.safe_load(members_of(good)[CONFIG])["model"]}).encode(),
        }
    ),
    "broken characters": lambda good, canary: tokenized(
        good, {"kind": "char", "byte_fallback": False}, {"tokenizer/characters.json": b'["ab", 3]'}
    ),
    "broken model": lambda good, canary: tokenized(
        good, {"kind": "sentencepiece"}, {"tokenizer/sentencepiece.model": b"\x00junk"}
    ),
    "broken tokenizer.json": lambda good, canary: tokenized(
        good, {"kind": "huggingface", "bos": None, "eos": None}, {"tokenizer/tokenizer.json": b'{"model": {}}'}
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_and_runs_nothing(name, good, tmp_path):
    canary = tmp_path / "canary"
    path = tmp_path / "hostile.nemolet"
    path.write_bytes(HOSTILE[name](good, canary))
    before = set(tmp_path.iterdir())
    with pytest.raises(ArchiveError) as error:
        nl.load(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 4000
    assert set(tmp_path.iterdir()) == before


TOLD = {  # what is said of each class of attack: what it is, and where
    "traversal": ("a member has a forbidden name", "../evil"),
    "absolute path": ("a member has a forbidden name", "expected"),
    "duplicate": ("a member comes twice", CARD),
    "symlink": ("a member is no plain file", CARD),
    "hard link": ("a member is no plain file", "a regular file"),
    "pickle": ("a member has a forbidden name", "data.pkl"),
    "pickled weights": ("the weights cannot be read", WEIGHTS),
    "interpolation": ("interpolation is refused", "${oc.env:HOME}"),
    "target outside": ("this target is not allowed", "'os.system'"),
    "two hops": ("the config is refused", "nemolet.module.torch"),
    "wrong hash": ("the content does not match its hash", "copy it again"),
    "no end": ("this is no whole archive", "copy it again"),
    "ten terabytes": ("a member is larger than the file", "10000000000000 bytes"),
    "version 2": ("the archive is newer than this nemolet", "pip install --upgrade nemolet"),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_refusal_says_what_is_wrong_and_where(name, good, tmp_path):
    path = tmp_path / "hostile.nemolet"
    path.write_bytes(HOSTILE[name](good, tmp_path / "canary"))
    with pytest.raises(ArchiveError) as refused:
        nl.load(path)
    assert str(path) in str(refused.value)
    for words in TOLD[name]:
        assert words in str(refused.value)


def test_hostile_archives_do_not_fill_the_memory(good, tmp_path):
    """All of them in one process that may not grow by more than a gigabyte."""
    names = [
        n
        for n in HOSTILE
        if any(w in n for w in ("terabyte", "billion", "bomb", "deep", "size", "huge", "pax", "width"))
    ]
    assert len(names) > 10
    for number, name in enumerate(names):
        (tmp_path / f"{number}.nemolet").write_bytes(HOSTILE[name](good, tmp_path / "canary"))
    code = """
        import resource, sys, nemolet as nl
        nl.load(sys.argv[1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
        for path in sys.argv[2:]:
            try:
                nl.load(path)
            except nl.errors.ArchiveError as error:
                assert "MemoryError" not in str(error) and "allocate" not in str(error), error
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    files = [str(tmp_path / f"{number}.nemolet") for number in range(len(names))]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), good, *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200  # MiB


def test_the_table_is_long():
    assert len(HOSTILE) > 120


def test_what_is_packed_by_hand_is_accepted_where_it_is_right(good, tmp_path):
    path = tmp_path / "m.nemolet"
    for content in (packed(members_of(good)), configured(good)):
        path.write_bytes(content)
        assert torch.equal(nl.load(path).model(TOKENS), nl.load(good).model(TOKENS))


def test_what_is_no_file(tmp_path):
    for path in (tmp_path / "nowhere.nemolet", tmp_path / "a\0b", tmp_path / ("x" * 5000)):
        with pytest.raises(ArchiveError, match="there is no such file"):
            nl.load(path)
    with pytest.raises(ConversionError, match="no folder of a Hugging Face model"):
        nl.load(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(good, tmp_path):
    path = tmp_path / "m.nemolet"
    path.write_bytes(good.read_bytes())
    path.chmod(0)
    with pytest.raises(ArchiveError):
        nl.load(path)


def test_a_file_cut_anywhere_is_refused(good, tmp_path):
    content = good.read_bytes()
    path = tmp_path / "m.nemolet"
    marks = {0, 1, 511, 512, 513, 1023, 1024, len(content) - 1, len(content) - 512, len(content) - 1024}
    for cut in sorted(marks | set(random.Random(1).sample(range(len(content)), 60))):
        path.write_bytes(content[:cut])
        with pytest.raises(ArchiveError):
            nl.load(path)


def test_a_flipped_bit_is_found_or_changes_nothing(good, tmp_path):
    content = good.read_bytes()
    logits = nl.load(good).model(TOKENS)
    path = tmp_path / "m.nemolet"
    generator = random.Random(2)
    refused = 0
    for _ in range(150):
        flipped = bytearray(content)
        flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        try:
            archive = nl.load(path)
        except ArchiveError:
            refused += 1
            continue
        assert torch.equal(archive.model(TOKENS), logits)
        assert archive.card == "# A card\n"
    assert refused > 140


def test_random_bytes_anywhere_raise_nothing_else(good, tmp_path):
    content = good.read_bytes()
    path = tmp_path / "m.nemolet"
    generator = random.Random(3)
    for _ in range(60):
        broken = bytearray(content)
        start = generator.randrange(len(content) - 64)
        broken[start : start + 64] = generator.randbytes(64)
        path.write_bytes(broken)
        with pytest.raises(ArchiveError):
            nl.load(path)


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
