"""Configs of ours as they are compared: whether they describe models that compute the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from nemolet.config.schema import REQUIRED, Block, Either, Schema, schema_of

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


def _filled(schema: Schema, config: Mapping[str, Any]) -> dict[str, Any]:
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


def _settle_sizes(values: dict[str, Any]) -> None:
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
        if values["attention"].get("scale") is None:
            values["attention"]["scale"] = float(values["attention"]["head_size"]) ** -0.5
    if "local" in values and values["local"] is None and values.get("window") is not None:
        values["local"] = {"layers": [True] * values["layers"], "rope_base": None}
    local = values.get("local")
    if isinstance(local, dict) and local.get("rope_base") is None and values.get("rope_scaling") is None:
        local["rope_base"] = values.get("rope_base")
    for name in ("ffn", "ffn_width"):
        if name in values and values[name] is None:
            values[name] = -(-width * 8 // 3 // 32) * 32 if values.get("gated") else 4 * width
