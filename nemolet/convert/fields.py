"""Two configs that say the same: keys of ``config.json`` beside arguments of our models.

A config is a list of parts. Each part reads some keys of theirs into arguments of ours, and writes them back.
Arguments and keys are dotted where they are nested: ``attention.head_size``.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemolet.config.schema import REQUIRED, Block, Either, Schema, schema_of
from nemolet.errors import ConversionError

Config = dict[str, Any]
ABSENT = object()  # no value: the key is not written, the argument keeps its default

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}


def get(config: Mapping[str, Any], path: str, default: Any = ABSENT) -> Any:
    """A value by its dotted path."""
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def put(config: Config, path: str, value: Any) -> None:
    """Set a value by its dotted path; an absent one is not set."""
    if value is ABSENT:
        return
    *parents, last = path.split(".")
    for key in parents:
        config = config.setdefault(key, {})
    config[last] = value


class Part(abc.ABC):
    """Some keys of theirs and some arguments of ours (abstract)."""

    @abc.abstractmethod
    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        """Set our arguments."""

    @abc.abstractmethod
    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        """Set their keys."""


def _keep(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Field(Part):
    """One key and one argument.

    Args:
        theirs: the key; several for the same value, of which the first that is there counts.
        ours: the argument.
        default: what a missing key means; without one it is an error.
        to_ours: what becomes of a value on the way in.
        to_theirs: and on the way out.
    """

    theirs: str | tuple[str, ...]
    ours: str
    default: Any = ABSENT
    to_ours: Callable[[Any], Any] = _keep
    to_theirs: Callable[[Any], Any] = _keep

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        keys = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        found = [value for value in (get(theirs, key) for key in keys) if value is not ABSENT]
        value = found[0] if found else self.default
        if value is ABSENT:
            raise ConversionError(
                "a key is missing", where="config.json", expected=" or ".join(keys), found=", ".join(theirs)[:300]
            )
        try:
            put(ours, self.ours, self.to_ours(value))
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise ConversionError(
                "this value has no counterpart", where=f"config.json: {keys[0]}", found=f"{value!r} ({error})"
            ) from error

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        value = get(ours, self.ours)
        for key in (self.theirs,) if isinstance(self.theirs, str) else self.theirs:
            put(theirs, key, ABSENT if value is ABSENT else self.to_theirs(value))


def activation(theirs: str, ours: str, default: Any = ABSENT) -> Field:
    """The name of an activation."""
    back = {name: key for key, name in reversed(ACTIVATIONS.items())}
    return Field(theirs, ours, default, ACTIVATIONS.__getitem__, back.__getitem__)


@dataclass(frozen=True)
class Fixed(Part):
    """Arguments that are the same for every model of an architecture."""

    values: Mapping[str, Any]

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        for path, value in self.values.items():
            put(ours, path, value)

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        """Nothing to write: that ours has these values is seen when the result is read back."""


@dataclass(frozen=True)
class Only(Part):
    """Keys of which only one value can be read; they change what a model computes.

    Args:
        values: key to value.
    """

    values: Mapping[str, Any]

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        for key, value in self.values.items():
            found = get(theirs, key, value)
            if found != value and not (found is None and value is False):
                raise ConversionError(
                    "this variant is not supported", where=f"config.json: {key}", expected=value, found=found
                )

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        for key, value in self.values.items():
            put(theirs, key, value)


@dataclass(frozen=True)
class Inside(Part):
    """The config of a part of ours, out of the same keys.

    Args:
        ours: the argument that the part is.
        target: its class.
        parts: its config.
    """

    ours: str
    target: str
    parts: tuple[Part, ...]

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        put(ours, self.ours, read_config(self.parts, theirs, self.target))

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        for part in self.parts:
            part.write(get(ours, self.ours), theirs)


_SCALINGS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_context",
    },
}


@dataclass(frozen=True)
class Rope(Part):
    """Rotary positions, in the form of transformers 5 (``rope_parameters``) or 4 (``rope_theta``, ``rope_scaling``).

    Args:
        ours: how our arguments begin, as ``"encoder."``.
        kinds: whether local layers have parameters of their own (Gemma 3, ModernBERT); the part stands after
            :class:`Window`.
        base: of the wavelengths where nothing is said.
        local_base: of those of local layers; likewise.
        old_base: the old key of the base.
        old_local_base: the old key of the local one.
    """

    ours: str = ""
    kinds: bool = False
    base: float = 10000.0
    local_base: float = 10000.0
    old_base: str = "rope_theta"
    old_local_base: str = "rope_local_base_freq"

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        parameters = theirs.get("rope_parameters") or {}
        old = {"rope_theta": theirs.get(self.old_base, self.base), **(theirs.get("rope_scaling") or {})}
        if self.kinds:
            near = parameters.get("sliding_attention") or {"rope_theta": theirs.get(self.old_local_base)}
            if get(ours, f"{self.ours}local") is not ABSENT:
                put(ours, f"{self.ours}local.rope_base", float(near.get("rope_theta") or self.local_base))
            if near.get("rope_type", "default") != "default":
                raise _unknown_scaling(near["rope_type"])
            parameters = parameters.get("full_attention") or {}
        parameters = {**old, **parameters}
        put(ours, f"{self.ours}rope_base", float(parameters["rope_theta"]))
        put(ours, f"{self.ours}attention.rotary", float(parameters.get("partial_rotary_factor", 1.0)))
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            if kind not in _SCALINGS:
                raise _unknown_scaling(kind)
            scaling = {own: parameters[key] for key, own in _SCALINGS[kind].items()}
            put(ours, f"{self.ours}rope_scaling", {"kind": kind, **scaling})

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        scaling = dict(get(ours, f"{self.ours}rope_scaling", None) or {})
        kind = scaling.pop("kind", "default")
        base = get(ours, f"{self.ours}rope_base", 10000.0)
        parameters = {"rope_type": kind, "rope_theta": base}
        parameters |= {key: scaling[own] for key, own in _SCALINGS.get(kind, {}).items()}
        rotary = get(ours, f"{self.ours}attention.rotary", 1.0)
        if rotary != 1.0:
            parameters["partial_rotary_factor"] = theirs["partial_rotary_factor"] = rotary
        theirs[self.old_base] = base
        if self.kinds:
            local = get(ours, f"{self.ours}local.rope_base", None) or self.local_base
            theirs[self.old_local_base] = local
            near = {"rope_type": "default", "rope_theta": local}
            theirs["rope_parameters"] = {"full_attention": parameters, "sliding_attention": near}
        else:
            theirs["rope_parameters"] = parameters
        if kind != "default":  # what transformers 4 reads
            theirs["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}


def _unknown_scaling(kind: object) -> ConversionError:
    return ConversionError(
        "this scaling of rotary positions is not supported",
        where="config.json: rope_parameters.rope_type",
        expected=", ".join(["default", *_SCALINGS]),
        found=kind,
    )


@dataclass(frozen=True)
class Window(Part):
    """Layers whose attention is bound by a window: ``sliding_window`` and ``layer_types``.

    Args:
        ours: how our arguments begin.
        usual: whether a layer is bound where nothing is said, from its number and their config; None binds all.
        switch: a key that must be true for any window (Qwen).
        size: the key of the window.
        to_ours: what becomes of its size on the way in.
        to_theirs: and on the way out.
        always: whether theirs needs a window even where no layer is bound by it.
    """

    ours: str = ""
    usual: Callable[[int, Mapping[str, Any]], bool] | None = None
    switch: str | None = None
    size: str = "sliding_window"
    to_ours: Callable[[int], int] = _keep
    to_theirs: Callable[[int], int] = _keep
    always: bool = False

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        size = theirs.get(self.size)
        if size is None or (self.switch is not None and not theirs.get(self.switch, False)):
            return
        bound = None
        if self.usual is not None:
            kinds = theirs.get("layer_types")
            bound = [
                kinds[i] == "sliding_attention" if kinds else self.usual(i, theirs)
                for i in range(int(theirs["num_hidden_layers"]))
            ]
            if not any(bound):
                return
        put(ours, f"{self.ours}window", self.to_ours(int(size)))
        if bound is not None:
            put(ours, f"{self.ours}local.layers", bound)

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        size, layers = get(ours, f"{self.ours}window", None), int(get(ours, f"{self.ours}layers"))
        unbound = theirs.get("max_position_embeddings") if self.always else None
        theirs[self.size] = unbound if size is None else self.to_theirs(size)
        if self.switch is not None:
            theirs[self.switch] = size is not None
        if self.usual is not None:
            local = get(ours, f"{self.ours}local", None) or {}
            bound = local.get("layers") or [size is not None] * layers
            theirs["layer_types"] = ["sliding_attention" if local else "full_attention" for local in bound]


# --------------------------------------------------------------------------------------------------
# Comparing two configs of ours
# --------------------------------------------------------------------------------------------------

# What changes training or memory, but not what a model computes.
WITHOUT_EFFECT = {
    "dropout",
    "balance_loss",
    "z_loss",
    "checkpointing",
    "pad_vocab_to",
    "pad_to_multiple_of",
    "init_std",
    "audio_augment",
    "augment",
}


def settled(config: Any, ignore: Collection[str] = WITHOUT_EFFECT) -> Any:
    """A config of ours with every default written out, so that two that mean the same are equal."""
    if isinstance(config, Mapping):
        if "_target_" not in config:
            return {key: settled(value, ignore) for key, value in config.items() if key not in ignore}
        home, _, name = str(config["_target_"]).rpartition(".")
        schema = schema_of(home, name)
        values = dict(config) if schema is None else _filled(schema, config)
        made = {key: settled(value, ignore) for key, value in values.items() if key not in ignore}
        _settle_sizes(made)
        return {"_target_": schema.name if schema else name, **made}
    return [settled(item, ignore) for item in config] if isinstance(config, (list, tuple)) else config


def _filled(schema: Schema, config: Mapping[str, Any]) -> Config:
    values = {}
    for name, (kind, default) in schema.parameters.items():
        value = config.get(name, default)
        if value is REQUIRED:  # not there, although it has to be: what builds from it will say so
            continue
        options = kind.options if isinstance(kind, Either) else (kind,)
        inner = next((option.schema for option in options if isinstance(option, Block)), None)
        if inner is not None and (value is None or isinstance(value, Mapping)):
            known = value or {}
            filled = {key: known.get(key, usual) for key, (_, usual) in inner.parameters.items()}
            complete = all(isinstance(v, (bool, int, float, str, list, tuple, type(None))) for v in filled.values())
            value = filled if complete else value
        values[name] = value
    return values


def _settle_sizes(values: Config) -> None:
    """Sizes that follow from others where they are not given."""
    width, heads = values.get("width"), values.get("heads")
    if width is None or heads is None:
        return
    values["kv_heads"] = values.get("kv_heads") or heads
    if isinstance(values.get("attention"), dict):
        values["attention"]["head_size"] = values["attention"].get("head_size") or width // heads
        for name in ("bias", "out_bias"):
            own = values["attention"].get(name)
            values["attention"][name] = values.get("bias", False) if own is None else own
    if "local" in values and values["local"] is None and values.get("window") is not None:
        values["local"] = {"layers": [True] * values["layers"], "rope_base": None}
    for name in ("ffn", "ffn_width"):
        if name in values and values[name] is None:
            values[name] = -(-width * 8 // 3 // 32) * 32 if values.get("gated") else 4 * width


def first_difference(one: Any, other: Any, where: str = "") -> str | None:
    """Where two settled configs differ, for people.

    Example:
        >>> first_difference({"a": {"b": 1}}, {"a": {"b": 2}})
        'a.b: 1 and 2'
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}):
            found = first_difference(one.get(key), other.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return None
    return None if one == other else f"{where}: {one} and {other}"


def read_config(parts: Sequence[Part], theirs: Mapping[str, Any], target: str) -> Config:
    """Our config of their model."""
    ours: Config = {"_target_": target}
    for part in parts:
        part.read(theirs, ours)
    return ours


def write_config(parts: Sequence[Part], ours: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> Config:
    """Their config of our model; what is ``known`` of theirs beside it stays."""
    complete, theirs = settled(ours, ignore=()), copy.deepcopy(dict(known or {}))
    for part in parts:
        part.write(complete, theirs)
    return theirs
