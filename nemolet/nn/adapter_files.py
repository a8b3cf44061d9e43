"""Additions to linear layers in files, in the format of PEFT: a JSON file with settings, a safetensors file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nemolet.errors import ConfigError
from nemolet.nn.adapter_settings import CONFIG, WEIGHTS, LoraSettings, lora_settings, read_config
from nemolet.nn.adapters import AdaptedLinear, adapted_layers, put_layer
from nemolet.nn.linear import Linear

ADDED = ("down", "up", "lengths")
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?$")


@dataclass(frozen=True)
class Addition:
    """What is added to one layer."""

    down: Tensor
    up: Tensor
    scale: float
    lengths: Tensor | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class StoredAdapter:
    """What a folder holds.

    Args:
        additions: by the names that their layers have there.
        base: what the model is called that they were trained on; empty where it is not said.
        fingerprint: of that model, where it is known.
    """

    additions: dict[str, Addition]
    base: str
    fingerprint: str | None


def additions_of(model: nn.Module) -> dict[str, Addition]:
    """The additions of an adapted model, by the names of its layers."""
    return {
        name: Addition(
            layer.down.detach(),
            layer.up.detach(),
            layer.scale,
            None if layer.lengths is None else layer.lengths.detach(),
            layer.dropout,
        )
        for name, layer in adapted_layers(model)
    }


def save_adapter(model: nn.Module, folder: str | Path, *, base: str = "") -> Path:
    """Write the additions of a model, named after its own layers.

    Args:
        model: adapted by :func:`nemolet.nn.adapt`, not merged.
        folder: receives the two files.
        base: of what the additions are, for people.

    Raises:
        ConfigError: for a model without additions.
    """
    # One entry only: safetensors writes several in any order, and equal input should give equal bytes.
    return write_additions(additions_of(model), folder, base=base, metadata={"base": fingerprint(model)})


def write_additions(
    additions: Mapping[str, Addition],
    folder: str | Path,
    *,
    base: str = "",
    metadata: Mapping[str, str] | None = None,
    transposed: bool = False,
) -> Path:
    """Write additions under the names they have here.

    Args:
        additions: by layer.
        folder: receives the two files.
        base: of what they are, for people and for PEFT.
        metadata: of the file of tensors.
        transposed: whether the weights of the layers lie the other way round, as in GPT-2.

    Raises:
        ConfigError: where there are none.
    """
    folder = Path(folder)
    if not additions:
        raise ConfigError("there is no addition to save", where=str(folder), expected="an adapted model")
    first = next(iter(additions.values()))
    tensors: dict[str, Tensor] = {}
    for name, addition in additions.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = addition.down.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = addition.up.cpu().contiguous()
        if addition.lengths is not None:
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = addition.lengths.cpu().contiguous()
    rank, alpha = first.down.shape[0], first.scale * first.down.shape[0]
    ranks = {name: each.down.shape[0] for name, each in additions.items()}
    alphas = {name: each.scale * ranks[name] for name, each in additions.items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "lora_dropout": first.dropout,
        "target_modules": sorted(additions),
        "use_dora": first.lengths is not None,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "task_type": None,
    }
    return write_files(folder, config, tensors, metadata or {"format": "pt"})


def write_files(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Path:
    """Write the two files of an adapter; each appears under its name only when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        WEIGHTS: safetensors.torch.save(dict(tensors), metadata=dict(metadata)),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }
    for name, content in files.items():
        partial = folder / f".{name}.partial"
        partial.write_bytes(content)
        partial.replace(folder / name)
    return folder


def read_adapter(folder: str | Path) -> StoredAdapter:
    """The additions in a folder, and what they belong to.

    Raises:
        ConfigError: for a folder without an adapter, one that cannot be read, or one that says what is not obeyed.
    """
    folder = Path(folder)
    config = read_config(folder)
    settings = lora_settings(config, str(folder / CONFIG))
    try:
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError("the adapter cannot be read", where=str(folder / WEIGHTS), found=str(error)[:200]) from error
    base = str(config.get("base_model_name_or_path") or "")
    return StoredAdapter(_grouped(tensors, settings, str(folder / WEIGHTS)), base, metadata.get("base"))


def _grouped(tensors: Mapping[str, Tensor], settings: LoraSettings, where: str) -> dict[str, Addition]:
    """The tensors of each layer, which have to be as the settings say.

    Raises:
        ConfigError: naming all that are not.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            strangers.append(key)
        else:
            parts.setdefault(match[1], {})[match[2]] = tensor
    if strangers:
        raise ConfigError(
            "these tensors are no parts of additions to linear layers",
            where=where,
            expected="lora_A, lora_B and lora_magnitude_vector",
            found=", ".join(strangers[:8]),
            fix="save the adapter with save_embedding_layers=False, or merge it with PEFT and convert the whole model",
        )
    problems = {name: _problem(part, settings, settings.rank_of(name)) for name, part in parts.items()}
    wrong = [f"{name}: {problem}" for name, problem in problems.items() if problem]
    if wrong:
        raise ConfigError(f"the tensors are not those that {CONFIG} speaks of", where=where, found="\n".join(wrong[:8]))
    return {
        name: Addition(
            part["lora_A"], part["lora_B"], settings.scale_of(name), part.get("lora_magnitude_vector"), settings.dropout
        )
        for name, part in parts.items()
    }


def _problem(part: Mapping[str, Tensor], settings: LoraSettings, rank: int) -> str:
    """What is wrong with the tensors of one layer; nothing where they are as the settings say."""
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if settings.dora else set())
    if part.keys() != wanted:
        return f"has {', '.join(sorted(part))}, the settings ask for {', '.join(sorted(wanted))}"
    down, up = part["lora_A"], part["lora_B"]
    if down.ndim != 2 or up.ndim != 2:
        return "is no addition to a matrix"
    if {down.shape[0], up.shape[1]} != {rank}:
        return f"has shapes {tuple(up.shape)} and {tuple(down.shape)}, the settings say rank {rank}"
    lengths = part.get("lora_magnitude_vector")
    return "" if lengths is None or lengths.numel() == up.shape[0] else f"has lengths of {lengths.numel()} rows"


def load_adapter(model: nn.Module, folder: str | Path) -> list[str]:
    """Give a model the additions that :func:`save_adapter` wrote; returns the names of the layers.

    Raises:
        ConfigError: for an adapter of another base model, naming what does not fit.
    """
    stored, own = read_adapter(folder), fingerprint(model)
    put_additions(model, stored.additions, where=str(folder))
    if stored.fingerprint not in (None, own):
        for name, layer in list(adapted_layers(model)):
            put_layer(model, name, layer.plain())
        raise ConfigError(
            "this adapter belongs to another base model",
            where=str(folder),
            expected=f"a model with fingerprint {stored.fingerprint}",
            found=f"{own}: the same layers with other weights",
            fix=f"load the model that the adapter was trained on ({stored.base or 'which it does not name'})",
        )
    return list(stored.additions)


@torch.no_grad()
def put_additions(model: nn.Module, additions: Mapping[str, Addition], *, where: str = "adapter") -> None:
    """Give the layers of a model additions by name; the model is frozen.

    Raises:
        ConfigError: for layers that the model lacks or that have other sizes, all named at once.
    """
    layers = {name: module for name, module in model.named_modules() if type(module) is Linear}
    wrong = []
    for name, addition in additions.items():
        if name not in layers:
            wrong.append(f"{name}: no such linear layer")
        elif tuple(layers[name].weight.shape) != (addition.up.shape[0], addition.down.shape[1]):
            found = (addition.up.shape[0], addition.down.shape[1])
            wrong.append(f"{name}: {found} beside a weight of {tuple(layers[name].weight.shape)}")
    if wrong:
        raise ConfigError(
            "this adapter belongs to another base model",
            where=where,
            expected="additions to layers of this model",
            found="\n".join(wrong[:10]),
        )
    model.requires_grad_(False)
    for name, addition in additions.items():
        dora = addition.lengths is not None
        rank, scale, dropout = addition.down.shape[0], addition.scale, addition.dropout
        layer = AdaptedLinear(layers[name], rank=rank, scale=scale, dropout=dropout, dora=dora)
        layer.down.copy_(addition.down)
        layer.up.copy_(addition.up)
        if layer.lengths is not None and addition.lengths is not None:
            layer.lengths.copy_(addition.lengths.flatten())
        put_layer(model, name, layer)


def fingerprint(model: nn.Module) -> str:
    """Sixteen digits that tell base models apart: names, shapes and the first numbers of the weights."""
    digest = hashlib.sha256()
    for name, (tensor, known_by) in sorted(_base_tensors(model).items()):
        first = tensor.detach().flatten()[:64] if known_by is None else known_by
        head = first.float().cpu().contiguous().numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + head)
    return digest.hexdigest()[:16]


def _base_tensors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Tensors of the model without additions; beside a quantized one the first numbers of what it was."""
    layers = dict(adapted_layers(model))
    added = {f"{name}.{key}" for name in layers for key in ADDED}
    known = {f"{name}.weight": layer.known_by for name, layer in layers.items()}
    return {name: (tensor, known.get(name)) for name, tensor in model.named_parameters() if name not in added}
