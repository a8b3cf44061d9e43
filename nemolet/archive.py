"""``.nemolet`` files: a model, its tokenizer and its card in one tar that is never extracted.

An archive holds plain data only. Reading one builds typed modules from an allowlist and copies tensors into
them; it executes nothing that came with the file. What the writer would not have written is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
_MOST_UNSTORED = 1 << 26  # numbers of a table that the config makes, such as sinusoidal positions
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
    config = described(model, tokenizer)
    members = {}
    if tokenizer is not None:
        members = {f"tokenizer/{name}": content for name, content in tokenizer.files().items()}
    members[CONFIG] = write_config(config)
    members[CARD] = (card or "No card was written.\n").encode()
    members[WEIGHTS] = safetensors.torch.save(_tensors(model), metadata={"format": "pt"})
    write_container(path, members, VERSION)
    return path


def described(model: NeuralModule, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """The config that :func:`save` writes; asked for before a long training, it tells whether saving will succeed.

    Raises:
        ConfigError: for a module that :func:`load` would refuse, since its class is not registered or its config
            is too deep or looks like interpolation.
        DeclarationError: for a module built with arguments that are no plain data.
    """
    config: dict[str, Any] = {"model": model.config()}
    if tokenizer is not None:
        config["tokenizer"] = describe(tokenizer)
    _check_config(config)
    try:
        read_config(write_config(config), CONFIG)
    except ArchiveError as error:
        raise ConfigError(
            f"an archive cannot hold this model: {error.what}",
            where=model.label,
            expected=error.expected,
            found=error.found,
        ) from error
    return config


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

    def watch_buffer(module: torch.nn.Module, name: str, buffer: Tensor | None) -> None:
        # Positions are made from the config and not stored: they are larger than weights, but not by far.
        if buffer is not None and buffer.numel() > max(_MOST_UNSTORED, largest):
            raise ArchiveError(
                "the weights do not fit the model",
                where=where,
                found=f"{name} with {buffer.numel():,} numbers",
                expected=f"at most {max(_MOST_UNSTORED, largest):,} that are not stored",
            )

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

    hooks = torch.nn.modules.module
    handles = (
        hooks.register_module_parameter_registration_hook(watch),
        hooks.register_module_buffer_registration_hook(watch_buffer),
    )
    try:
        yield
    finally:
        for handle in handles:
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
