"""``.nemolet`` files: a model, its tokenizer and its card in one tar that is never extracted.

An archive holds plain data only. Reading one builds typed modules from an allowlist and copies tensors into
them; it executes nothing that came with the file. What the writer would not have written is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
import yaml
from torch import Tensor

from nemolet.config import build, check_tree, resolve
from nemolet.errors import ArchiveError, ConfigError, NemoletError
from nemolet.module import NeuralModule
from nemolet.tokenizers import Tokenizer, describe, rebuild

FORMAT, VERSION = "nemolet", 1
MANIFEST, CONFIG, WEIGHTS, CARD = "manifest.json", "model.yaml", "weights.safetensors", "card.md"
_TOKENIZER = re.compile(r"tokenizer/[A-Za-z0-9_][A-Za-z0-9_.-]*$")
_SMALL = 1 << 26  # largest member that is read as text
_MEMBERS = 64
# One function per old version, from its config to that of the next version. Never remove one.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


@dataclass(frozen=True)
class Archive:
    """What an archive holds.

    Attributes:
        model: the module, in evaluation mode.
        tokenizer: its tokenizer, or None.
        card: a text for people.
        config: the plain data from which both were built.
    """

    model: NeuralModule
    tokenizer: Tokenizer | None
    card: str
    config: dict[str, Any]


def save(path: str | Path, *, model: NeuralModule, tokenizer: Tokenizer | None = None, card: str = "") -> Path:
    """Write a model to a ``.nemolet`` file; equal input gives equal bytes.

    The file appears under its name only when it is complete.

    Raises:
        ArchiveError: for a folder that cannot be written.
        DeclarationError: for a module built with arguments that are no plain data.

    Example:
        >>> import tempfile
        >>> import nemolet as nl
        >>> path = save(Path(tempfile.mkdtemp()) / "m.nemolet", model=nl.nn.Linear("D", "D", 2, 2))
        >>> nl.load(path).config["model"]["_target_"]
        'nemolet.nn.linear.Linear'
    """
    path = Path(path)
    config: dict[str, Any] = {"model": model.config()}
    members = {}
    if tokenizer is not None:
        config["tokenizer"] = describe(tokenizer)
        members = {f"tokenizer/{name}": content for name, content in tokenizer.files().items()}
    members[CONFIG] = yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode()
    members[CARD] = (card or "No card was written.\n").encode()
    members[WEIGHTS] = safetensors.torch.save(_tensors(model), metadata={"format": "pt"})
    _check_config(config)
    manifest = {
        "format": FORMAT, "version": VERSION,
        "members": {n: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in sorted(members.items())},
    }
    ordered = {MANIFEST: json.dumps(manifest, indent=1).encode(), **dict(sorted(members.items()))}
    partial = path.with_name(f".{path.name}.partial{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            _write(file, ordered)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ArchiveError("the archive cannot be written", where=str(path), found=error.strerror,
                           fix="free space or choose another folder; the old file, if any, is untouched") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _write(file: BinaryIO, members: dict[str, bytes]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)  # no owner, no time: the same model gives the same bytes
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))


def _tensors(model: NeuralModule) -> dict[str, Tensor]:
    """Every tensor once: a tied weight is stored under its first name."""
    known: dict[int, str] = {}
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in known:
            known[id(tensor)] = name
            tensors[name] = tensor.detach().to("cpu").contiguous()
    return tensors


def load(path: str | Path, *, device: str | torch.device = "cpu") -> Archive:
    """Read a ``.nemolet`` file.

    Args:
        path: of the file.
        device: where the model goes.

    Raises:
        ArchiveError: for anything that :func:`save` would not have written; nothing of it was executed.
    """
    members, config = _read(Path(path))
    where = str(path)
    try:
        model = build(config["model"], where="model")
        tokenizer = None
        if "tokenizer" in config:
            files = {name.split("/")[1]: content for name, content in members.items() if name.startswith("tokenizer/")}
            tokenizer = rebuild(config["tokenizer"], files)
    except NemoletError as error:
        raise ArchiveError("the model cannot be rebuilt", where=where, found=str(error), fix=error.fix) from error
    if not isinstance(model, NeuralModule):
        raise ArchiveError("the config builds no model", where=f"{where}: {CONFIG}", expected="a typed module", found=type(model).__name__)
    _fill(model, members[WEIGHTS], where)
    return Archive(model.to(device).eval(), tokenizer, members[CARD].decode("utf-8", "replace"), config)


def inspect(path: str | Path) -> dict[str, Any]:
    """The config of an archive, after every check that :func:`load` makes before it builds anything."""
    return _read(Path(path))[1]


def _fill(model: NeuralModule, content: bytes, where: str) -> None:
    try:
        tensors = safetensors.torch.load(content)
    except Exception as error:  # noqa: BLE001 - the Rust library raises its own kinds
        raise ArchiveError("the weights cannot be read", where=f"{where}: {WEIGHTS}", found=str(error)) from error
    expected = _tensors(model)
    missing, unknown = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    wrong = [f"{n}: {tuple(tensors[n].shape)} for {tuple(expected[n].shape)}" for n in expected
             if n in tensors and tensors[n].shape != expected[n].shape]
    if missing or unknown or wrong:
        found = [f"{what} {', '.join(names[:5])}" for what, names in
                 (("missing", missing), ("unknown", unknown), ("of another shape", wrong)) if names]
        raise ArchiveError("the weights do not fit the model", where=f"{where}: {WEIGHTS}", found="; ".join(found),
                           expected=f"{len(expected)} tensors")
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


# --------------------------------------------------------------------------------------------------
# Reading without trust
# --------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All members and the config, checked."""
    if not path.is_file():
        raise ArchiveError("there is no such file", where=str(path), expected="a .nemolet file", found="nothing")
    members = _members(path)
    for name in (MANIFEST, CONFIG, WEIGHTS, CARD):
        if name not in members:
            raise ArchiveError("a member is missing", where=str(path), expected=name, found=", ".join(members) or "nothing")
    version = _check_manifest(members, str(path))
    config = _parse(members[CONFIG], f"{path}: {CONFIG}")
    for old in range(version, VERSION):
        config = MIGRATIONS[old](config)
    try:
        _check_config(config)
    except ConfigError as error:
        raise ArchiveError("the config is refused", where=f"{path}: {CONFIG}", found=str(error)) from error
    return members, config


def _members(path: Path) -> dict[str, bytes]:
    """The members of the tar: plain files with known names, each once, no larger than the file."""
    members: dict[str, bytes] = {}
    size = path.stat().st_size
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                _check_member(member, members, size, str(path))
                content = tar.extractfile(member)
                assert content is not None
                members[member.name] = content.read()
                if len(members[member.name]) != member.size:
                    raise ArchiveError("the file is truncated", where=f"{path}: {member.name}", expected=f"{member.size} bytes",
                                       found=f"{len(members[member.name])} bytes", fix="copy it again")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise ArchiveError("this is no whole archive", where=str(path), expected="an uncompressed tar", found=str(error),
                           fix="copy it again") from error
    return members


def _check_member(member: tarfile.TarInfo, members: dict[str, bytes], size: int, where: str) -> None:
    place = f"{where}: {member.name!r}"
    known = member.name in (MANIFEST, CONFIG, WEIGHTS, CARD) or _TOKENIZER.match(member.name)
    if not known:
        raise ArchiveError("a member has a forbidden name", where=place, found=member.name,
                           expected=f"{MANIFEST}, {CONFIG}, {WEIGHTS}, {CARD} or tokenizer/<file>")
    if member.type != tarfile.REGTYPE or member.pax_headers or member.sparse is not None:
        raise ArchiveError("a member is no plain file", where=place, expected="a regular file", found=f"tar type {member.type!r}")
    if member.name in members or len(members) >= _MEMBERS:
        raise ArchiveError("a member comes twice" if member.name in members else "there are too many members", where=place)
    if member.size > size or (member.name != WEIGHTS and member.size > _SMALL):
        raise ArchiveError("a member is too large", where=place, found=f"{member.size} bytes",
                           expected=f"at most {size if member.size > size else _SMALL} bytes")


def _check_manifest(members: dict[str, bytes], where: str) -> int:
    place = f"{where}: {MANIFEST}"
    try:
        manifest = json.loads(members[MANIFEST])
        version, listed = manifest["version"], dict(manifest["members"])
        right = manifest["format"] == FORMAT and type(version) is int and version >= 1
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArchiveError("the manifest cannot be read", where=place, found=repr(error)) from error
    if not right:
        raise ArchiveError("this is another format", where=place, expected=FORMAT, found=str(manifest["format"])[:50])
    if version > VERSION:
        raise ArchiveError("the archive is newer than this nemolet", where=place, expected=f"version {VERSION} or older",
                           found=f"version {version}", fix="pip install --upgrade nemolet")
    if set(listed) != set(members) - {MANIFEST}:
        odd = sorted(set(listed) ^ (set(members) - {MANIFEST}))
        raise ArchiveError("the manifest lists other members", where=place, found=", ".join(odd))
    for name, entry in listed.items():
        actual = hashlib.sha256(members[name]).hexdigest()
        if not isinstance(entry, dict) or entry.get("sha256") != actual or entry.get("size") != len(members[name]):
            raise ArchiveError("the content does not match its hash", where=f"{where}: {name}",
                               expected=entry.get("sha256") if isinstance(entry, dict) else "a hash", found=actual, fix="copy it again")
    return int(version)


def _parse(content: bytes, where: str) -> dict[str, Any]:
    """Plain YAML: no tags, no anchors, no interpolation."""
    try:
        text = content.decode()
        if "${" in text:
            raise ArchiveError("interpolation is refused", where=where, found=re.findall(r"\$\{[^}]*\}?", text)[0])
        if len(text) > 1 << 20:
            raise ArchiveError("the config is too large", where=where, expected="at most 1 MiB", found=f"{len(text)} bytes")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ArchiveError("aliases are refused", where=where, fix="write every value out")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ArchiveError("the config cannot be read", where=where, expected="plain YAML", found=str(error)[:300]) from error
    if not isinstance(config, dict) or not set(config) <= {"model", "tokenizer"} or not isinstance(config.get("model"), dict):
        raise ArchiveError("the config has other parts", where=where, expected="model, and perhaps tokenizer",
                           found=", ".join(map(str, config)) if isinstance(config, dict) else type(config).__name__)
    return config


def _check_config(config: dict[str, Any]) -> None:
    """Every target is allowed and every argument fits, before anything is built.

    Raises:
        ConfigError: for the first target that is not.
    """
    problems = check_tree(config["model"], "model")
    if problems:
        raise ConfigError(str(problems[0]), where="model")

    def visit(value: Any, where: str) -> None:
        if isinstance(value, dict):
            if "_target_" in value:
                resolve(value["_target_"], f"{where}._target_")
            for key, item in value.items():
                visit(item, f"{where}.{key}")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                visit(item, f"{where}[{index}]")

    visit(config["model"], "model")
