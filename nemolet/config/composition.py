"""A config of a verb, composed by Hydra from the installed groups and the overrides of a command line."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Sequence
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


def compose(
    name: str, overrides: Sequence[str] = (), *, folder: Path | None = None
) -> tuple[dict[str, Any], list[Problem]]:
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
    usable, problems = hydra_overrides(overrides, folder=folder)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            config = OmegaConf.to_container(hydra_compose(name, usable), resolve=True)
    except (HydraException, OmegaConfBaseException, RecursionError) as error:
        problems.append(_composition_problem(name, error))
        refuse(problems, f"nemolet {name}")
        raise AssertionError from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}, problems


def validated(
    name: str,
    overrides: Sequence[str],
    schema: Schema,
    *,
    supplied: Sequence[str] = (),
    folder: Path | None = None,
    change: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Compose a config and check all of it. Modules that its ``imports`` names are imported first.

    Args:
        name: of the main config.
        overrides: in Hydra's grammar.
        schema: what the config builds.
        supplied: paths that the program fills in later, so that they may be null or absent.
        folder: of the configs.
        change: what is done to the composed config before it is checked.

    Raises:
        ConfigError: listing every problem with its path and a suggestion.
    """
    config, problems = compose(name, overrides, folder=folder)
    config = config if change is None else change(config)
    import_user_modules(config.get("imports"))
    refuse([*problems, *check_block(schema, config, supplied=supplied)], f"nemolet {name}")
    return config


def hydra_overrides(
    overrides: Sequence[str], *, folder: Path | None = None, sweep: bool = False
) -> tuple[list[str], list[Problem]]:
    """Overrides in the form that Hydra takes: choices of groups are checked here, values may add any key.

    Args:
        overrides: of a command line.
        folder: of the configs.
        sweep: whether several values for one key are wanted.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    folder = folder or config_folder()
    parser = OverridesParser.create()
    usable: list[str] = []
    problems: list[Problem] = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            problems.append(_no_override(text, folder))
            continue
        key = override.key_or_group
        is_group = bool(key) and (folder / key).is_dir()
        if not key:
            problems.append(_no_override(text, folder))
        elif override.is_delete() or key.split(".")[0].split("/")[0] == "hydra":
            usable.append(text)
        elif override.is_sweep_override():
            usable.append(text.lstrip("+") if is_group else "++" + text.lstrip("+"))
            if not sweep:
                usable.pop()
                problems.append(
                    Problem(
                        key,
                        "several values need a sweep",
                        found=text,
                        fix=f"add --multirun, write a list as {key}=[...], or a text with commas in two kinds of"
                        f""" quotes: {key}='"a, b"'""",
                    )
                )
        elif is_group:
            problem = _choice_problem(folder / key, key, override.value())
            problems += [problem] if problem else []
            usable += [] if problem else [text.lstrip("+")]
        else:
            usable.append("++" + text.lstrip("+"))
    return usable, problems


def _no_override(text: str, folder: Path) -> Problem:
    return Problem(text, "this is no override", expected="key=value or group=option", fix=_meant(text, folder))


def _meant(text: str, folder: Path) -> str:
    """What a word that Hydra cannot read was likely meant to be."""
    key, equals, value = text.partition("=")
    if equals and re.fullmatch(r"[+~]{0,2}[A-Za-z_][\w./@:]*", key) and value.strip("'\"") == value:
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f"""put quotes around the value: {shlex.quote(f'{key}="{escaped}"')}"""
    if equals:
        return "put quotes around values with spaces or brackets: 'prompt=\"a b\"'"
    group = next((path.parent.name for path in sorted(folder.glob("*/*.yaml")) if path.stem == text), None)
    return f"did you mean {group}={text}?" if group else f"write key={text}"


def _choice_problem(group: Path, key: str, option: Any) -> Problem | None:
    options = sorted(path.stem for path in group.glob("*.yaml"))
    if option is None or str(option) in options:
        return None
    close = nearest(str(option), options)
    return Problem(
        key,
        "there is no such option",
        expected="one of " + ", ".join(options),
        found=str(option),
        fix=f"did you mean {key}={close}?" if close else None,
    )


def _composition_problem(name: str, error: Exception) -> Problem:
    """What Hydra or OmegaConf says, without what only their own users need to know."""
    if isinstance(error, RecursionError):
        return Problem(f"conf/{name}.yaml", "a value refers to itself")
    text = " ".join(str(error).split())
    elsewhere = re.match(r"In '([^'/]*)/([^']*)': Could not override '([^']*)'", text)
    if elsewhere:
        group, option, missing = elsewhere.groups()
        return Problem(group, f"{option} is not for `nemolet {name}`, which has no {missing}=...", fix="see its file")
    unknown = re.match(r"Could not (?:override|delete).*?'([^']*)'", text)
    if unknown:
        return Problem(unknown[1], f"`nemolet {name}` has no such group or setting", fix=f"see `nemolet {name} --help`")
    key = getattr(error, "full_key", None)
    what = str(error).splitlines()[0].strip() if str(error).strip() else type(error).__name__
    return Problem(str(key), what) if key else Problem(f"conf/{name}.yaml", text)


def import_user_modules(names: Any) -> None:
    """Import modules of the user's, also from the current folder, so that they register their classes.

    Raises:
        ConfigError: for a module that is not there, or that fails.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return  # of another type, which validation reports
    for name in names:
        if "" not in sys.path:
            sys.path.insert(0, "")
        try:
            importlib.import_module(name)
        except Exception as error:  # a module of the user raises anything; kept as the cause
            raise ConfigError(
                "this module cannot be imported",
                where="imports",
                found=f"{name}: {error}",
                expected="a module on the Python path or in the current folder",
            ) from error
