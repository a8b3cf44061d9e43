"""``.nemolet`` files: a model, its tokenizer and its card in one tar that is never extracted.

An archive holds plain data only. Reading one builds typed modules from an allowlist and copies tensors into
them; it executes nothing that came with the file. What the writer would not have written is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from nemolet.config import build, check_tree, refuse, resolve
from nemolet.container import (
    CARD,
    CONFIG,
    WEIGHTS,
    read_config,
    read_container,
    write_config,
    write_container,
)
from nemolet.errors import ArchiveError, ConfigError, NemoletError
from nemolet.module import NeuralModule
from nemolet.tokenizers import Tokenizer, describe, rebuild

VERSION = 1
# One function per old version, from its config to that of the next version. Never remove one.
_KIND = {  # names of element types in safetensors
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_RANK = [*_KIND.values()]
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


def save(
    path: str | Path,
    *,
    model: NeuralModule,
    tokenizer: Tokenizer | None = None,
    card: str = "",
    weights: Callable[[str], Tensor] | None = None,
) -> Path:
    """Write a model to a ``.nemolet`` file; equal input gives equal bytes.

    The file appears under its name only when it is complete.

    Args:
        path: of the file.
        model: what is saved.
        tokenizer: of the model.
        card: a text for people.
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
    path = Path(path)
    config = described(model, tokenizer)
    members: dict[str, bytes | Path] = {}
    if tokenizer is not None:
        members = {f"tokenizer/{name}": content for name, content in tokenizer.files().items()}
    members[CONFIG] = write_config(config)
    members[CARD] = (card or "No card was written.\n").encode()
    if weights is None:
        members[WEIGHTS] = safetensors.torch.save(_tensors(model), metadata={"format": "pt"})
        write_container(path, members, VERSION)
        return path
    apart = path.with_name(f".{path.name}.weights{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with apart.open("wb") as file:
            _stream(file, _shapes(config["model"], model), weights)
        write_container(path, {**members, WEIGHTS: apart}, VERSION)
    except OSError as error:
        raise ArchiveError("the archive cannot be written", where=str(path), found=error.strerror) from error
    finally:
        apart.unlink(missing_ok=True)
    return path


def _stream(file: BinaryIO, shapes: dict[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write safetensors one after the other, in the order and the bytes of their library."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    ordered = sorted(shapes, key=lambda name: (-_RANK.index(_KIND[shapes[name].dtype]), name))
    for name in ordered:
        begin, end = end, end + shapes[name].numel() * shapes[name].element_size()
        kind, shape = _KIND[shapes[name].dtype], list(shapes[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in ordered:
        tensor = read(name).to("cpu", shapes[name].dtype).contiguous()
        if tensor.shape != shapes[name].shape:
            found = f"{tuple(tensor.shape)} for {tuple(shapes[name].shape)}"
            raise ArchiveError("the weights do not fit the model", where=name, found=found)
        file.write(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")


def described(model: NeuralModule, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """The config that :func:`save` writes; asked for before a long training, it tells whether saving will succeed.

    Raises:
        ConfigError: for a module that :func:`load` would refuse, since its class is not registered.
        DeclarationError: for a module built with arguments that are no plain data.
    """
    config: dict[str, Any] = {"model": model.config()}
    if tokenizer is not None:
        config["tokenizer"] = describe(tokenizer)
    _check_config(config)
    return config


def _shapes(config: dict[str, Any], model: NeuralModule) -> dict[str, Tensor]:
    """The tensors of a model as it is built, whatever was done to this one since: shapes alone, where it can."""
    try:
        with torch.device("meta"):
            return _named(build(config, where="model"))
    except ConfigError as error:  # a class of the user's may look at values
        if not isinstance(error.__cause__, (NotImplementedError, RuntimeError)):
            raise
        return _named(model)


def _named(model: NeuralModule) -> dict[str, Tensor]:
    """Every tensor once: a tied weight is stored under its first name."""
    known: dict[int, str] = {}
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in known:
            known[id(tensor)] = name
            tensors[name] = tensor.detach()
    return tensors


def _tensors(model: NeuralModule) -> dict[str, Tensor]:
    return {
        name: tensor.to("cpu").contiguous() if tensor.device.type != "meta" else tensor
        for name, tensor in _named(model).items()
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


def _read(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All members and the config, checked."""
    members, version = read_container(path, VERSION)
    config = read_config(members[CONFIG], f"{path}: {CONFIG}")
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
