"""The command line: ``nemolet <verb> [overrides]``.

Every verb is a module of this package with a ``Settings`` dataclass and a ``run`` function; the values are in
``conf/<verb>.yaml``. This file finds the verb, composes and validates its config, and runs it. A plain run
composes the config itself, so that a mistake is answered before anything heavy is imported, and so does ``--help``;
flags that belong to Hydra (``--multirun``, ``--cfg``, ``--info``, ``--shell-completion``) are handed to Hydra.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from nemolet.errors import ConfigError, NemoletError, nearest

VERBS = {
    "train": "train a model, or resume where its folder left off",
    "finetune": "go on from an archive: all of it, a part, or a small addition",
    "evaluate": "how well an archive does on a text, or on examples of its task",
    "predict": "answers of an archive to a file of records",
    "generate": "continue a prompt",
    "chat": "continue what you type, line by line",
    "transcribe": "write down what is said in recordings",
    "convert": "turn a Hugging Face folder into a .nemolet file, or back",
    "tokenize": "turn text into token files for training",
    "manifest": "look into recordings, list what is wrong, and write a manifest of the rest",
    "check": "validate a training config and wire its graph, without training",
    "overfit": "see whether one batch of a training config can be learned by heart",
    "plan": "where the parameters of a training config lie, and the bytes on each rank",
    "graph": "draw the graph of a training config as text, Mermaid or SVG",
    "list": "list the config groups and their options",
}
USAGE = """nemolet: typed neural modules of speech and language

usage: nemolet <verb> [word] ... [group=option] [key=value] ...

{verbs}

examples:
  nemolet train experiment=demo                       a small model, on text that Python carries
  nemolet train data.path=my.txt model=llama_tiny     your own text
  nemolet train optim.lr=1e-3,3e-3 --multirun         one run for each value
  nemolet generate runs/demo/model.nemolet "def "      words are taken as they are; so is what follows --
  nemolet convert hf_folder model.nemolet             weights of Hugging Face, and back again
  nemolet list                                        what can be chosen

  nemolet <verb> --help       the config of a verb, with its groups
  nemolet <verb> --cfg job    the config as it would be used
  nemolet train --dry-run     the plan and its memory, without weights or data
  nemolet plan --explain      the same, with what happens between modules, and why
"""
# What a config may leave null, since only the data knows it.
SUPPLIED = (
    "model.vocab_size",
    "model.encoder.vocab_size",
    "model.model.vocab_size",
    "model.labels",
    "model.intents",
    "model.slots",
    "model.classes",
)
# Flags of Hydra, and the values each takes: none (0), one (1), or perhaps one of these words.
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_FLAGS: dict[str, int | tuple[str, ...]] = {
    "--multirun": 0,
    "-m": 0,
    "--cfg": 1,
    "-c": 1,
    "--resolve": 0,
    "--package": 1,
    "-p": 1,
    "--help": 0,
    "-h": 0,
    "--hydra-help": 0,
    "--shell-completion": 0,
    "-sc": 0,
    "--info": _INFO,
    "-i": _INFO,
}
SWEEP = {"--multirun", "-m"}
_HELP = {"--help", "-h"}
# Flags of our own, which are settings under a name that people expect.
_ALIASES = {"--dry-run": "dry_run=true", "--explain": "explain=true"}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 failed at work, 2 refused before any work)."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(verbs="\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())))
        return 0
    if arguments[0] == "--version":
        from nemolet import __version__

        print(__version__)
        return 0
    verb = arguments[0]
    try:
        if verb not in VERBS:
            close = nearest(verb, VERBS)
            fix = f"did you mean `nemolet {close}`?" if close else "see nemolet --help"
            raise ConfigError(
                "there is no such verb", where=f"nemolet {verb}", expected=", ".join(VERBS), found=verb, fix=fix
            )
        from nemolet.cli.words import quoted, taken

        flags, plain, rest = _split(verb, arguments[1:])
        words, overrides = taken(verb, plain, rest, sweep=not SWEEP.isdisjoint(flags))
        if flags and not _HELP.issuperset(flags):
            from nemolet.cli.hydra_app import run

            return run(verb, flags, overrides + quoted(words))
        if flags:
            from nemolet.cli.verb_help import show

            show(verb, overrides, words)
            return 0
        return call(verb, composed(verb, overrides, words))
    except ConfigError as error:
        return report(error, 2)
    except NemoletError as error:
        return report(error, 1)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        found = error.strerror or str(error)
        return report(NemoletError("the file system refuses", where=error.filename, found=found), 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _split(verb: str, arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Flags with their values, what is no flag, and what follows ``--``.

    Raises:
        ConfigError: for a flag that Hydra does not have, or one without its value.
    """
    flags: list[str] = []
    overrides: list[str] = []
    end = arguments.index("--") if "--" in arguments else len(arguments)
    rest = arguments[:end]
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        if argument in _ALIASES:
            overrides.append(_ALIASES[argument])
            continue
        name, given, _ = argument.partition("=")
        if name not in _FLAGS:
            raise _no_flag(verb, name)
        takes = _FLAGS[name]
        flags.append(argument)
        if not given and takes == 1 and not rest:
            raise ConfigError("this flag needs a value", where=name, fix=f"for example {name} job")
        if not given and (takes == 1 or (isinstance(takes, tuple) and rest and rest[0] in takes)):
            flags.append(rest.pop(0))
    return flags, overrides, arguments[end + 1 :]


def _no_flag(verb: str, name: str) -> ConfigError:
    from nemolet.cli.words import PLACES
    from nemolet.config import schema_of

    close = nearest(name, [flag for flag in (*_FLAGS, *_ALIASES) if flag.startswith("--")])
    schema = schema_of(home(verb), "Settings")
    word, settings = name.lstrip("-").replace("-", "_"), schema.parameters if schema else ()
    setting = nearest(word, settings)
    close = None if word in settings else close
    fix = f"did you mean {close}?" if close else f"did you mean {setting}=...?" if setting else None
    if verb in PLACES and not close:
        fix = (f"{fix} " if fix else "") + f"A text that begins with a dash comes last, after --: -- {name!r}"
    return ConfigError(
        "there is no such flag",
        where=name,
        expected="key=value, group=option, or a flag of `nemolet --help`",
        fix=fix,
    )


def home(verb: str) -> str:
    """The module of a verb."""
    return f"nemolet.cli.{'listing' if verb == 'list' else verb}"


def composed(verb: str, overrides: list[str], words: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The whole config of a verb, validated against its Settings without importing the verb.

    Args:
        verb: of the command.
        overrides: in Hydra's grammar.
        words: values that are taken as they are, by the name of their setting.

    Raises:
        ConfigError: listing every problem.
    """
    from nemolet.cli.words import placed
    from nemolet.config import schema_of, validated

    schema = schema_of(home(verb), "Settings")
    assert schema is not None
    return validated(verb, overrides, schema, supplied=SUPPLIED, change=lambda config: placed(config, words or {}))


def call(verb: str, config: dict[str, Any]) -> int:
    """Import the verb and run it; a verb may return an exit status."""
    from nemolet.config import construct, schema_of

    schema = schema_of(home(verb), "Settings")
    assert schema is not None
    settings = construct(schema, config)
    return importlib.import_module(home(verb)).run(settings) or 0


def report(error: NemoletError, status: int) -> int:
    """Print an error for people, or raise it for developers; returns the status."""
    if os.environ.get("NEMOLET_TRACEBACK"):
        raise error
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return status
