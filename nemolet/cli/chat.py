"""``nemolet chat``: a conversation, by the chat template of the model; or a prompt loop for base models."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nemolet.cli import generate
from nemolet.errors import DataError, GenerationError, TokenizerError

if TYPE_CHECKING:
    from nemolet.data.chat_template import ChatTemplate


@dataclass(frozen=True)
class Settings(generate.Settings):
    """As for generate; each line that is typed is answered.

    Args:
        template: how the conversation is written down: Jinja, ``plain`` or ``chatml``, or the name of a template that
            came with the model; ``none`` continues each line as it is; null for the model's own template, or none.
        system: what stands before the conversation.
    """

    template: str | None = None
    system: str | None = None


def run(settings: Settings) -> None:
    """Read lines and answer each until the input ends; a line that the model cannot read is said to be so."""
    from nemolet.data.chat import check_message, token_names
    from nemolet.language.decoding import stream

    archive = generate.language_model(settings)
    model, tokenizer, how = archive.model, archive.tokenizer, generate.manner(settings, archive.model)
    template = _template(settings.template, archive.extra)
    said = [{"role": "system", "content": settings.system}] if settings.system else []
    if template is not None:
        how["rules"] = replace(how["rules"], stop=_stops(template, tokenizer, how["rules"].stop))
    if sys.stdin.isatty():
        print(f"Type {'a beginning' if template is None else 'a question'}; an empty line or Ctrl-D ends.")
    for turn, line in enumerate(sys.stdin):
        text = line.rstrip("\n")
        if not text:
            return
        asked = [*said, {"role": "user", "content": text}]
        try:
            prompt: Any = text
            if template is not None:
                check_message(tokenizer, asked[-1], "your line")
                written = template.render(asked, add_generation_prompt=True, **token_names(tokenizer))
                prompt = tokenizer.encode(written, special=True)
            answer = ""
            for _, piece in stream(model, tokenizer, [prompt], seed=settings.seed + turn, **how):
                answer += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
            print()
            said = [*asked, {"role": "assistant", "content": answer}]
        except (TokenizerError, GenerationError, DataError) as error:
            goes_on = template is not None and said and isinstance(error, GenerationError)
            before = " What was said before counts, too; truncate=true reads the end of it." if goes_on else ""
            print(f"{error}\nTry another line.{before}", file=sys.stderr, flush=True)


def _template(asked: str | None, extra: Mapping[str, bytes]) -> ChatTemplate | None:
    """The template that is asked for, or else that of the archive, or none."""
    from nemolet.data.chat_template import TEMPLATES, ChatTemplate

    if asked == "none":
        return None
    if asked is None:
        return ChatTemplate.of(extra)
    if asked in TEMPLATES or "{" in asked:
        own = ChatTemplate.of(extra)
        return ChatTemplate(asked, own.tokens if own else {})
    return ChatTemplate.of(extra, asked)


def _stops(template: ChatTemplate, tokenizer: Any, stop: tuple[int, ...]) -> tuple[int, ...]:
    """What ends an answer: what ends a text, and the special token that the template writes behind one."""
    from nemolet.data.chat import token_names

    example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    learned = [turn.text for turn in template.turns(example, **token_names(tokenizer)) if turn.learned]
    behind = tokenizer.encode(learned[-1].rpartition("b")[2], special=True) if learned else []
    ends = stop or (() if tokenizer.eos_id is None else (tokenizer.eos_id,))
    return (*ends, *(token for token in behind[:1] if token in tokenizer.special_tokens.values()))
