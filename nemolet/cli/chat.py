"""``nemolet chat``: a conversation, by the chat template of the model; or a prompt loop for base models."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nemolet.cli import generate
from nemolet.errors import DataError, GenerationError, TokenizerError

if TYPE_CHECKING:
    from nemolet.data.chat_template import ChatTemplate
    from nemolet.tokenizers import Tokenizer


@dataclass(frozen=True)
class Settings(generate.Settings):
    """As for generate; each line that is typed is answered.

    A conversation that outgrows the context of the model loses its oldest turns, which is said; the system message
    stays. ``truncate`` is for a single line that is longer than that.

    Args:
        template: how the conversation is written down: Jinja, ``plain`` or ``chatml``, or the name of a template that
            came with the model; ``none`` continues each line as it is; null for the model's own template, or none.
        system: what stands before the conversation.
    """

    template: str | None = None
    system: str | None = None


def run(settings: Settings) -> None:
    """Read lines and answer each until the input ends; a line that the model cannot read is said to be so."""
    from nemolet.language.decoding import stream

    archive = generate.language_model(settings)
    model, tokenizer, how = archive.model, archive.tokenizer, generate.manner(settings, archive.model)
    template, conversation = _template(settings.template, archive.extra), None
    if template is not None:
        how["rules"] = replace(how["rules"], stop=_stops(template, tokenizer, how["rules"].stop))
        conversation = _Conversation(template, tokenizer, settings.system, _room(model, how["rules"]))
    if sys.stdin.isatty():
        print(f"Type {'a beginning' if template is None else 'a question'}; an empty line or Ctrl-D ends.")
    for turn, line in enumerate(sys.stdin):
        text = line.rstrip("\n")
        if not text:
            return
        try:
            prompt: Any = text if conversation is None else conversation.ask(text)
            answer = ""
            for _, piece in stream(model, tokenizer, [prompt], seed=settings.seed + turn, **how):
                answer += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
            print()
            if conversation is not None and (forgotten := conversation.answered(answer)):
                said = f"The oldest {forgotten} turns" if forgotten > 1 else "The oldest turn"
                print(f"{said} no longer fit the context ({model.context} tokens).", file=sys.stderr, flush=True)
        except (TokenizerError, GenerationError, DataError) as error:
            print(f"{error}\nTry another line.", file=sys.stderr, flush=True)


@dataclass
class _Conversation:
    """What was said, as far as the model can read it."""

    template: ChatTemplate
    tokenizer: Tokenizer
    system: str | None
    room: float  # most tokens of a prompt
    turns: list[list[dict[str, str]]] = field(default_factory=list)  # a question and its answer each
    question: dict[str, str] = field(default_factory=dict)
    first: int = 0  # of the turns that stand before the question

    def ask(self, text: str) -> list[int]:
        """The prompt with a question at its end, and before it as many of the last turns as there is room for."""
        from nemolet.data.chat import check_message, token_names

        self.question = {"role": "user", "content": text}
        check_message(self.tokenizer, self.question, "your line")
        system = [{"role": "system", "content": self.system}] if self.system else []
        for first in range(len(self.turns) + 1):
            messages = [*system, *(message for turn in self.turns[first:] for message in turn), self.question]
            written = self.template.render(messages, add_generation_prompt=True, **token_names(self.tokenizer))
            self.first, prompt = first, self.tokenizer.encode(written, special=True)
            if len(prompt) <= self.room:
                break
        return prompt

    def answered(self, answer: str) -> int:
        """Remember an answer; returns how many turns are forgotten, for which there was no room."""
        self.turns = [*self.turns[self.first :], [self.question, {"role": "assistant", "content": answer}]]
        return self.first


def _room(model: Any, rules: Any) -> float:
    """Most tokens of a prompt that leaves place for an answer; an answer takes no more than half of the context."""
    context = getattr(model, "context", None)
    return context - min(rules.room(0) or context, context // 2) if context else float("inf")


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
