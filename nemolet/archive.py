"""``.nemolet`` files: a model, its tokenizer and its card in one tar that is never extracted.

An archive holds plain data only. Reading one builds typed modules from an allowlist and copies tensors into
them; it executes nothing that came with the file. What the writer would not have written is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
import yaml
from torch import Tensor

from nemolet.config import build, check_tree, refuse, resolve
from nemolet.errors import ArchiveError, ConfigError, NemoletError
from nemolet.module import NeuralModule
from nemolet.tokenizers import Tokenizer, describe, rebuild

FORMAT, VERSION = "nemolet", 1
MANIFEST, CONFIG, WEIGHTS, CARD = "manifest.json", "model.yaml", "weights.safetensors", "card.md"
_TOKENIZER = re.compile(r"tokenizer/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SMALL = 1 << 26  # largest member beside the weights
_LONGEST_CONFIG, _DEEPEST_CONFIG, _MEMBERS = 1 << 20, 32, 64
_BLOCK = tarfile.BLOCKSIZE
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
        ConfigError: for a module that :func:`load` would refuse, since its class is not registered.
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
    members[CONFIG] = yaml.dump(config, Dumper=_Plain, sort_keys=False, allow_unicode=True).encode()
    members[CARD] = (card or "No card was written.\n").encode()
    members[WEIGHTS] = safetensors.torch.save(_tensors(model), metadata={"format": "pt"})
    _check_config(config)
    members = dict(sorted(members.items()))
    listed = {name: _entry(content) for name, content in members.items()}
    manifest = {"format": FORMAT, "version": VERSION, "members": listed}
    partial = path.with_name(f".{path.name}.partial{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            _write(file, {MANIFEST: json.dumps(manifest, indent=1).encode(), **members})
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        fix = "free space or choose another folder; the old file, if any, is untouched"
        raise ArchiveError("the archive cannot be written", where=str(path), found=error.strerror, fix=fix) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def _entry(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


class _Plain(yaml.SafeDumper):
    """Writes a value that occurs twice twice: the reader refuses references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write(file: BinaryIO, members: dict[str, bytes]) -> None:
    # The GNU form of a header differs from the older one only where a member is larger than 8 GiB.
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
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
            tensors[name] = tensor.detach()
    return {
        name: tensor.to("cpu").contiguous() if tensor.device.type != "meta" else tensor
        for name, tensor in tensors.items()
    }


def load(path: str | Path, *, device: str | torch.device = "cpu") -> Archive:
    """Read a ``.nemolet`` file.

    Args:
        path: of the file.
        device: where the model goes.

    Raises:
        ArchiveError: for anything that :func:`save` would not have written; nothing of it was executed.
        ConfigError: for a device that this machine does not have.
    """
    members, config = _read(Path(path))
    where = str(path)
    tensors = _parse_weights(members[WEIGHTS], where)
    try:
        tokenizer = _rebuilt_tokenizer(config, members, where)
        model = _built(config["model"], tensors, where)
    except ArchiveError:
        raise
    except NemoletError as error:
        found = str(error)
        raise ArchiveError("the model cannot be rebuilt", where=where, found=found, fix=error.fix) from error
    except Exception as error:  # hostile values meet constructors; whatever those raise is a refusal
        found = f"{type(error).__name__}: {error}"
        raise ArchiveError("the model cannot be rebuilt", where=where, found=found) from error
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    try:
        model = model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        found = f"{device}: {str(error).splitlines()[0][:200]}"
        raise ConfigError(
            "this device cannot be used", where="device", found=found, expected="cpu, or one of this machine"
        ) from error
    return Archive(model, tokenizer, members[CARD].decode("utf-8", "replace"), config)


def inspect(path: str | Path) -> dict[str, Any]:
    """The config of an archive, after every check that :func:`load` makes before it builds anything."""
    return _read(Path(path))[1]


# --------------------------------------------------------------------------------------------------
# Building what a config says, no larger than the weights
# --------------------------------------------------------------------------------------------------


def _parse_weights(content: bytes, where: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except Exception as error:
        raise ArchiveError("the weights cannot be read", where=f"{where}: {WEIGHTS}", found=str(error)[:300]) from error


def _built(config: dict[str, Any], tensors: dict[str, Tensor], where: str) -> NeuralModule:
    """Build the model on no device and compare it with the weights, then build it for real."""
    with _no_larger_than(tensors, f"{where}: {CONFIG}"):
        try:
            with torch.device("meta"):
                _compare(build(config, where="model"), tensors, where)
        except ConfigError as error:  # a class of the user's may look at values
            if not isinstance(error.__cause__, (NotImplementedError, RuntimeError)):
                raise
        model = build(config, where="model")
    _compare(model, tensors, where)
    return model  # type: ignore[no-any-return]


@contextlib.contextmanager
def _no_larger_than(tensors: dict[str, Tensor], where: str) -> Iterator[None]:
    """Stop a config that makes more or larger parameters than the weights hold, before the memory is full."""
    largest = max((tensor.numel() for tensor in tensors.values()), default=0)
    most = 4 * len(tensors) + 64  # a model is built twice here, and may replace parameters while it is built
    known: dict[int, Tensor] = {}

    def watch(module: torch.nn.Module, name: str, parameter: Tensor | None) -> None:
        if parameter is None:
            return
        known[id(parameter)] = parameter
        if parameter.numel() > largest or len(known) > most:
            raise ArchiveError(
                "the weights do not fit the model",
                where=where,
                found=f"{name} beyond that",
                expected=f"{len(tensors)} tensors of up to {largest} numbers",
            )

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(watch)
    try:
        yield
    finally:
        handle.remove()


def _compare(model: Any, tensors: dict[str, Tensor], where: str) -> None:
    if not isinstance(model, NeuralModule):
        raise ArchiveError(
            "the config builds no model", where=f"{where}: {CONFIG}", found=str(type(model)), expected="a typed module"
        )
    expected = _tensors(model)
    pairs = [(name, tensors[name], tensor) for name, tensor in expected.items() if name in tensors]
    odd = {
        "missing": sorted(expected.keys() - tensors),
        "unknown": sorted(tensors.keys() - expected),
        "of another shape": [
            f"{name}: {tuple(found.shape)} for {tuple(own.shape)}"
            for name, found, own in pairs
            if found.shape != own.shape
        ],
        "of another kind": [
            f"{name}: {found.dtype} for {own.dtype}"
            for name, found, own in pairs
            if found.is_floating_point() != own.is_floating_point()
        ],
    }
    if any(odd.values()):
        listed = "; ".join(f"{what} {', '.join(names[:5])}" for what, names in odd.items() if names)
        raise ArchiveError(
            "the weights do not fit the model",
            where=f"{where}: {WEIGHTS}",
            found=listed,
            expected=f"{len(expected)} tensors",
        )


def _rebuilt_tokenizer(config: dict[str, Any], members: dict[str, bytes], where: str) -> Tokenizer | None:
    prefix = "tokenizer/"
    files = {n.removeprefix(prefix): content for n, content in members.items() if n.startswith(prefix)}
    if "tokenizer" not in config:
        if files:
            raise ArchiveError(
                "there are files of a tokenizer, but the config has none", where=where, found=", ".join(files)
            )
        return None
    tokenizer = rebuild(config["tokenizer"], files)
    if describe(tokenizer) != config["tokenizer"] or tokenizer.files().keys() != files.keys():
        raise ArchiveError(
            "the tokenizer has parts that it does not know",
            where=where,
            expected=str(describe(tokenizer))[:300],
            found=f"{str(config['tokenizer'])[:300]}; files {', '.join(files) or 'none'}",
        )
    return tokenizer


# --------------------------------------------------------------------------------------------------
# Reading without trust
# --------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All members and the config, checked."""
    try:
        found = None if path.is_file() else "a folder" if path.is_dir() else "nothing"
    except OSError as error:  # a name that no file can have
        found = error.strerror
    if found is not None:
        raise ArchiveError("there is no such file", where=str(path), expected="a .nemolet file", found=found)
    members = _members(path)
    for name in (MANIFEST, CONFIG, WEIGHTS, CARD):
        if name not in members:
            raise ArchiveError(
                "a member is missing", where=str(path), expected=name, found=", ".join(members) or "nothing"
            )
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
    """The members of the tar: plain files with known names, each once, no larger than the file.

    Headers are read one by one and never acted upon: extensions such as links, sparse files and long names
    are members of another type, and as such refused.
    """
    members: dict[str, bytes] = {}
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            while (block := file.read(_BLOCK)).strip(b"\0"):
                member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
                _check_member(member, members, size - file.tell(), str(path))
                content = members[member.name] = file.read(member.size)
                if len(content) < member.size or file.read(-member.size % _BLOCK).strip(b"\0"):
                    raise ValueError(f"{member.name} is truncated, or something hides after it")
            rest = file.read(2 * tarfile.RECORDSIZE)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ArchiveError(
            "this is no whole archive",
            where=str(path),
            expected="an uncompressed tar",
            found=str(error) or type(error).__name__,
            fix="copy it again",
        ) from error
    # The writer ends with zeros up to a whole record; a cut in them is a cut all the same.
    if size % tarfile.RECORDSIZE or len(rest) > tarfile.RECORDSIZE or rest.strip(b"\0"):
        raise ArchiveError(
            "this is no whole archive",
            where=str(path),
            found=f"{size} bytes",
            expected=f"an end mark, up to a multiple of {tarfile.RECORDSIZE} bytes",
            fix="copy it again",
        )
    return members


def _check_member(member: tarfile.TarInfo, members: dict[str, bytes], left: int, where: str) -> None:
    place = f"{where}: {member.name!r}"
    if member.name not in (MANIFEST, CONFIG, WEIGHTS, CARD) and not _TOKENIZER.fullmatch(member.name):
        raise ArchiveError(
            "a member has a forbidden name",
            where=place,
            found=member.name,
            expected=f"{MANIFEST}, {CONFIG}, {WEIGHTS}, {CARD} or tokenizer/<file>",
        )
    if member.type != tarfile.REGTYPE or member.linkname:
        raise ArchiveError(
            "a member is no plain file", where=place, expected="a regular file", found=f"tar type {member.type!r}"
        )
    if member.name in members or len(members) >= _MEMBERS:
        twice = member.name in members
        raise ArchiveError("a member comes twice" if twice else "there are too many members", where=place)
    most = left if member.name == WEIGHTS else min(left, _SMALL)
    if not 0 <= member.size <= most:
        raise ArchiveError(
            "a member is larger than the file, or too large",
            where=place,
            fix="copy it again",
            expected=f"at most {most} bytes",
            found=f"{member.size} bytes",
        )


def _check_manifest(members: dict[str, bytes], where: str) -> int:
    place = f"{where}: {MANIFEST}"
    try:
        manifest = json.loads(members[MANIFEST])
        name, version, listed = manifest["format"], manifest["version"], manifest["members"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArchiveError("the manifest cannot be read", where=place, found=repr(error)[:300]) from error
    if name != FORMAT or type(version) is not int or version < 1 or not isinstance(listed, dict):
        raise ArchiveError(
            "this is another format",
            where=place,
            expected=f"{FORMAT}, version {VERSION}",
            found=f"{str(name)[:50]}, version {str(version)[:50]}",
        )
    if version > VERSION:
        raise ArchiveError(
            "the archive is newer than this nemolet",
            where=place,
            found=f"version {version}",
            expected=f"version {VERSION} or older",
            fix="pip install --upgrade nemolet",
        )
    odd = sorted(set(listed) ^ (set(members) - {MANIFEST}))
    if odd:
        raise ArchiveError("the manifest lists other members", where=place, found=", ".join(odd)[:300])
    for name, entry in listed.items():
        if entry != _entry(members[name]):
            raise ArchiveError(
                "the content does not match its hash",
                where=f"{where}: {name}",
                expected=str(entry)[:300],
                found=_entry(members[name]),
                fix="copy it again",
            )
    return version


def _parse(content: bytes, where: str) -> dict[str, Any]:
    """Plain YAML: no tags, no aliases, no interpolation, no depth without end."""
    if len(content) > _LONGEST_CONFIG:
        raise ArchiveError(
            "the config is too large",
            where=where,
            found=f"{len(content)} bytes",
            expected=f"at most {_LONGEST_CONFIG} bytes",
        )
    try:
        text = content.decode()
        if "${" in text:
            raise ArchiveError("interpolation is refused", where=where, found=text[text.index("${") :][:80])
        _check_events(text, where)
        config = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ArchiveError(
            "the config cannot be read", where=where, expected="plain YAML", found=str(error)[:300]
        ) from error
    if not _is_plain(config):
        raise ArchiveError(
            "the config holds more than plain data",
            where=where,
            expected="mappings from text, lists, text, numbers, true, false and null",
        )
    right = isinstance(config, dict) and {"model"} <= set(config) <= {"model", "tokenizer"}
    if not right or not all(isinstance(part, dict) for part in config.values()):
        found = ", ".join(config)[:300] if isinstance(config, dict) else type(config).__name__
        raise ArchiveError(
            "the config has other parts", where=where, expected="model, and perhaps tokenizer", found=found
        )
    return config  # type: ignore[no-any-return]


def _check_events(text: str, where: str) -> None:
    """Before anything is made of the text, since a few lines can stand for gigabytes."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ArchiveError(
                "aliases are refused", where=where, found=f"*{event.anchor}", fix="write every value out"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST_CONFIG:
            raise ArchiveError(
                "the config is nested too deeply", where=where, expected=f"at most {_DEEPEST_CONFIG} levels"
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise ArchiveError("tags are refused", where=where, found=tag)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _check_config(config: dict[str, Any]) -> None:
    """Every target is allowed and every argument fits, before anything is built.

    Raises:
        ConfigError: listing what is wrong.
    """
    refuse(check_tree(config["model"], "model"), "model")

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
