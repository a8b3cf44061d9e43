"""``nemolet <verb> --help``: what a verb takes, and with which values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from nemolet.cli import SUPPLIED, VERBS, home
from nemolet.cli.listing import groups
from nemolet.cli.words import PLACES, placed
from nemolet.config import check_block, compose, config_folder, import_user_modules, refuse, schema_of


def show(verb: str, overrides: Sequence[str], words: Mapping[str, Any]) -> None:
    """Print the words, groups and settings of a verb, as the overrides make them.

    Raises:
        ConfigError: for overrides that change nothing there is.
    """
    config, problems = compose(verb, overrides)
    placed(config, words)
    import_user_modules(config.get("imports"))
    refuse([*problems, *unknown(verb, config)], f"nemolet {verb}")
    usage = "".join(f" [{place}]" for place in PLACES.get(verb, ()))
    print(f"nemolet {verb}: {VERBS[verb]}\n\nusage: nemolet {verb}{usage} [group=option] [key=value] ...\n")
    defaults = yaml.safe_load((config_folder() / f"{verb}.yaml").read_text(encoding="utf-8")).get("defaults", [])
    chosen = {name for default in defaults if isinstance(default, dict) for name in default}
    if chosen:
        print("== Groups (override with group=option) ==")
        for name in sorted(chosen & groups().keys()):
            print(f"{name}: {', '.join(groups()[name])}")
        print()
    print("== Config (override with key=value) ==")
    print(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def unknown(verb: str, config: dict[str, Any]) -> list[Any]:
    """Problems of a config that is only looked at: it may lack values and break rules, but not add settings."""
    schema = schema_of(home(verb), "Settings")
    assert schema is not None
    return [problem for problem in check_block(schema, config, supplied=SUPPLIED) if "no such setting" in problem.what]
