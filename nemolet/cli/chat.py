"""``nemolet chat``: a prompt loop for base models."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from nemolet.cli import generate
from nemolet.errors import GenerationError, TokenizerError


@dataclass(frozen=True)
class Settings(generate.Settings):
    """As for generate; each line that is typed is continued."""


def run(settings: Settings) -> None:
    """Read lines and continue each until the input ends; a line that the model cannot read is said to be so."""
    from nemolet.language.decoding import stream

    archive = generate.opened(settings.archive, settings.device)
    how = generate.manner(settings, archive.model)
    if sys.stdin.isatty():
        print("Type a beginning; an empty line or Ctrl-D ends.")
    for turn, line in enumerate(sys.stdin):
        text = line.rstrip("\n")
        if not text:
            return
        try:
            for _, piece in stream(archive.model, archive.tokenizer, [text], seed=settings.seed + turn, **how):
                sys.stdout.write(piece)
                sys.stdout.flush()
            print()
        except (TokenizerError, GenerationError) as error:
            print(f"{error}\nTry another line.", file=sys.stderr, flush=True)
