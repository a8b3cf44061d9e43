"""Conversations as ids: templates in a sandbox, exact masks of what the assistant says, and a lint that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nemolet.errors import DataError
from nemolet.tokenizers import Tokenizer

TEMPLATES = {
    "plain": (
        "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
_LARGEST = 1_000_000  # characters that a template may write
Message = Mapping[str, str]


class Turn(NamedTuple):
    """A stretch of a conversation."""

    text: str
    learned: bool  # whether the assistant says it


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written down (final).

    A template is Jinja, as in the ``chat_template`` of a Hugging Face tokenizer. It runs in a sandbox: it sees the
    messages and the names of special tokens, can change nothing and reach nothing else.

    Args:
        source: the template, or the name of one: ``"plain"`` or ``"chatml"``.

    Raises:
        DataError: for a template that is none, fails, or tries to leave its sandbox.

    Example:
        >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> ChatTemplate("plain").turns(messages, eos_token="</s>")[1]
        Turn(text='Hello</s>', learned=True)
    """

    source: str = "plain"

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        bos_token: str = "",
        eos_token: str = "",
    ) -> str:
        """The text of a conversation."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals.update(raise_exception=_refuse)
        try:
            template = environment.from_string(TEMPLATES.get(self.source, self.source))
            pieces, size = [], 0
            for piece in template.generate(
                messages=[dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=bos_token,
                eos_token=eos_token,
            ):
                pieces.append(piece)
                size += len(piece)
                if size > _LARGEST:
                    raise DataError("the template writes too much", where="chat_template", found=f"{size:,} characters")
        except jinja2.exceptions.SecurityError as error:
            raise DataError(
                "the template tries to leave its sandbox",
                where="chat_template",
                found=str(error),
                expected="a template that only reads messages",
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise DataError("the template fails", where="chat_template", found=str(error)[:300]) from error
        return "".join(pieces)

    def turns(self, messages: Sequence[Message], *, bos_token: str = "", eos_token: str = "") -> list[Turn]:
        """The conversation in stretches: what stands between is read, what the assistant says is learned.

        The assistant's stretch is what a template adds to its own prompt for an answer, without the line end behind.

        Raises:
            DataError: for a template that writes earlier messages anew when more follow.
        """
        turns: list[Turn] = []
        written = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:index], add_generation_prompt=True, bos_token=bos_token, eos_token=eos_token)
            through = self.render(messages[: index + 1], bos_token=bos_token, eos_token=eos_token)
            if not (prompt.startswith(written) and through.startswith(prompt)):
                raise DataError(
                    "the template writes earlier messages anew",
                    where="chat_template",
                    expected="a conversation that only grows",
                    found=f"{prompt[-60:]!r} before {through[-60:]!r}",
                    fix="use one answer per conversation, or another template",
                )
            answer = through[len(prompt) :]
            said = answer.rstrip("\n") if message["content"] and not message["content"].endswith("\n") else answer
            turns += [Turn(prompt[len(written) :], False), Turn(said, True)]
            written = prompt + said
        rest = self.render(messages, bos_token=bos_token, eos_token=eos_token)[len(written) :]
        return [turn for turn in [*turns, Turn(rest.rstrip("\n"), False)] if turn.text]


def _refuse(message: str) -> None:
    raise ValueError(message)


class Learned(NamedTuple):
    """Ids of a conversation, and which of them the assistant says."""

    tokens: list[int]
    learned: list[bool]

    def labels(self, ignored: int) -> list[int]:
        """What is to be predicted at each position: the next id, where the assistant says it."""
        return [t if m else ignored for t, m in zip(self.tokens[1:], self.learned[1:])] + [ignored]


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], where: str, *, template: ChatTemplate | None = None
) -> Learned:
    """Ids of a conversation, stretch by stretch: as when the prompt is given and the answer is generated.

    Special tokens come from the template only; a message that spells one is refused.

    Raises:
        DataError: for a message without role and content, or with a special token in its text.
    """
    template = template or ChatTemplate()
    names = {"bos_token": _name(tokenizer, tokenizer.bos_id), "eos_token": _name(tokenizer, tokenizer.eos_id)}
    for message in messages:
        _check_message(tokenizer, message, where)
    tokens: list[int] = []
    learned: list[bool] = []
    for turn in template.turns(messages, **names):
        ids = tokenizer.encode(turn.text, special=True)
        tokens += ids
        learned += [turn.learned] * len(ids)
    return Learned(tokens, learned)


def _name(tokenizer: Tokenizer, token: int | None) -> str:
    return next((text for text, index in tokenizer.special_tokens.items() if index == token), "")


def _check_message(tokenizer: Tokenizer, message: Any, where: str) -> None:
    whole = isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))
    if not whole:
        raise DataError("a message needs a role and a content", where=where, found=repr(message)[:80])
    spelled = [text for text in tokenizer.special_tokens if text in message["content"]]
    if spelled:
        raise DataError(
            "a message spells a special token",
            where=where,
            found=spelled[0],
            expected="special tokens in the template only",
            fix="remove it from the text",
        )


def lint(tokenizer: Tokenizer, chat: Learned, where: str, *, cut: bool = False) -> None:
    """Refuse conversations from which a model would learn something else than to answer.

    Args:
        tokenizer: made the ids.
        chat: with its mask.
        where: for errors.
        cut: whether the end was cut off, so that it need not stop.

    Raises:
        DataError: for no answer, an answer whose end is not learned, or two beginnings.
    """
    if not any(chat.learned):
        raise DataError(
            "nothing here is said by the assistant",
            where=where,
            expected="an answer in the mask",
            found=f"{len(chat.tokens)} tokens, none of them learned",
            fix="end the conversation with a message of the assistant",
        )
    specials = set(tokenizer.special_tokens.values())
    ends = [i for i, m in enumerate(chat.learned) if m and chat.learned[i + 1 : i + 2] != [True]]
    open_ends = [i for i in ends if chat.tokens[i] not in specials and not (cut and i == len(chat.tokens) - 1)]
    if open_ends:
        raise DataError(
            "the token that stops an answer is not learned",
            where=where,
            expected="an answer that ends in a special token inside the mask",
            found=repr(tokenizer.decode(chat.tokens[max(0, open_ends[0] - 5) : open_ends[0] + 2], special=True)),
            fix="let the template write eos_token after the assistant's content",
        )
    if tokenizer.bos_id is not None and chat.tokens[:2] == [tokenizer.bos_id] * 2:
        raise DataError(
            "the conversation begins twice",
            where=where,
            expected="one beginning-of-text token",
            found="two",
            fix="leave bos_token to the template",
        )


def show(tokenizer: Tokenizer, chat: Learned, *, colour: bool = True) -> str:
    """A conversation with what is learned in green (or in brackets), the rest in grey.

    Example:
        >>> from nemolet.tokenizers import ByteTokenizer
        >>> show(ByteTokenizer(), Learned([97, 98, 99], [False, True, True]), colour=False)
        'a[bc]'
    """
    learn, read, end = ("\033[32m", "\033[90m", "\033[0m") if colour else ("[", "", "]")
    shown = []
    start = 0
    for index in range(1, len(chat.tokens) + 1):
        if index == len(chat.tokens) or chat.learned[index] != chat.learned[start]:
            text = tokenizer.decode(chat.tokens[start:index], special=True)
            mark = learn if chat.learned[start] else read
            shown.append(f"{mark}{text}{end if mark else ''}")
            start = index
    return "".join(shown)
