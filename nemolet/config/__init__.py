"""Configs: compose, validate with suggestions, build objects from an allowlist."""

from nemolet.config.composition import compose, config_folder, hydra_overrides, import_user_modules, validated
from nemolet.config.registry import ModuleConfig, build, construct, register, resolve, schema_of_target
from nemolet.config.schema import Schema, schema_of
from nemolet.config.validation import Problem, check_block, check_tree, refuse

__all__ = [
    "ModuleConfig",
    "Problem",
    "Schema",
    "build",
    "check_block",
    "check_tree",
    "compose",
    "config_folder",
    "construct",
    "hydra_overrides",
    "import_user_modules",
    "refuse",
    "register",
    "resolve",
    "schema_of",
    "schema_of_target",
    "validated",
]
