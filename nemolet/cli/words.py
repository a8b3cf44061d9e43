"""Words of a command line that are no ``key=value``: they are taken as they are written.

Hydra's grammar has its own view of spaces, commas, quotes and brackets; a prompt or a path is none of its business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemolet.errors import ConfigError, nearest

# Which settings the words of a verb are, in their order; one that ends in "..." takes all that are left.
PLACES: dict[str, tuple[str, ...]] = {
    "generate": ("archive", "prompt..."),
    "chat": ("archive",),
    "finetune": ("archive",),
    "evaluate": ("archive",),
    "predict": ("archive", "input", "out"),
    "transcribe": ("archive", "audio..."),
    "convert": ("from", "to"),
    "list": ("group",),
}
# The setting of other verbs that a file without a key is likely meant for.
_FILES = {
    "train": "data.path",
    "overfit": "data.path",
    "check": "data.path",
    "plan": "data.path",
    "tokenize": "path",
    "manifest": "path",
}
_TEXTS = ("prompt", "sample.prompt", "stop")  # settings whose value is a text of any kind
_OVERRIDE = re.compile(r"[+~]{0,2}(hydra/[\w/]+|[A-Za-z_][\w.@:]*)=")
_GRAMMAR = re.compile(r"""'.*'|".*"|\[.*\]|null""", re.DOTALL)  # a value that is meant for Hydra

Words = dict[str, str | list[str]]


def taken(verb: str, arguments: list[str], rest: list[str], *, sweep: bool = False) -> tuple[Words, list[str]]:
    """Texts by the name of their setting, and the overrides that are left for Hydra.

    Args:
        verb: of the command.
        arguments: what follows it, without flags.
        rest: what came after ``--``, none of which is an override.
        sweep: whether values may be several, so that texts have to be quoted.

    Raises:
        ConfigError: for more words than the verb has places.

    Example:
        >>> taken("generate", ["m.nemolet", "a, b = 'c' ", "seed=3"], [])
        ({'archive': 'm.nemolet', 'prompt': "a, b = 'c' "}, ['seed=3'])
    """
    words: Words = {}
    overrides: list[str] = []
    free: list[str] = []
    for argument in arguments:
        key, equals, value = argument.lstrip("+").partition("=")
        if equals and key in _TEXTS and not sweep and not _GRAMMAR.fullmatch(value):
            words[key] = value
        elif verb not in PLACES or _OVERRIDE.match(argument):
            if not equals and verb in _FILES and Path(argument).exists():
                raise ConfigError(
                    "a file needs the setting that it is for",
                    where=f"nemolet {verb}",
                    expected="key=value or group=option",
                    found=argument,
                    fix=f"did you mean {_FILES[verb]}={argument}?",
                )
            if "prompt..." in PLACES.get(verb, ()):
                _check_setting(verb, argument)
            overrides.append(argument)
        else:
            free.append(argument)
    free += rest
    named = {override.lstrip("+").partition("=")[0] for override in overrides} | words.keys()
    for place in PLACES.get(verb, ()):
        name = place.removesuffix("...")
        if name in named or not free:
            continue
        words[name] = free[0] if name == place or len(free) == 1 else free
        free = free[1:] if name == place else []
    if free:
        raise ConfigError(
            "there is no place for this word",
            where=f"nemolet {verb}",
            expected=" ".join(f"[{place}]" for place in PLACES.get(verb, ())) + " key=value ...",
            found=free[0],
            fix="put quotes around a text with spaces",
        )
    return words, overrides


def _check_setting(verb: str, argument: str) -> None:
    """Refuse a word that looks like a setting and is none; it is likely a text."""
    from nemolet.cli import home
    from nemolet.config import schema_of

    schema = schema_of(home(verb), "Settings")
    name = re.split(r"[=.@:/]", argument.lstrip("+~"))[0]
    if schema and name != "hydra" and name not in schema.parameters and not nearest(name, schema.parameters):
        raise ConfigError(
            "there is no such setting",
            where=f"nemolet {verb}",
            expected=", ".join(schema.parameters),
            found=argument,
            fix=f"a text that looks like a setting comes last, after --: -- {argument!r}",
        )


def placed(config: dict[str, Any], words: Mapping[str, Any]) -> dict[str, Any]:
    """A config with these values, whatever they are."""
    for key, value in words.items():
        *parents, last = key.split(".")
        block = config
        for parent in parents:
            block = block.setdefault(parent, {})
        block[last] = value
    return config


def quoted(words: Words) -> list[str]:
    """The same as overrides, for commands that go to Hydra."""
    from hydra.core.override_parser.types import Quote, QuotedString

    def text(value: str) -> str:
        return QuotedString(value.replace("${", "\\${"), Quote.single).with_quotes()

    return [
        f"{key}=" + (text(value) if isinstance(value, str) else f"[{','.join(map(text, value))}]")
        for key, value in words.items()
    ]
