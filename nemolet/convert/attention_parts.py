"""Parts of a config about attention: rotary positions, and windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemolet.convert.fields import ABSENT, Config, Part, get, put
from nemolet.errors import ConversionError

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
        partial: whether a part of a head may be rotated (Phi-3); others rotate all of it, whatever they are told.
        scalings: which of them theirs knows.
        old_base: the old key of the base of the wavelengths.
        old_local_base: the old key of the local one.
        old_everywhere: whether an old scaling is also that of local layers (ModernBERT).
    """

    ours: str = ""
    kinds: bool = False
    partial: bool = False
    scalings: tuple[str, ...] = tuple(_SCALINGS)
    old_base: str = "rope_theta"
    old_local_base: str = "rope_local_base_freq"
    old_everywhere: bool = False

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        given, old = theirs.get("rope_parameters") or {}, theirs.get("rope_scaling") or {}
        if self.kinds:
            near = {**(given.get("sliding_attention") or {}), **(old if self.old_everywhere else {})}
            if _kind(near) != "default":
                raise self._unknown(_kind(near), "of local layers")
            if get(ours, f"{self.ours}local") is not ABSENT:
                put(ours, f"{self.ours}local.rope_base", _base(near, theirs, self.old_local_base))
            full = {**(given.get("full_attention") or {}), **old}
        else:
            full = dict(old or given)
        put(ours, f"{self.ours}rope_base", _base(full, theirs, self.old_base))
        self._read_scaling(full, theirs, ours)
        part = float(full.get("partial_rotary_factor", theirs.get("partial_rotary_factor") or 1.0))
        if self.partial:
            put(ours, f"{self.ours}attention.rotary", part)
        elif part != 1.0 and _kind(full) != "default":
            raise self._unknown(f"{_kind(full)} with a partial_rotary_factor of {part}")

    def _read_scaling(self, full: Mapping[str, Any], theirs: Mapping[str, Any], ours: Config) -> None:
        kind = _kind(full)
        if kind == "default":
            return
        if kind not in self.scalings:
            raise self._unknown(kind)
        said = {"original_max_position_embeddings": theirs.get("max_position_embeddings"), **full}
        scaling = {own: said[key] for key, own in _SCALINGS[kind].items()}
        put(ours, f"{self.ours}rope_scaling", {"kind": kind, **scaling})

    def write(self, ours: Mapping[str, Any], theirs: Config) -> None:
        scaling = dict(get(ours, f"{self.ours}rope_scaling", None) or {})
        kind = scaling.pop("kind", "default")
        base = get(ours, f"{self.ours}rope_base", 10000.0)
        parameters = {"rope_type": kind, "rope_theta": base}
        parameters |= {key: scaling[own] for key, own in _SCALINGS.get(kind, {}).items()}
        if self.partial:
            rotary = get(ours, f"{self.ours}attention.rotary", 1.0)
            parameters["partial_rotary_factor"] = theirs["partial_rotary_factor"] = rotary
        theirs[self.old_base] = base
        theirs["rope_parameters"] = parameters
        if self.kinds:
            local = get(ours, f"{self.ours}local.rope_base", None) or base
            theirs[self.old_local_base] = local
            near = {"rope_type": "default", "rope_theta": local}
            theirs["rope_parameters"] = {"full_attention": parameters, "sliding_attention": near}
        theirs.pop("rope_scaling", None)
        if kind != "default" and not self.old_everywhere:  # what transformers 4 reads
            theirs["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}

    def _unknown(self, kind: object, where: str = "") -> ConversionError:
        return ConversionError(
            f"this scaling of rotary positions {where} is not supported".replace("  ", " "),
            where="config.json: rope_parameters.rope_type",
            expected="default" if where else ", ".join(["default", *self.scalings]),
            found=kind,
        )


def _kind(parameters: Mapping[str, Any]) -> str:
    return str(parameters.get("rope_type", parameters.get("type", "default")))


def _base(parameters: Mapping[str, Any], theirs: Mapping[str, Any], old: str) -> float:
    """The base of a kind of layers: with its parameters, or under the old key."""
    return float(parameters["rope_theta"] if "rope_theta" in parameters else theirs.get(old, 10000.0))


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
    to_ours: Callable[[int], int] = int
    to_theirs: Callable[[int], int] = int
    always: bool = False

    def read(self, theirs: Mapping[str, Any], ours: Config) -> None:
        size = theirs.get(self.size)
        if self.switch is not None and not theirs.get(self.switch, False):
            size = None
        if self.usual is None:
            if size is not None:
                put(ours, f"{self.ours}window", self.to_ours(int(size)))
            return
        bound = self._bound_layers(theirs, size)
        if any(bound) and size is not None:
            put(ours, f"{self.ours}window", self.to_ours(int(size)))
            put(ours, f"{self.ours}local.layers", bound)

    def _bound_layers(self, theirs: Mapping[str, Any], size: int | None) -> list[bool]:
        """Whether each layer is bound, as ``layer_types`` says or as is usual."""
        kinds, layers = theirs.get("layer_types"), range(int(theirs["num_hidden_layers"]))
        if not kinds:
            return [self.usual is not None and self.usual(layer, theirs) for layer in layers]
        odd = {*kinds} - {"full_attention", *(() if size is None else ("sliding_attention",))}
        if odd or len(kinds) != len(layers):
            raise ConversionError(
                "this variant is not supported",
                where="config.json: layer_types",
                expected=f"{len(layers)} of full_attention, and sliding_attention where there is a {self.size}",
                found=", ".join(map(str, kinds[:12])),
            )
        return [kind == "sliding_attention" for kind in kinds]

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
