"""Archives that are wrong, each in one way."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import pickle
import random
import tarfile
import zipfile

import safetensors.torch
import torch
import yaml

import nemolet as nl
from nemolet.container import CARD, CONFIG, MANIFEST, WEIGHTS
from nemolet.tokenizers import CharTokenizer

TOKENS = torch.tensor([[1, 2, 3, 4]])


def small(**changes):
    torch.manual_seed(0)
    return nl.language.CausalLM(**{"vocab_size": 11, "layers": 1, "width": 8, "heads": 2, "context": 8, **changes})


def make(path):
    """A whole archive."""
    return nl.save(path, model=small(), tokenizer=CharTokenizer("abcdefghijk"), card="# A card\n")


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


def changed(good, name, content):
    return packed({**members_of(good), name: content})


def configured(good, **changes):
    """The archive with another config of the model."""
    config = yaml.safe_load(members_of(good)[CONFIG])
    config["model"] = {k: v for k, v in {**config["model"], **changes}.items() if v != "absent"}
    return changed(good, CONFIG, yaml.safe_dump(config).encode())


def modelled(good, model):
    """The archive with the config of another model."""
    config = {**yaml.safe_load(members_of(good)[CONFIG]), "model": model}
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


def headed(good, edit):
    """The archive with another header of its weights: ``edit`` gets the entries, and may return the text itself."""
    content = members_of(good)[WEIGHTS]
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = (edit(header) or json.dumps(header)).encode()
    return changed(good, WEIGHTS, len(text).to_bytes(8, "little") + text + content[8 + length :])


def entry(**changes):
    """Lies about one tensor."""

    def edit(header):
        name = sorted(header.keys() - {"__metadata__"})[0]
        header[name] |= {key: value(header[name]) if callable(value) else value for key, value in changes.items()}

    return edit


def tables(number, length):
    """A graph of decoders, each with a table of positions that is not stored."""
    decoder = {"_target_": "nemolet.nn.Decoder", "layers": 1, "width": 8, "heads": 2, "position": "sinusoidal"}
    modules = {f"m{i}": {**decoder, "max_length": length} for i in range(number)}
    return {"_target_": "nemolet.graph.compose", "modules": modules}


def shifted(header):
    """All tensors four bytes further."""
    return {
        name: {**lie, "data_offsets": [x + 4 for x in lie["data_offsets"]]} if name != "__metadata__" else lie
        for name, lie in header.items()
    }


def twice_in_header(header):
    name = sorted(header.keys() - {"__metadata__"})[0]
    return json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"


def zipped(good, *, streamed=False, prefix=b"", **info):
    """A zip of the members: with sizes after the contents, bytes before it, or lies in its directory."""
    buffer = io.BytesIO()
    target = Unseekable(buffer) if streamed else buffer
    with zipfile.ZipFile(target, "w") as file:
        for name, content in members_of(good).items():
            file.writestr(name, content)
        for key, value in info.items():
            setattr(file.filelist[0], key, value)
    return prefix + buffer.getvalue()


class Unseekable(io.RawIOBase):
    """Makes zipfile write data descriptors."""

    def __init__(self, inner):
        self.inner = inner

    def writable(self):
        return True

    def write(self, content):
        return self.inner.write(content)


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
    "wide letters": lambda good, canary: extra(good, name="\uff4dodel.yaml"),
    "letters that look alike": lambda good, canary: extra(good, name="m\u043edel.yaml"),
    "accent of its own": lambda good, canary: extra(good, name="tokenizer/e\u0301"),
    "backslash": lambda good, canary: extra(good, name="tokenizer\\evil"),
    "capitals": lambda good, canary: extra(good, name="Model.yaml"),
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
    "zip with sizes after contents": lambda good, canary: zipped(good, streamed=True),
    "zip that lies about sizes": lambda good, canary: zipped(good, file_size=2**40, compress_size=2**40),
    "zip after something else": lambda good, canary: zipped(good, prefix=b"x" * tarfile.RECORDSIZE),
    "archive after a zip": lambda good, canary: zipped(good).ljust(2 * tarfile.RECORDSIZE, b"\0") + good.read_bytes(),
    "archive after a script": lambda good, canary: b"#!/bin/sh\n".ljust(tarfile.RECORDSIZE, b"\0") + good.read_bytes(),
    "archive after zeros": lambda good, canary: bytes(tarfile.RECORDSIZE) + good.read_bytes(),
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
    "manifest says it twice": lambda good, canary: manifested(
        good, members_of(good)[MANIFEST].replace(b'"version": 1', b'"version": 9, "version": 1')
    ),
    "manifest of a number that is none": lambda good, canary: packed(members_of(good), version=math.nan),
    "manifest of megabytes": lambda good, canary: manifested(good, members_of(good)[MANIFEST] + b" " * (1 << 20)),
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
    "setting given twice": lambda good, canary: texted(good, MODEL.replace("in_size: 2", "in_size: 2, in_size: 2")),
    "merge key without an alias": lambda good, canary: texted(good, MODEL.replace("in_size: 2", "<<: {in_size: 2}")),
    "not a number": lambda good, canary: configured(good, dropout=math.nan),
    "infinite": lambda good, canary: configured(good, dropout=math.inf),
    "number of minutes": lambda good, canary: texted(good, MODEL.replace("in_size: 2", "in_size: 0:2")),
    "octal number": lambda good, canary: texted(good, MODEL.replace("in_size: 2", "in_size: 02")),
    "minutes without end": lambda good, canary: texted(
        good, MODEL.replace("in_size: 2", "in_size: " + ":".join("1" * 400) + ".5")
    ),
    "number of a million digits": lambda good, canary: texted(
        good, MODEL.replace("in_size: 2", "in_size: 0x" + "f" * 900_000)
    ),
    "a hundred thousand values": lambda good, canary: texted(good, MODEL + f"more: [{'[],' * 10**5}]\n"),
    # weights
    "tensors that overlap": lambda good, canary: headed(
        good, entry(data_offsets=lambda e: [0, e["data_offsets"][1] - e["data_offsets"][0]])
    ),
    "tensor before the start": lambda good, canary: headed(good, entry(data_offsets=lambda e: [-8, 0])),
    "tensor beyond the end": lambda good, canary: headed(
        good, entry(data_offsets=lambda e: [10**12, 10**12 + e["data_offsets"][1] - e["data_offsets"][0]])
    ),
    "tensor that ends before it starts": lambda good, canary: headed(
        good, entry(data_offsets=lambda e: e["data_offsets"][::-1])
    ),
    "offsets that are fractions": lambda good, canary: headed(
        good, entry(data_offsets=lambda e: [float(x) for x in e["data_offsets"]])
    ),
    "larger shape": lambda good, canary: headed(good, entry(shape=lambda e: [2, *e["shape"]])),
    "negative shape": lambda good, canary: headed(good, entry(shape=lambda e: [-1, -1, *e["shape"]])),
    "shape that is text": lambda good, canary: headed(good, entry(shape=lambda e: "".join(map(str, e["shape"])))),
    "shape of fractions": lambda good, canary: headed(good, entry(shape=lambda e: [x + 0.5 for x in e["shape"]])),
    "shape of truths": lambda good, canary: headed(good, entry(shape=lambda e: [True, *e["shape"]])),
    "shape of huge numbers": lambda good, canary: headed(good, entry(shape=[10**4000] * 500)),
    "shape without end": lambda good, canary: headed(good, entry(shape=lambda e: [*e["shape"], *[1] * 1000])),
    "wider type": lambda good, canary: headed(good, entry(dtype="F64")),
    "type that is not known": lambda good, canary: headed(good, entry(dtype="Q4")),
    "type that is a list": lambda good, canary: headed(good, entry(dtype=["F32"])),
    "tensor named twice": lambda good, canary: headed(good, twice_in_header),
    "header of a number that is none": lambda good, canary: headed(good, entry(shape=[math.nan])),
    "header that is a list": lambda good, canary: headed(good, lambda header: "[]"),
    "deep header": lambda good, canary: headed(good, lambda header: "[" * 100_000),
    "something between tensors": lambda good, canary: headed(good, lambda h: json.dumps(shifted(h))),
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
    "terabytes of fixed positions": lambda good, canary: modelled(good, tables(1, 10**12)),
    "gigabytes of fixed positions": lambda good, canary: modelled(good, tables(1, 10**9)),
    "gigabytes in many modest tables": lambda good, canary: modelled(good, tables(60, 10**5)),
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
