"""What ``adapter_config.json`` of PEFT may say: what is obeyed, what changes no output here, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemolet.errors import ConfigError
from nemolet.rules import Checked

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OFF: tuple[Any, ...] = (None, False, {}, [], "")  # what says nothing, also for keys of later versions
_MERGE = "merge it with PEFT (merge_and_unload, save_pretrained) and convert that whole model"


@dataclass(frozen=True)
class Kind:
    """One kind of adapter, and the keys of its config. A key that is not named may be null, false or empty.

    Args:
        name: its ``peft_type``.
        obeyed: what is read.
        silent: what changes no output here, whatever its value: who wrote it, how it was trained, or what the tensors
            say themselves.
        limited: the values of a key that change no output.
        advice: for a key with another value, what to do instead of merging.
    """

    name: str
    obeyed: frozenset[str]
    silent: frozenset[str]
    limited: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    advice: Mapping[str, str] = field(default_factory=dict)

    def check(self, config: Mapping[str, Any], where: str) -> None:
        """Refuse what would be read without being obeyed.

        Raises:
            ConfigError: naming every such key and its value.
        """
        found = config.get("peft_type")
        if found != self.name:
            raise ConfigError(
                "this is another kind of adapter",
                where=where,
                expected=f"peft_type {self.name}",
                found=found,
                fix=_MERGE,
            )
        odd = {key: value for key, value in config.items() if not self._says_nothing(key, value)}
        if odd:
            raise ConfigError(
                "this setting of the adapter is not supported",
                where=where,
                expected=", ".join(
                    f"{key}={' or '.join(map(json.dumps, self.limited.get(key, (None,))))}" for key in odd
                ),
                found=", ".join(f"{key}={json.dumps(value)[:80]}" for key, value in odd.items()),
                fix="; ".join(dict.fromkeys(self.advice.get(key, _MERGE) for key in odd)),
            )

    def _says_nothing(self, key: str, value: Any) -> bool:
        usual = self.limited.get(key, _OFF)
        return key in self.obeyed | self.silent or any(value == each and type(value) is type(each) for each in usual)


_ABOUT = frozenset(
    ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type")
)
# How the tensors began; the other beginnings (pissa, olora, corda, loftq, lora_ga) change the weights of the base too.
_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
LORA = Kind(
    "LORA",
    obeyed=frozenset(
        ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    ),
    silent=_ABOUT
    | {
        "corda_config",  # of beginnings
        "eva_config",
        "exclude_modules",  # the tensors name their layers
        "fan_in_fan_out",  # the halves lie alike, however the weight lies
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "target_modules",
    },
    limited={"bias": ("none",), "init_lora_weights": _BEGINNINGS},
    advice={
        "init_lora_weights": "its beginning changed the base as well: save it with PEFT's "
        "save_pretrained(folder, path_initial_model_for_weight_conversion=<the adapter before training>), or " + _MERGE,
        "alora_invocation_tokens": "it acts behind certain tokens only, so it cannot be merged either: "
        "train one without alora_invocation_tokens",
    },
)
PROMPT = Kind(
    "PROMPT_TUNING",
    obeyed=frozenset(("num_virtual_tokens", "token_dim")),
    silent=_ABOUT
    | {
        "num_attention_heads",
        "num_layers",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    },
    limited={"num_transformer_submodules": (None, 1)},
    advice={
        "num_transformer_submodules": "prompts of encoder-decoders are not supported",
        "modules_to_save": "train a prompt alone, without modules_to_save",
    },
)


@dataclass(frozen=True)
class LoraSettings(Checked):
    """What a config says of additions of low rank, with PEFT's own values where it says nothing.

    Args:
        rank: of all layers that no pattern names.
        alpha: likewise.
        ranks: by pattern of layer names, the whole name or its end.
        alphas: likewise.
        dropout: of what enters the additions, in training.
        rslora: whether the factor is alpha over the root of the rank (Kalajdzievski, 2023).
        dora: whether there are lengths of rows.

    Example:
        >>> settings = LoraSettings(rank=4, alpha=8, ranks={"q_proj": 16}, rslora=True)
        >>> settings.rank_of("layers.0.q_proj"), settings.scale_of("layers.0.q_proj"), settings.scale_of("up_proj")
        (16, 2.0, 4.0)
    """

    rank: int = 8
    alpha: float = 8
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    CONFIG_RULES = (
        ("rank >= 1", "the rank is at least 1"),
        ("dropout >= 0 and dropout < 1", "dropout is a probability below 1"),
    )

    def rank_of(self, layer: str) -> int:
        """The rank of one layer: that of the first pattern, else that of all."""
        return int(_first(self.ranks, layer, self.rank))

    def scale_of(self, layer: str) -> float:
        """The factor of one layer's addition."""
        rank = self.rank_of(layer)
        return float(_first(self.alphas, layer, self.alpha) / (rank**0.5 if self.rslora else rank))


def lora_settings(config: Mapping[str, Any], where: str) -> LoraSettings:
    """What a config of PEFT says, checked.

    Raises:
        ConfigError: for a key that would be read without being obeyed, or a value of a wrong type.
    """
    LORA.check(config, where)
    numbers = (int, float)
    return LoraSettings(
        rank=_read(config, "r", int, 8, where),
        alpha=_read(config, "lora_alpha", numbers, 8, where),
        ranks=_read_patterns(config, "rank_pattern", int, where),
        alphas=_read_patterns(config, "alpha_pattern", numbers, where),
        dropout=float(_read(config, "lora_dropout", numbers, 0.0, where)),
        rslora=_read(config, "use_rslora", bool, False, where),
        dora=_read(config, "use_dora", bool, False, where),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The config of the adapter in a folder.

    Raises:
        ConfigError: for a folder without an adapter, or a config that cannot be read.
    """
    lacking = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if lacking:
        raise ConfigError(
            "there is no adapter here", where=str(folder), expected=f"{CONFIG} and {WEIGHTS}", found=f"no {lacking[0]}"
        )
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError("the adapter cannot be read", where=str(folder / CONFIG), found=str(error)[:200]) from error
    if not isinstance(config, dict):
        raise ConfigError("this is no JSON object", where=str(folder / CONFIG), found=type(config).__name__)
    return config


def _first(patterns: Mapping[str, float], layer: str, otherwise: float) -> float:
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer)), otherwise)


def _read(config: Mapping[str, Any], key: str, kind: Any, usual: Any, where: str) -> Any:
    value = config.get(key, usual)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise ConfigError(
            "this value has another type", where=f"{where}: {key}", expected=kinds, found=repr(value)[:80]
        )
    return value


def _read_patterns(config: Mapping[str, Any], key: str, kind: Any, where: str) -> dict[str, Any]:
    patterns = _read(config, key, dict, {}, where) if config.get(key) is not None else {}
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError("this is no pattern", where=f"{where}: {key}", found=f"{pattern}: {error}") from error
    return {pattern: _read(patterns, pattern, kind, None, f"{where}: {key}") for pattern in patterns}
