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
from nemolet.nn.adapters import AdaptedLinear, adapted_layers, put_layer
from nemolet.nn.linear import Linear

ADDED = ("down", "up", "lengths")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?$")
_UNKNOWN = (
    "use_qalora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
)


@dataclass(frozen=True)
class Addition:
    """What is added to one layer."""

    down: Tensor
    up: Tensor
    scale: float
    lengths: Tensor | None = None


def additions_of(model: nn.Module) -> dict[str, Addition]:
    """The additions of an adapted model, by the names of its layers."""
    return {
        name: Addition(
            layer.down.detach(),
            layer.up.detach(),
            layer.scale,
            None if layer.lengths is None else layer.lengths.detach(),
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
    additions: Mapping[str, Addition], folder: str | Path, *, base: str = "", metadata: Mapping[str, str] | None = None
) -> Path:
    """Write additions under the names they have here."""
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
        "lora_dropout": 0.0,
        "target_modules": sorted(additions),
        "use_dora": first.lengths is not None,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
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


def read_additions(folder: str | Path) -> tuple[dict[str, Addition], dict[str, str]]:
    """The additions in a folder by the names they have there, and what the file says of itself.

    Raises:
        ConfigError: for a folder without an adapter, one that cannot be read, or of an unknown kind.
    """
    folder = Path(folder)
    lacking = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if lacking:
        raise ConfigError(
            "there is no adapter here", where=str(folder), expected=f"{CONFIG} and {WEIGHTS}", found=f"no {lacking[0]}"
        )
    try:
        config = json.loads((folder / CONFIG).read_text())
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (ValueError, OSError, safetensors.SafetensorError) as error:
        raise ConfigError("the adapter cannot be read", where=str(folder), found=str(error)[:200]) from error
    odd = [f"{key}={config[key]}" for key in _UNKNOWN if config.get(key)]
    odd += [f"bias={config['bias']}"] if config.get("bias", "none") != "none" else []
    if config.get("peft_type") != "LORA" or odd:
        raise ConfigError(
            "this kind of adapter is not known",
            where=str(folder / CONFIG),
            expected="LoRA or DoRA",
            found=", ".join(odd) or f"peft_type={config.get('peft_type')}",
        )
    return _grouped(tensors, config, str(folder / WEIGHTS)), metadata


def _grouped(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, Addition]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise ConfigError("this tensor is no part of an addition", where=where, found=key)
        parts.setdefault(match[1], {})[match[2]] = tensor
    lacking = [name for name, part in parts.items() if not {"lora_A", "lora_B"} <= set(part)]
    if lacking:
        raise ConfigError("additions lack a half", where=where, found=", ".join(lacking[:8]))
    made = {}
    for name, part in parts.items():
        rank = part["lora_A"].shape[0]
        scale = _alpha(config, name) / (rank**0.5 if config.get("use_rslora") else rank)
        made[name] = Addition(part["lora_A"], part["lora_B"], scale, part.get("lora_magnitude_vector"))
    return made


def _alpha(config: Mapping[str, Any], layer: str) -> float:
    """Of one layer: the first pattern that is its name or the end of it, else that of all."""
    patterns = config.get("alpha_pattern") or {}
    own = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer))
    return float(next(own, config["lora_alpha"]))


def load_adapter(model: nn.Module, folder: str | Path) -> list[str]:
    """Give a model the additions that :func:`save_adapter` wrote; returns the names of the layers.

    Raises:
        ConfigError: for an adapter of another base model, naming what does not fit.
    """
    additions, metadata = read_additions(folder)
    own = fingerprint(model)
    put_additions(model, additions, where=str(folder))
    if metadata.get("base", own) != own:
        for name, layer in list(adapted_layers(model)):
            put_layer(model, name, layer.plain())
        raise ConfigError(
            "this adapter belongs to another base model",
            where=str(folder),
            expected=f"a model with fingerprint {metadata['base']}",
            found=own,
            fix="load the archive that the adapter was trained on",
        )
    return list(additions)


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
        layer = AdaptedLinear(layers[name], rank=addition.down.shape[0], scale=addition.scale, dora=dora)
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
