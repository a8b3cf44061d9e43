"""Templates of conversations: Jinja as Hugging Face means it, in a sandbox."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from nemolet.errors import DataError

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
FILE, FOLDER = "chat_template.jinja", "additional_chat_templates/"  # where transformers 5 keeps them
_OLD_FILE = "chat_template.json"
_SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")
# What goes wrong in an expression of a template.
_FAILURES = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
_LARGEST = 1_000_000  # characters that a template may write
# For private use in Unicode: around what a template marks as said by the assistant, and where a message goes on.
_BEGIN, _END, _GOES_ON = "\uf8f0", "\uf8f1", "\uf8f2"
Message = Mapping[str, Any]


class Turn(NamedTuple):
    """A stretch of a conversation."""

    text: str
    learned: bool  # whether the assistant says it


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written down (final).

    A template is Jinja, as in the ``chat_template`` of a Hugging Face tokenizer, with what that knows beyond Jinja:
    ``{% generation %}`` around what the assistant says, ``{% break %}`` and ``{% continue %}``, ``tojson``,
    ``strftime_now`` and ``raise_exception``. It runs in a sandbox: it sees the messages and the names of special
    tokens, can change nothing and reach nothing else.

    Args:
        source: the template, or the name of one: ``"plain"`` or ``"chatml"``.
        tokens: special tokens by the names that the template has for them, such as ``bos_token``.
        tool_source: the template where there are tools; None for the same.

    Raises:
        DataError: for a template that is none, fails, or tries to leave its sandbox.

    Example:
        >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> ChatTemplate("plain").turns(messages, eos_token="</s>")[1]
        Turn(text='Hello</s>', learned=True)
    """

    source: str = "plain"
    tokens: Mapping[str, str] = field(default_factory=dict)
    tool_source: str | None = None

    @classmethod
    def of(cls, files: Mapping[str, bytes], name: str | None = None) -> ChatTemplate | None:
        """The template that came with a model, or None.

        As in transformers, files of templates count before an entry in ``tokenizer_config.json``;
        ``chat_template.json``, which only processors read there, comes last.

        Args:
            files: small files of a Hugging Face folder, as in ``archive.extra``.
            name: of one of several templates; None for the one that is named ``default``.

        Raises:
            DataError: for files that are broken, or no template of this name.
        """
        said: dict[str, Any] = {}
        for file in _SETTINGS:
            said |= _object(files, file)
        own = {path[len(FOLDER) : -len(".jinja")]: path for path in files if path.startswith(FOLDER)}
        own |= {"default": FILE} if FILE in files else {}
        found = {known: files[path].decode("utf-8", "replace") for known, path in own.items()}
        found = found or _named(said.get("chat_template")) or _named(_object(files, _OLD_FILE).get("chat_template"))
        if not found and name is None:
            return None
        if (name or "default") not in found:
            raise DataError(
                "there is no chat template of this name",
                where="chat_template",
                expected=", ".join(sorted(found)) or "a model that came with templates",
                found=name or "default",
                fix="name one of them, or give a template of your own",
            )
        texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in said.items()}
        tokens = {key: text for key, text in texts.items() if key.endswith("_token") and isinstance(text, str)}
        return cls(found[name or "default"], tokens, found.get("tool_use") if name is None else None)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: with role and content.
            add_generation_prompt: whether the beginning of an answer stands at the end.
            tools: descriptions of functions that may be called, as JSON schemas.
            documents: with title and text.
            variables: what else the template sees; names of special tokens that came with it count before.
        """
        given = {"add_generation_prompt": add_generation_prompt, "tools": tools, "documents": documents, **variables}
        return _unmarked(self._written(messages, given))

    def render_open(self, messages: Sequence[Message], **variables: Any) -> str:
        """The text of a conversation up to the end of its last message, which goes on.

        Args:
            messages: with role and content.
            variables: as for :meth:`render`.

        Raises:
            DataError: without a message that is a text, or for a template that leaves its end out.

        Example:
            >>> ChatTemplate("chatml").render_open([{"role": "assistant", "content": "It is "}])
            '<|im_start|>assistant\\nIt is '
        """
        last = messages[-1].get("content") if messages else None
        if not isinstance(last, str):
            raise DataError("no message goes on", where="messages", expected="a text at the end", found=repr(last)[:80])
        marked = {**messages[-1], "content": f"{last}{_GOES_ON} "}
        written = _unmarked(self._written([*messages[:-1], marked], variables))
        text, found, rest = written.rpartition(_GOES_ON)
        if not rest.startswith(" "):  # a template that trims its messages, whose ends are shielded by the mark
            text = text.rstrip()
        if not found or last.strip() not in text:
            raise DataError(
                "the template does not write the last message as it is",
                where="chat_template",
                expected="a message that can go on",
                found=f"{last[-60:]!r} in {written.replace(_GOES_ON, '')[-60:]!r}",
                fix="use a template that only adds to messages, or let the conversation end before an answer",
            )
        return text

    def _written(self, messages: Sequence[Message], given: Mapping[str, Any]) -> str:
        import jinja2

        source = self.tool_source if given.get("tools") is not None and self.tool_source else self.source
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if any(mark in json.dumps([chat, given], ensure_ascii=False, default=str) for mark in (_BEGIN, _END)):
            raise DataError("a message holds a character for private use", where="messages", found="U+F8F0 or U+F8F1")
        pieces, size = [], 0
        try:
            template = _environment().from_string(TEMPLATES.get(source, source))
            for piece in template.generate(messages=chat, **{**given, **self.tokens}):
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
        except (jinja2.TemplateError, *_FAILURES) as error:
            found = f"{type(error).__name__}: {error}"[:300]
            raise DataError("the template fails", where="chat_template", found=found) from error
        return "".join(pieces)

    def turns(self, messages: Sequence[Message], **variables: Any) -> list[Turn]:
        """The conversation in stretches: what stands between is read, what the assistant says is learned.

        What the assistant says is what the template marks with ``{% generation %}``; where it marks nothing, what it
        adds to its own prompt for an answer, without the line end behind.

        Raises:
            DataError: for a template that cuts off a mark, or, without marks, writes earlier messages anew when more
                follow.
        """
        whole = self._written(messages, variables)
        marks = re.sub(f"[^{_BEGIN}{_END}]", "", whole)
        if marks.replace(_BEGIN + _END, ""):
            raise DataError(
                "the template changes what it has marked as said by the assistant",
                where="chat_template",
                expected="{% generation %} around what is written, not around what is cut or turned later",
                found=f"{marks.count(_BEGIN)} beginnings and {marks.count(_END)} ends",
                fix="put {% generation %} where the text is written",
            )
        if marks:
            parts = re.split(f"[{_BEGIN}{_END}]", whole)
            parts[-1] = parts[-1].rstrip("\n")
            return [Turn(text, number % 2 == 1) for number, text in enumerate(parts) if text]
        turns: list[Turn] = []
        written = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:index], add_generation_prompt=True, **variables)
            through = self.render(messages[: index + 1], **variables)
            if not (prompt.startswith(written) and through.startswith(prompt)):
                raise DataError(
                    "the template writes earlier messages anew",
                    where="chat_template",
                    expected="a conversation that only grows, or {% generation %} around what the assistant says",
                    found=f"{prompt[-60:]!r} before {through[-60:]!r}",
                    fix="use one answer per conversation, or another template",
                )
            answer = through[len(prompt) :]
            said = answer.rstrip("\n") if message["content"] and not message["content"].endswith("\n") else answer
            turns += [Turn(prompt[len(written) :], False), Turn(said, True)]
            written = prompt + said
        rest = whole[len(written) :]
        return [turn for turn in [*turns, Turn(rest.rstrip("\n"), False)] if turn.text]


def _unmarked(text: str) -> str:
    return text.replace(_BEGIN, "").replace(_END, "")


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """What a JSON file holds; nothing where it is not there."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise DataError("this file is no JSON", where=name, found=str(error)[:200]) from error
    return value if isinstance(value, dict) else {}


def _named(entry: Any) -> dict[str, str]:
    """Templates by name: of an entry that is one, a list of named ones, or a mapping."""
    if isinstance(entry, str):
        return {"default": entry}
    if isinstance(entry, list):
        entry = {one.get("name"): one.get("template") for one in entry if isinstance(one, dict)}
    texts = entry.items() if isinstance(entry, dict) else ()
    return {name: text for name, text in texts if isinstance(name, str) and isinstance(text, str)}


# --------------------------------------------------------------------------------------------------
# The dialect
# --------------------------------------------------------------------------------------------------


@functools.cache
def _environment() -> Any:
    """Jinja with what transformers adds to it, in a sandbox."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(value) if isinstance(value, (str, list, tuple)) else value for value in (left, right)]
            plain = all(isinstance(size, (int, float)) for size in sizes)
            if plain and (abs(sizes[1]) > 64 if operator == "**" else abs(sizes[0] * sizes[1]) > 1 << 62):
                raise SecurityError("a product is too large")
            made = any(isinstance(value, (str, list, tuple)) for value in (left, right))
            if operator == "*" and plain and made and sizes[0] * sizes[1] > _LARGEST:
                raise SecurityError("a text is repeated too often")
            return super().call_binop(context, operator, left, right)

    class Said(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{_BEGIN}{_unmarked(caller())}{_END}"  # what is marked within is a part of it

    class Values(Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:  # without a name, so that a value may be called `self`
            itself, *rest = args
            values = dict(*rest, **kwargs)
            for name in values:
                _public(name)
            Namespace.__init__(itself, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _public(name)
            super().__setitem__(name, value)

    def _public(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace holds no {name!r}")

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Said, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_refuse, strftime_now=_strftime_now, namespace=Values, dict=lambda *a, **kw: dict(*a, **kw)
    )
    return environment


class _Refused(ValueError):
    """What a template raised."""


def _refuse(message: str) -> None:
    raise _Refused(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
