"""``.nemolet`` files: a model, its tokenizer and its card in one tar that is never extracted.

An archive holds plain data only. Reading one builds typed modules from an allowlist and copies tensors into
them; it executes nothing that came with the file. What the writer would not have written is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemolet.config import build, check_tree, refuse, resolve
from nemolet.container import (
    CARD,
    CONFIG,
    LONGEST_HEADER,
    WEIGHTS,
    Member,
    read_config,
    read_container,
    write_config,
    write_container,
)
from nemolet.errors import ArchiveError, ConfigError, ConversionError
from nemolet.module import NeuralModule, first_names
from nemolet.tensor_files import Spec, TensorFile, header_bytes
from nemolet.tokenizers import Tokenizer, describe, rebuild
from nemolet.untrusted import built, fits

VERSION = 1
NAME = "model.nemolet"  # of the archive in a run's folder

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
        extra: small files of another format that the model came from, by name.
    """

    model: NeuralModule
    tokenizer: Tokenizer | None
    card: str
    config: dict[str, Any]
    extra: Mapping[str, bytes] = field(default_factory=dict)


def save(
    path: str | Path,
    *,
    model: NeuralModule,
    tokenizer: Tokenizer | None = None,
    card: str = "",
    extra: Mapping[str, bytes] | None = None,
    weights: Callable[[str], Tensor] | None = None,
) -> Path:
    """Write a model to a ``.nemolet`` file; equal input gives equal bytes.

    The file appears under its name only when it is complete.

    Args:
        path: of the file.
        model: what is saved.
        tokenizer: its tokenizer.
        card: a text for people.
        extra: small files of another format that the model came from, carried along unread.
        weights: from where each tensor is read, by its name, one after the other; None for those of the model. So
            a model may be saved of which this process holds only a part, or shapes alone.

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
    config = model.config()
    named = first_names(model) if weights is None else _shapes(config, model)
    specs = _specs(named)
    return save_tensors(
        path,
        config=config,
        specs=specs,
        tensors=_read_each(specs, weights or named.__getitem__),
        tokenizer=tokenizer,
        card=card,
        extra=extra,
    )


def save_tensors(
    path: str | Path,
    *,
    config: dict[str, Any],
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Tokenizer | None = None,
    card: str = "",
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """The same from a config, and tensors that come one at a time, in the order in which they were announced."""
    path = Path(path)
    members = {f"extra/{name}": content for name, content in (extra or {}).items()}
    if tokenizer is not None:
        members |= {f"tokenizer/{name}": content for name, content in tokenizer.files().items()}
    members[CONFIG] = write_config(_whole(config, tokenizer))
    members[CARD] = (card or "No card was written.\n").encode()
    write_container(path, members, specs, tensors, VERSION)
    return path


def _read_each(specs: Mapping[str, Spec], weights: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, spec in specs.items():
        tensor = weights(name).to("cpu", spec.dtype).contiguous()
        if tuple(tensor.shape) != spec.shape:
            raise ArchiveError(
                "the weights do not fit the model", where=name, expected=spec.shape, found=tuple(tensor.shape)
            )
        yield name, tensor


def described(model: NeuralModule, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """The config that :func:`save` writes; asked for before a long training, it tells whether saving will succeed.

    Raises:
        ArchiveError: for a module that :func:`load` would refuse, since its class makes far more tensors than it keeps.
        ConfigError: for a module that :func:`load` would refuse, since its class is not registered or its config
            is too deep or looks like interpolation.
        DeclarationError: for a module built with arguments that are no plain data.
    """
    config = _whole(model.config(), tokenizer)
    specs = _specs(_shapes(config["model"], model))
    header_bytes(specs)
    fits(config["model"], specs, type(model).__name__)
    return config


def _specs(named: Mapping[str, Tensor]) -> dict[str, Spec]:
    return {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()}


def _whole(model: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    config = {"model": model}
    if tokenizer is not None:
        config["tokenizer"] = describe(tokenizer)
    _check_config(config)
    try:
        if read_config(write_config(config), CONFIG) != config:
            raise ArchiveError("its config is read back as another one", where=CONFIG)
    except ArchiveError as error:
        raise ConfigError(
            f"an archive cannot hold this model: {error.what}",
            where=str(model.get("_target_")),
            expected=error.expected,
            found=error.found,
        ) from error
    return config


def _shapes(config: dict[str, Any], model: NeuralModule) -> dict[str, Tensor]:
    """The tensors of a model as it is built, whatever was done to this one since: shapes alone, where it can."""
    try:
        with torch.device("meta"):
            return first_names(build(config, where="model"))
    except ConfigError as error:  # a class of the user's may look at values
        if not isinstance(error.__cause__, (NotImplementedError, RuntimeError)):
            raise
        return first_names(model)


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    later: Callable[[Tensor, Callable[[], Tensor]], None] | None = None,
) -> Archive:
    """Read a ``.nemolet`` file, or a folder of a Hugging Face model (also ``hf://owner/name``).

    Args:
        path: of the file or folder; of a run's folder, the archive that the run left there.
        device: where the model goes.
        dtype: of its floating-point weights; None leaves each as it was saved.
        later: is given each weight and what reads its value, instead of reading it now. Inside a block of
            :class:`nemolet.parallel.Deferred`, ``deferred.fill_later``: so a mesh reads on each rank what it keeps.

    Raises:
        ArchiveError: for anything that :func:`save` would not have written; nothing of it was executed.
        ConversionError: for a folder that is no model, or not one that is known.
        ConfigError: for a device that this machine does not have.
    """
    if _is_folder(path) and (Path(path) / NAME).is_file():
        path = Path(path) / NAME
    if str(path).startswith("hf://") or _is_folder(path):
        from nemolet.convert.reading import read

        if later is not None:
            raise ConversionError(
                "weights of another format are not read later",
                where=str(path),
                expected="a .nemolet file",
                fix=f"nemolet convert {path} model.nemolet",
            )
        return read(path, device=device, dtype=dtype)
    members, config = _read(Path(path))
    where = str(path)
    file = _weights(members, where)
    tokenizer = _rebuilt_tokenizer(config, members, where)
    if later is None:
        fits(config["model"], file.specs, where)
    model = built(config["model"], file.specs, where)
    _fill(model, file, dtype, later or _fill_now, where)
    model.comes_from(members[WEIGHTS].sha256)
    if later is None:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            found = f"{device}: {str(error).splitlines()[0][:200]}"
            raise ConfigError(
                "this device cannot be used", where="device", found=found, expected="cpu, or one of this machine"
            ) from error
    card = members[CARD].content.decode("utf-8", "replace")
    return Archive(model.eval(), tokenizer, card, config, _extra(members))


def _fill_now(place: Tensor, read: Callable[[], Tensor]) -> None:
    place.copy_(read())


def _fill(
    model: NeuralModule,
    file: TensorFile,
    dtype: torch.dtype | None,
    fill: Callable[[Tensor, Callable[[], Tensor]], None],
    where: str,
) -> None:
    """Give each tensor of a model the type of the stored one, or another, and its values."""
    state = model.state_dict(keep_vars=True)
    for name, spec in file.specs.items():
        wanted = dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype
        place = torch.empty(spec.shape, dtype=wanted, device=state[name].device)
        state[name].data = place  # of the same parameter, which may be tied
        fill(place, functools.partial(_stored, file, name, where))


def _stored(file: TensorFile, name: str, where: str) -> Tensor:
    try:
        return file.get(name)
    except ConversionError as error:
        found = f"{error.what}: {error.found}"
        raise ArchiveError("the file changed while it was read", where=f"{where}: {name}", found=found) from error


def _is_folder(path: str | Path) -> bool:
    try:
        return Path(path).is_dir()
    except OSError:  # a name that no file can have
        return False


@dataclass(frozen=True)
class Contents:
    """An archive that was checked, but not built.

    Attributes:
        config: of the model.
        weights: its tensors, not read yet.
        tokenizer: its tokenizer, or None.
        card: a text for people.
        extra: small files of another format.
    """

    config: dict[str, Any]
    weights: TensorFile
    tokenizer: Tokenizer | None
    card: str
    extra: Mapping[str, bytes]


def contents(path: str | Path) -> Contents:
    """Check an archive without making its weights; they are read later, one at a time.

    Raises:
        ArchiveError: for anything that :func:`save` would not have written.
    """
    members, config = _read(Path(path))
    tokenizer = _rebuilt_tokenizer(config, members, str(path))
    weights = _weights(members, str(path))
    fits(config["model"], weights.specs, str(path))
    card = members[CARD].content.decode("utf-8", "replace")
    return Contents(config["model"], weights, tokenizer, card, _extra(members))


def _extra(members: Mapping[str, Member]) -> dict[str, bytes]:
    return {n.removeprefix("extra/"): m.content for n, m in members.items() if n.startswith("extra/")}


def _weights(members: Mapping[str, Member], where: str) -> TensorFile:
    member = members[WEIGHTS]
    try:
        return TensorFile(member.file, start=member.start, size=member.size, longest_header=LONGEST_HEADER)
    except ConversionError as error:
        found = str(error)[:300]
        raise ArchiveError("the weights cannot be read", where=f"{where}: {WEIGHTS}", found=found) from error


def _rebuilt_tokenizer(config: dict[str, Any], members: Mapping[str, Member], where: str) -> Tokenizer | None:
    prefix = "tokenizer/"
    files = {n.removeprefix(prefix): m.content for n, m in members.items() if n.startswith(prefix)}
    if "tokenizer" not in config:
        if files:
            raise ArchiveError(
                "there are files of a tokenizer, but the config has none", where=where, found=", ".join(files)
            )
        return None
    try:
        tokenizer = rebuild(config["tokenizer"], files)
    except Exception as error:  # hostile files meet other libraries; whatever those raise is a refusal
        found = f"{type(error).__name__}: {str(error)[:1000]}"
        raise ArchiveError("the tokenizer cannot be rebuilt", where=where, found=found) from error
    if describe(tokenizer) != config["tokenizer"] or tokenizer.files().keys() != files.keys():
        raise ArchiveError(
            "the tokenizer has parts that it does not know",
            where=where,
            expected=str(describe(tokenizer))[:300],
            found=f"{str(config['tokenizer'])[:300]}; files {', '.join(files) or 'none'}",
        )
    return tokenizer


def _read(path: Path) -> tuple[dict[str, Member], dict[str, Any]]:
    """All members and the config, checked."""
    members, version = read_container(path, VERSION)
    config = read_config(members[CONFIG].content, f"{path}: {CONFIG}")
    for old in range(version, VERSION):
        config = MIGRATIONS[old](config)
    try:
        _check_config(config)
    except ConfigError as error:
        raise ArchiveError("the config is refused", where=f"{path}: {CONFIG}", found=str(error)) from error
    return members, config


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
