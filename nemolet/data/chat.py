"""Conversations as ids: exact masks of what the assistant says, and a lint that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nemolet.data.chat_template import ChatTemplate, Message
from nemolet.errors import DataError
from nemolet.tokenizers import Tokenizer


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
    for message in messages:
        check_message(tokenizer, message, where)
    tokens: list[int] = []
    learned: list[bool] = []
    for turn in template.turns(messages, **token_names(tokenizer)):
        ids = tokenizer.encode(turn.text, special=True)
        tokens += ids
        learned += [turn.learned] * len(ids)
    return Learned(tokens, learned)


def token_names(tokenizer: Tokenizer) -> dict[str, Any]:
    """The special tokens of a tokenizer by the names that templates have for them."""
    return {"bos_token": _name(tokenizer, tokenizer.bos_id), "eos_token": _name(tokenizer, tokenizer.eos_id)}


def _name(tokenizer: Tokenizer, token: int | None) -> str:
    return next((text for text, index in tokenizer.special_tokens.items() if index == token), "")


def check_message(tokenizer: Tokenizer, message: Any, where: str) -> None:
    """Refuse a message without role and content, or with a special token in its text."""
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
