"""Tokens that a folder declares beside its vocabulary: which there are, what they are for, and which ids they get."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemolet.convert.folder import Folder, parse
from nemolet.errors import ConversionError
from nemolet.tokenizers.tokenizer_json import Part, added_token

SETTINGS, SPECIAL_TOKENS, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FURTHER = ("extra_special_tokens", "additional_special_tokens")


@dataclass(frozen=True)
class DeclaredTokens:
    """What the small files of a folder say about tokens.

    Args:
        where: the folder.
        settings: how the tokenizer is made, with the tokens that have a name, such as ``eos_token``.
        numbered: tokens with the ids that they must have.
        room: ids that the model knows; a token that only has a name gets none beyond, such as padding that was named
            for a model that never saw it.
    """

    where: Path
    settings: Mapping[str, Any]
    numbered: Mapping[int, Part]
    room: int

    @classmethod
    def by(cls, folder: Folder, room: int) -> DeclaredTokens:
        """Read them as transformers does: ids in the settings count, else those of the two older files.

        Raises:
            ConversionError: for a broken file.
        """
        files = {
            name: parse(folder.carried.get(name, b"{}"), folder.path / name)
            for name in (SETTINGS, SPECIAL_TOKENS, ADDED)
        }
        settings = files[SETTINGS]
        try:
            if "added_tokens_decoder" in settings:
                found = {int(index): _token(token) for index, token in settings["added_tokens_decoder"].items()}
            else:
                settings = settings | files[SPECIAL_TOKENS]
                special = {text_of(settings.get(key)) for key in _NAMES} | {text_of(t) for t in _further(settings)}
                found = {
                    int(index): {**added_token(0, text, special=text in special), "normalized": text not in special}
                    for text, index in files[ADDED].items()
                }
            declared = cls(folder.path, settings, found, room)
            _ = declared.texts  # which each of them has
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConversionError(
                "the files do not say which tokens were added",
                where=str(folder.path),
                expected="texts and their ids in added_tokens.json, or descriptions by id in tokenizer_config.json",
                found=repr(error)[:200],
                fix="download or copy the folder again",
            ) from error
        return declared

    @property
    def texts(self) -> set[str]:
        """Of all tokens that are declared."""
        named = (self.settings[key] for key in _NAMES if self.settings.get(key))
        return {_token(token)["content"] for token in (*self.numbered.values(), *named, *_further(self.settings))}

    def named(self, key: str, usual: str | None = None) -> str | None:
        """The text of a token with a name; a name that is declared as null has none."""
        return text_of(self.settings[key]) if key in self.settings else usual

    def flag(self, key: str, usual: bool | None = False) -> bool | None:
        """A setting that is on or off; null says nothing.

        Raises:
            ConversionError: for another value.
        """
        value = self.settings.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.impossible(key, "true or false")
        return usual if value is None else value

    def count(self, key: str, usual: int) -> int:
        """A number of tokens; null says nothing.

        Raises:
            ConversionError: for another value, or more than the model knows.
        """
        value = self.settings.get(key)
        if value is not None and not (type(value) is int and 0 <= value <= self.room):
            raise self.impossible(key, f"a whole number from 0 to {self.room}, which is what the model knows")
        return usual if value is None else value

    def impossible(self, key: str, expected: str) -> ConversionError:
        """What is wrong with a setting."""
        return ConversionError(
            "a setting of the tokenizer is impossible",
            where=f"{self.where / SETTINGS}: {key}",
            expected=expected,
            found=json.dumps(self.settings[key])[:200],
            fix="take the settings of the tokenizer from where its vocabulary comes from",
        )

    def added_to(self, content: Part, usual: Mapping[str, str] | None = None) -> Part:
        """A ``tokenizer.json`` with these tokens, in the order in which transformers adds them.

        Args:
            content: without them.
            usual: the tokens with a name that the class of the tokenizer has where nothing is declared.

        Raises:
            ConversionError: for a token that would not get the id that is declared for it.
        """
        ids, added = _ids(content), {token["content"] for token in content["added_tokens"]}
        wanted: list[tuple[int | None, Part]] = [(index, self.numbered[index]) for index in sorted(self.numbered)]
        names = {**(usual or {}), **{key: self.settings[key] for key in _NAMES if key in self.settings}}
        wanted += [(None, _token(token)) for token in (*names.values(), *_further(self.settings)) if token]
        new, free = [], 1 + max(ids.values(), default=-1)
        for declared, token in wanted:
            text = token["content"]
            if declared is None and text not in ids and free >= self.room:
                continue
            index = ids.setdefault(text, free)
            free = max(free, index + 1)
            if declared not in (None, index):
                raise self._misplaced(text, declared, index)
            if text not in added:
                new.append({**token, "id": index})
                added.add(text)
        both = sorted([*content["added_tokens"], *new], key=lambda token: token["id"])
        return {**content, "added_tokens": both} if new else content

    def _misplaced(self, text: str, declared: int | None, index: int) -> ConversionError:
        return ConversionError(
            "an added token has another id than the folder says",
            where=str(self.where),
            expected=f"{text!r} as {declared}",
            found=f"{index}, by the vocabulary and the tokens before it",
            fix="take the vocabulary and the tokens that were added to it from one place",
        )


def text_of(token: Any) -> str | None:
    """The text of a token that is declared as one, or as a description of one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _token(token: Any) -> Part:
    if isinstance(token, str):
        return added_token(0, token, special=True)
    known = added_token(0, token["content"], special=bool(token.get("special", True)))
    return {
        **known,
        **{key: bool(token[key]) for key in ("single_word", "lstrip", "rstrip", "normalized") if key in token},
    }


def _further(settings: Mapping[str, Any]) -> list[Any]:
    found: Any = next((settings[key] for key in _FURTHER if settings.get(key)), [])
    return [*found.values()] if isinstance(found, dict) else list(found)


def _ids(content: Part) -> dict[str, int]:
    """Ids of all tokens, of a vocabulary in either form."""
    vocab = content["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {piece[0]: index for index, piece in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in content["added_tokens"]}


def as_bytes(content: Part) -> bytes:
    """The file."""
    return json.dumps(content, ensure_ascii=False).encode()
