"""A config of a verb, composed by Hydra from the installed groups and the overrides of a command line."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemolet.config.schema import Schema
from nemolet.config.validation import Problem, check_block, refuse
from nemolet.errors import ConfigError, nearest


def config_folder() -> Path:
    """Where the installed configs lie, or those of an uninstalled checkout."""
    spec = importlib.util.find_spec("nemolet.conf")
    if spec is not None and spec.origin:
        return Path(spec.origin).parent
    return Path(__file__).parents[2] / "conf"


def compose(name: str, overrides: Sequence[str] = (), *, folder: Path | None = None) -> tuple[dict[str, Any], list[Problem]]:
    """Compose ``conf/<name>.yaml`` with overrides in Hydra's grammar.

    Unknown keys are kept, so that validation reports all of them at once with suggestions.

    Args:
        name: of the main config.
        overrides: such as ``model=llama_tiny`` or ``optim.lr=1e-3``.
        folder: of the configs.

    Returns:
        The config as plain data, and problems found on the way.

    Raises:
        ConfigError: where Hydra cannot compose at all.

    Example:
        >>> config, problems = compose("train", ["model=gpt_tiny"])
        >>> config["model"]["layers"], problems
        (4, [])
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = folder or config_folder()
    usable, problems = _usable(overrides, folder)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            config = OmegaConf.to_container(hydra_compose(name, usable), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        problems.append(Problem(f"conf/{name}.yaml", " ".join(str(error).split()).strip()))
        refuse(problems, f"nemolet {name}")
        raise AssertionError from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}, problems


def validated(name: str, overrides: Sequence[str], schema: Schema, *, supplied: Sequence[str] = (),
              folder: Path | None = None) -> dict[str, Any]:
    """Compose a config and check all of it. Modules that its ``imports`` names are imported first.

    Raises:
        ConfigError: listing every problem with its path and a suggestion.
    """
    config, problems = compose(name, overrides, folder=folder)
    for module in config.get("imports") or []:
        import_user_module(module)
    refuse([*problems, *check_block(schema, config, supplied=supplied)], f"nemolet {name}")
    return config


def _usable(overrides: Sequence[str], folder: Path) -> tuple[list[str], list[Problem]]:
    """Overrides that Hydra will take: choices of groups are checked here, values may add any key."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    usable, problems = [], []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            problems.append(Problem(text, "this is no override", expected="key=value or group=option",
                                    fix="put quotes around values with spaces or brackets: 'prompt=\"a b\"'"))
            continue
        key = override.key_or_group
        group = folder / key
        if override.is_delete() or key.startswith("hydra"):
            usable.append(text)
        elif group.is_dir():
            option = override.value()
            options = sorted(p.stem for p in group.glob("*.yaml"))
            if option is not None and str(option) not in options:
                close = nearest(str(option), options)
                problems.append(Problem(key, "there is no such option", expected="one of " + ", ".join(options), found=str(option),
                                        fix=f"did you mean {key}={close}?" if close else None))
            else:
                usable.append(text.lstrip("+"))
        else:
            usable.append("++" + text.lstrip("+"))
    return usable, problems




def import_user_module(name: str) -> None:
    """Import a module of the user's, also from the current folder, so that it registers its classes."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise ConfigError("this module cannot be imported", where="imports", expected="a module on the Python path or in the "
                          "current folder", found=str(error)) from error
