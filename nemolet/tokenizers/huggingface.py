"""``tokenizer.json`` files of Hugging Face."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from nemolet.errors import TokenizerError, needs
from nemolet.tokenizers.base import StreamDecoder, Tokenizer, WindowStream

_EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer in the format of the ``tokenizers`` library (extra ``hf``; final).

    Whether any text comes back exactly depends on the file: byte-level models do it, others normalise.

    Args:
        content: the bytes of a ``tokenizer.json``.
        bos: text of the token that begins a document; None for the one that the file's own template puts before a
            text, if it puts one: that a token looks like a beginning does not mean that the model was trained with it.
        eos: text of the token that ends one; None looks for a usual one.

    Raises:
        TokenizerError: for another file, or a token that it lacks.
    """

    kind: ClassVar[str] = "huggingface"
    lossless = False

    def __init__(self, content: bytes, *, bos: str | None = None, eos: str | None = None) -> None:
        with needs("tokenizers", extra="hf"):
            import tokenizers

        try:
            self.inner = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # of Rust, which raises plain Exception; kept as the cause
            raise TokenizerError(
                "this is no tokenizer.json",
                where="HuggingFaceTokenizer",
                expected="what the tokenizers library writes",
                found=str(error)[:200],
                fix="pass the tokenizer.json of a Hugging Face model",
            ) from error
        # Which special tokens a document gets is said by the caller, as for every tokenizer here.
        self.inner.no_truncation()
        self.inner.no_padding()
        self.inner.encode_special_tokens = True
        self.content, self._bos, self._eos = content, bos, eos
        self.vocab_size = max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = self.inner.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in added.items() if token.special}
        before, _ = self._template
        usual = next((self.special_tokens[text] for text in _EOS if text in self.special_tokens), None)
        self.bos_id = next(iter(before), None) if bos is None else self._named(bos)
        self.eos_id = usual if eos is None else self._named(eos)

    def _named(self, name: str) -> int:
        if name not in self.special_tokens:
            raise TokenizerError(
                "no such special token",
                where="HuggingFaceTokenizer",
                expected=", ".join(self.special_tokens) or "a special token",
                found=name,
            )
        return self.special_tokens[name]

    @functools.cached_property  # it is asked for with each text
    def _template(self) -> tuple[list[int], list[int]]:
        """What the file's own template puts before and after a text."""
        text = "a"
        if type(self.inner.model).__name__ == "WordLevel":  # which may refuse any other word
            words = self.inner.get_vocab(with_added_tokens=False)
            text = next((word for word in words if word not in self.special_tokens), "")
        found = self.inner.encode(text, add_special_tokens=True)
        own = [place for place, added in enumerate(found.special_tokens_mask) if not added]
        return found.ids[: own[0]] if own else found.ids, found.ids[own[-1] + 1 :] if own else []

    @property
    def opener(self) -> int | None:
        """What the file's own template puts before a text (GPT-2: nothing), so that a converted model reads what it
        was trained on; of a file without one its beginning-of-text token."""
        before, _ = self._template
        return self.bos_id if self.inner.post_processor is None else next(iter(before), None)

    @property
    def marks(self) -> tuple[list[int], list[int]]:
        return super().marks if self.inner.post_processor is None else self._template

    @property
    def between(self) -> list[int]:
        if self.inner.post_processor is None:
            return super().between
        found = self.inner.encode("a", "a", add_special_tokens=True)
        own = [place for place, added in enumerate(found.special_tokens_mask) if not added]
        if len(own) < 2 or len(own) == len(found.ids):  # the file says nothing of pairs
            return super().between
        return found.ids[own[0] + 1 : own[-1]]

    def stream(self) -> StreamDecoder:
        return WindowStream(self)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.content}

    def settings(self) -> dict[str, Any]:
        return {"bos": self._bos, "eos": self._eos}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], **settings: Any) -> HuggingFaceTokenizer:
        return cls(files["tokenizer.json"], **settings)

    def _encode(self, text: str) -> list[int]:
        return self._ids(self.inner, text)

    def _encode_special(self, text: str) -> list[int]:
        """As the file says: a special token may take the spaces around it, and what follows it begins no text."""
        return self._ids(self._reader, text)

    @functools.cached_property
    def _reader(self) -> Any:
        """A second one, as which of the two is done is a state of it, and threads may share this one."""
        reader = type(self.inner).from_buffer(self.content)
        reader.no_truncation()
        reader.no_padding()
        reader.encode_special_tokens = False
        return reader

    def _ids(self, inner: Any, text: str) -> list[int]:
        try:
            ids: list[int] = inner.encode(text, add_special_tokens=False).ids
        except Exception as error:  # of Rust, which raises plain Exception; kept as the cause
            raise TokenizerError(
                "this text has no ids",
                where=f"{self.kind} tokenizer",
                expected="words of the vocabulary, which has none for others",
                found=f"{text[:60]!r}: {error}",
            ) from error
        return ids

    def _decode(self, tokens: list[int], special: bool) -> str:
        return self.inner.decode(tokens, skip_special_tokens=not special)
