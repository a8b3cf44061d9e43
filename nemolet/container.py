"""The container of a ``.nemolet`` file: a tar of a few plain members that is written whole and read without trust.

Nothing is ever extracted, and what the writer would not have written is refused: links, unknown or repeated members,
sizes beyond the file, hashes that differ, and YAML that is more than plain data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from torch import Tensor

from nemolet.errors import ArchiveError
from nemolet.tensor_files import OpenFile, Spec, header_bytes, parse_json, tensor_bytes

FORMAT = "nemolet"
MANIFEST, CONFIG, WEIGHTS, CARD = "manifest.json", "model.yaml", "weights.safetensors", "card.md"
_FILES = re.compile(r"(tokenizer|extra|extra/additional_chat_templates)/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SMALL = 1 << 27  # all that is read into memory beside the weights
_LARGEST = {MANIFEST: 1 << 20, CONFIG: 1 << 20}  # what is parsed takes a multiple of its size
LONGEST_HEADER = 1 << 24  # of the weights
_DEEPEST_CONFIG, _LONGEST_CONFIG, _MEMBERS = 32, 1 << 17, 64
_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,19})")
_FRACTION = re.compile(r"-?([0-9]{1,20}\.[0-9]{0,20}(e[-+][0-9]{1,3})?|\.inf)")
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Member:
    """One file within the container.

    Args:
        file: the container.
        start: where in it the content begins.
        size: of the content.
        sha256: of the content.
        content: itself; that of weights stays where it lies.
    """

    file: OpenFile
    start: int
    size: int
    sha256: str
    content: bytes = b""

    @property
    def entry(self) -> dict[str, Any]:
        """As the manifest lists it."""
        return {"size": self.size, "sha256": self.sha256}


def write_container(
    path: Path,
    members: Mapping[str, bytes],
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    version: int,
) -> None:
    """Write members and a manifest of them; the file appears under its name only when it is complete.

    Args:
        path: of the file.
        members: content by name, of all but the weights; equal members give equal bytes.
        specs: which tensors will come, in their order.
        tensors: the weights, one at a time.
        version: of the format.

    Raises:
        ArchiveError: for a folder that cannot be written.
    """
    for name in members:
        if name not in (CONFIG, CARD) and not _FILES.fullmatch(name):
            raise ArchiveError(
                "a member has a forbidden name", where=f"{path}: {name!r}", expected="tokenizer/<file> or extra/<file>"
            )
    sizes = {name: len(content) for name, content in members.items()}
    _check_sizes({**sizes, MANIFEST: 0, WEIGHTS: 0}, str(path))
    header = len(header_bytes(specs))
    if header > LONGEST_HEADER:
        raise ArchiveError("there are too many tensors", where=str(path), found=len(specs), expected="a shorter list")
    partial = path.with_name(f".{path.name}.partial{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            _write(file, dict(sorted(members.items())), specs, tensors, version)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        fix = "free space or choose another folder; the old file, if any, is untouched"
        raise ArchiveError("the archive cannot be written", where=str(path), found=error.strerror, fix=fix) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def read_container(path: Path, version: int) -> tuple[dict[str, Member], int]:
    """All members, checked against the manifest, and the version of the format.

    Args:
        path: of the file.
        version: the newest that the reader knows.

    Raises:
        ArchiveError: for anything that :func:`write_container` would not have written.
    """
    try:
        found = None if path.is_file() else "a folder" if path.is_dir() else "no file" if path.exists() else "nothing"
    except OSError as error:  # a name that no file can have
        found = error.strerror
    if found is not None:
        raise ArchiveError(
            "there is no such file", where=str(path), expected="a .nemolet file or a folder", found=found
        )
    try:
        file = OpenFile(path)
    except OSError as error:
        raise ArchiveError("the file cannot be opened", where=str(path), found=error.strerror or str(error)) from error
    members = _members(file)
    for name in (MANIFEST, CONFIG, WEIGHTS, CARD):
        if name not in members:
            raise ArchiveError(
                "a member is missing", where=str(path), expected=name, found=", ".join(members) or "nothing"
            )
    return members, _check_manifest(members, str(path), version)


def write_config(config: dict[str, Any]) -> bytes:
    """Plain data as YAML that :func:`read_config` accepts."""
    text: str = yaml.dump(config, Dumper=_Plain, sort_keys=False, allow_unicode=True)
    return text.encode()


_FOLDED = {"\x85", "\u2028", "\u2029"}


class _Plain(yaml.SafeDumper):
    """Writes a value that occurs twice twice: the reader refuses references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.Node:
        """In quotes where it has a line end that YAML would fold."""
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if set(data) & _FOLDED else None)


_Plain.add_representer(str, _Plain.represent_str)


def _write(
    file: BinaryIO,
    small: Mapping[str, bytes],
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    version: int,
) -> None:
    """The manifest comes first and holds the hash of the weights, which is known last: it is written once more then."""
    size = len(header_bytes(specs)) + sum(spec.bytes for spec in specs.values())
    listed: dict[str, dict[str, Any]] = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in small.items()
    }
    listed[WEIGHTS] = {"size": size, "sha256": "0" * 64}
    whole = {"format": FORMAT, "version": version, "members": listed}
    manifest = json.dumps(whole, indent=1).encode()
    at = _write_header(file, MANIFEST, len(manifest))
    _write_padded(file, [manifest], len(manifest))
    for name, content in small.items():
        _write_header(file, name, len(content))
        _write_padded(file, [content], len(content))
    _write_header(file, WEIGHTS, size)
    listed[WEIGHTS]["sha256"] = _write_padded(file, tensor_bytes(specs, tensors), size)
    file.write(b"\0" * 2 * _BLOCK)
    file.write(b"\0" * (-file.tell() % tarfile.RECORDSIZE))
    file.seek(at)
    file.write(json.dumps(whole, indent=1).encode())


def _write_header(file: BinaryIO, name: str, size: int) -> int:
    """Write the header of a member; returns where its content begins."""
    member = tarfile.TarInfo(name)  # no owner, no time: the same model gives the same bytes
    member.size, member.mode = size, 0o644
    # The GNU form of a header differs from the older one only where a member is larger than 8 GiB.
    file.write(member.tobuf(tarfile.GNU_FORMAT))
    return file.tell()


def _write_padded(file: BinaryIO, chunks: Iterable[bytes | memoryview], size: int) -> str:
    """Write a content up to a whole block; returns its hash."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        file.write(chunk)
    file.write(b"\0" * (-size % _BLOCK))
    return digest.hexdigest()


def _look(file: OpenFile, name: str, start: int, size: int) -> Member:
    """Read a member, or, of weights, only their hash."""
    if name != WEIGHTS:
        content = file.read(start, size)
        return Member(file, start, len(content), hashlib.sha256(content).hexdigest(), content)
    digest, done = hashlib.sha256(), 0
    while chunk := file.read(start + done, min(size - done, _CHUNK)):
        digest.update(chunk)
        done += len(chunk)
    return Member(file, start, done, digest.hexdigest())


def _members(file: OpenFile) -> dict[str, Member]:
    """The members of the tar: plain files with known names, each once, no larger than the file.

    Headers are read one by one and never acted upon: extensions such as links, sparse files and long names
    are members of another type, and as such refused.
    """
    members: dict[str, Member] = {}
    at, where = 0, str(file.path)
    try:
        while (block := file.read(at, _BLOCK)).strip(b"\0"):
            at += len(block)
            header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            _check_member(header, members, file.size - at, where)
            found = members[header.name] = _look(file, header.name, at, header.size)
            at += found.size
            rest = file.read(at, -header.size % _BLOCK)
            at += len(rest)
            if found.size < header.size or rest.strip(b"\0"):
                raise ValueError(f"{header.name} is truncated, or something hides after it")
        rest = file.read(at + len(block), 2 * tarfile.RECORDSIZE)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ArchiveError(
            "this is no whole archive",
            where=where,
            expected="an uncompressed tar",
            found=str(error) or type(error).__name__,
            fix="copy it again",
        ) from error
    # The writer ends with zeros up to a whole record; a cut in them is a cut all the same.
    if file.size % tarfile.RECORDSIZE or len(rest) > tarfile.RECORDSIZE or rest.strip(b"\0"):
        raise ArchiveError(
            "this is no whole archive",
            where=where,
            found=f"{file.size} bytes",
            expected=f"an end mark, up to a multiple of {tarfile.RECORDSIZE} bytes",
            fix="copy it again",
        )
    return members


def _check_member(member: tarfile.TarInfo, members: dict[str, Member], left: int, where: str) -> None:
    place = f"{where}: {member.name!r}"
    if member.name not in (MANIFEST, CONFIG, WEIGHTS, CARD) and not _FILES.fullmatch(member.name):
        raise ArchiveError(
            "a member has a forbidden name",
            where=place,
            found=member.name,
            expected=f"{MANIFEST}, {CONFIG}, {WEIGHTS}, {CARD}, tokenizer/<file> or extra/<file>",
        )
    if member.type != tarfile.REGTYPE or member.linkname:
        raise ArchiveError(
            "a member is no plain file", where=place, expected="a regular file", found=f"tar type {member.type!r}"
        )
    if member.name in members:
        raise ArchiveError("a member comes twice", where=place)
    if not 0 <= member.size <= left:
        raise ArchiveError(
            "a member is larger than the file",
            where=place,
            fix="copy it again",
            expected=f"at most {left} bytes",
            found=f"{member.size} bytes",
        )
    _check_sizes({**{name: found.size for name, found in members.items()}, member.name: member.size}, where)


def _check_sizes(sizes: Mapping[str, int], where: str) -> None:
    """Before they are read, or written: of all members but the weights the content is held in memory."""
    if len(sizes) > _MEMBERS:
        raise ArchiveError("there are too many members", where=where, found=len(sizes), expected=f"at most {_MEMBERS}")
    small = {name: size for name, size in sizes.items() if name != WEIGHTS}
    for name, size in {**small, "all members beside the weights": sum(small.values())}.items():
        most = _LARGEST.get(name, _SMALL)
        if size > most:
            raise ArchiveError(
                "a member is too large",
                where=f"{where}: {name}",
                found=f"{size} bytes",
                expected=f"at most {most} bytes",
            )


def _check_manifest(members: dict[str, Member], where: str, newest: int) -> int:
    place = f"{where}: {MANIFEST}"
    try:
        manifest = parse_json(members[MANIFEST].content)
        name, version, listed = manifest["format"], manifest["version"], manifest["members"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArchiveError("the manifest cannot be read", where=place, found=repr(error)[:300]) from error
    if name != FORMAT or type(version) is not int or version < 1 or not isinstance(listed, dict):
        raise ArchiveError(
            "this is another format",
            where=place,
            expected=f"{FORMAT}, version {newest}",
            found=f"{str(name)[:50]}, version {str(version)[:50]}",
        )
    if version > newest:
        raise ArchiveError(
            "the archive is newer than this nemolet",
            where=place,
            found=f"version {version}",
            expected=f"version {newest} or older",
            fix="pip install --upgrade nemolet",
        )
    odd = sorted(set(listed) ^ (set(members) - {MANIFEST}))
    if odd:
        raise ArchiveError("the manifest lists other members", where=place, found=", ".join(odd)[:300])
    for name, entry in listed.items():
        if entry != members[name].entry:
            raise ArchiveError(
                "the content does not match its hash",
                where=f"{where}: {name}",
                expected=str(entry)[:300],
                found=members[name].entry,
                fix="copy it again",
            )
    return version


def read_config(content: bytes, where: str) -> dict[str, Any]:
    """Plain YAML: no tags, no aliases, no interpolation, no depth without end."""
    if len(content) > _LARGEST[CONFIG]:
        raise ArchiveError(
            "the config is too large",
            where=where,
            found=f"{len(content)} bytes",
            expected=f"at most {_LARGEST[CONFIG]} bytes",
        )
    try:
        text = content.decode()
        if "${" in text:
            raise ArchiveError("interpolation is refused", where=where, found=text[text.index("${") :][:80])
        _check_events(text, where)
        config = _Strict(text).get_single_data()
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ArchiveError(
            "the config cannot be read", where=where, expected="plain YAML", found=str(error)[:300]
        ) from error
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
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise ArchiveError(
                "aliases are refused", where=where, found=f"*{event.anchor}", fix="write every value out"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST_CONFIG or count > _LONGEST_CONFIG:
            raise ArchiveError(
                "the config is nested too deeply, or too long",
                where=where,
                expected=f"at most {_DEEPEST_CONFIG} levels and {_LONGEST_CONFIG} values",
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise ArchiveError("tags are refused", where=where, found=tag)


class _Strict(yaml.SafeLoader):
    """Reads text, numbers, true, false, null, lists and mappings, each as :class:`_Plain` writes it."""

    def mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        """Of text, each key once."""
        made: dict[str, Any] = {}
        for key, value in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str) or name in made:
                what = "a key is no text, or comes twice"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            made[name] = self.construct_object(value, deep=True)
        return made

    def number(self, node: yaml.ScalarNode) -> int | float:
        """A number in digits: no octals, no minutes, none that is not a number."""
        for kind, form in ((int, _WHOLE), (float, _FRACTION)):
            if form.fullmatch(node.value):
                return kind(node.value.replace(".inf", "inf"))
        raise yaml.constructor.ConstructorError(None, None, f"no plain number: {node.value[:80]}", node.start_mark)

    yaml_constructors = {
        None: yaml.SafeLoader.construct_undefined,  # nothing else is known, such as dates
        "tag:yaml.org,2002:str": yaml.SafeLoader.construct_yaml_str,
        "tag:yaml.org,2002:bool": yaml.SafeLoader.construct_yaml_bool,
        "tag:yaml.org,2002:null": yaml.SafeLoader.construct_yaml_null,
        "tag:yaml.org,2002:seq": yaml.SafeLoader.construct_yaml_seq,
        "tag:yaml.org,2002:map": mapping,
        "tag:yaml.org,2002:int": number,
        "tag:yaml.org,2002:float": number,
    }
