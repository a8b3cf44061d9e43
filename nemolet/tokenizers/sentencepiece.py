"""SentencePiece, trained here so that every text comes back exactly."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import sentencepiece

from nemolet.errors import TokenizerError
from nemolet.tokenizers.base import StreamDecoder, TableTokenizer, WindowStream
from nemolet.tokenizers.sentencepiece_model import with_exact_scores

_SPACE = "\u2581"  # how sentencepiece writes a space
_LONGEST = 4000  # bytes of a training sentence; sentencepiece leaves out longer ones


class SentencePieceTokenizer(TableTokenizer):
    """Subwords by SentencePiece (Kudo and Richardson, 2018; final).

    A model trained by :meth:`train` changes no character and falls back to bytes, so it is lossless; one
    that was trained elsewhere may normalise text.

    Args:
        model: a serialized SentencePiece model.
        lossless: whether any text comes back exactly, as with models trained here.
        independent_lines: whether lines are encoded one by one, as with models trained here, of which a line end is
            always a token of its own.

    Raises:
        TokenizerError: for bytes that are no model.

    Example:
        >>> tokenizer = SentencePieceTokenizer.train(["to be or not to be"] * 9, vocab_size=270)
        >>> tokenizer.decode(tokenizer.encode("né\\u2581 to  be\\n"))
        'né▁ to  be\\n'
    """

    kind: ClassVar[str] = "sentencepiece"

    def __init__(self, model: bytes, *, lossless: bool = False, independent_lines: bool = False) -> None:
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = self.processor.get_piece_size()
        except RuntimeError as error:
            raise TokenizerError(
                "these bytes are no SentencePiece model",
                where="SentencePieceTokenizer",
                found=f"{len(model)} bytes",
                fix="pass a file that ends in .model",
            ) from error
        if not self.vocab_size:
            raise TokenizerError("the SentencePiece model is empty", where="SentencePieceTokenizer")
        self.model, self.independent_lines, processor = model, independent_lines, self.processor
        self.table = [_bytes_of(processor, i) for i in range(self.vocab_size)]
        self.lossless = lossless
        specials = [i for i in range(self.vocab_size) if processor.is_control(i) or processor.is_unknown(i)]
        self.special_tokens = {processor.id_to_piece(i): i for i in specials}
        self.bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
        self.eos_id = processor.eos_id() if processor.eos_id() >= 0 else None
        self._bytes = {processor.id_to_piece(i): i for i in range(self.vocab_size) if processor.is_byte(i)}
        self._space_mark = [self._bytes.get(f"<0x{value:02X}>", processor.unk_id()) for value in _SPACE.encode()]

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int,
        model: Literal["bpe", "unigram"] = "bpe",
        special_tokens: Sequence[str] = (),
        character_coverage: float = 1.0,
        max_bytes: int = 50_000_000,
        threads: int = 1,
    ) -> SentencePieceTokenizer:
        """Learn subwords from texts.

        Args:
            texts: the texts; documents of any length.
            vocab_size: number of ids, of which 256 are bytes.
            model: byte-pair encoding or a unigram model.
            special_tokens: further special tokens, beside ``<unk> </s>``.
            character_coverage: share of characters that get an id of their own; others are bytes.
            max_bytes: how much text is looked at, from the beginning.
            threads: of the trainer.

        Raises:
            TokenizerError: for a vocabulary that the text cannot fill, or no text.
        """
        least = 256 + 2 + 1 + len(special_tokens)
        if vocab_size <= least:
            raise TokenizerError(
                "the vocabulary is too small",
                where="tokenizer.vocab_size",
                found=vocab_size,
                expected=f"more than {least}: 256 bytes, {least - 257} special tokens, the line end, characters",
                fix="set tokenizer.vocab_size=512, or choose tokenizer=byte",
            )
        target, sentences = io.BytesIO(), _sentences(texts, max_bytes)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences,
                model_writer=target,
                vocab_size=vocab_size,
                model_type=model,
                character_coverage=character_coverage,
                num_threads=threads,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                split_digits=True,
                allow_whitespace_only_pieces=True,
                unk_id=0,
                bos_id=-1,  # documents are told apart by what ends them
                eos_id=1,
                user_defined_symbols=["\n"],
                control_symbols=list(special_tokens),
                max_sentence_length=_LONGEST + 8,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise _explain(error, vocab_size) from error
        learned = target.getvalue()
        return cls(with_exact_scores(learned) if model == "unigram" else learned, lossless=True, independent_lines=True)

    def files(self) -> dict[str, bytes]:
        return {"sentencepiece.model": self.model}

    def settings(self) -> dict[str, Any]:
        return {"lossless": self.lossless, "independent_lines": self.independent_lines}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], **settings: Any) -> SentencePieceTokenizer:
        return cls(files["sentencepiece.model"], **settings)

    def stream(self) -> StreamDecoder:
        return super().stream() if self.lossless else WindowStream(self)

    def _decode(self, tokens: list[int], special: bool) -> str:
        if self.lossless:
            return super()._decode(tokens, special)
        if not special:  # a model of others decides about spaces, and about what it does not know
            return self.processor.decode(tokens)  # type: ignore[no-any-return]
        parts = [(c, list(run)) for c, run in itertools.groupby(tokens, key=self.processor.is_control)]
        return "".join(
            "".join(map(self.processor.id_to_piece, run)) if control else self.processor.decode(run)
            for control, run in parts
        )

    def _encode(self, text: str) -> list[int]:
        if not self.lossless:  # a model of others decides what the character means by which it writes a space
            return self.processor.encode(text)  # type: ignore[no-any-return]
        if _SPACE not in text:
            return self._plain(text)
        ids: list[int] = []  # written as bytes, so that it is not taken for a space
        for index, part in enumerate(text.split(_SPACE)):
            ids += (self._space_mark if index else []) + self._plain(part)
        return ids

    def _plain(self, text: str) -> list[int]:
        if not self.independent_lines or "\n" not in text:
            return self.processor.encode(text)  # type: ignore[no-any-return]
        *lines, rest = text.split("\n")
        return list(itertools.chain.from_iterable(self.processor.encode([*(f"{line}\n" for line in lines), rest])))


def _bytes_of(processor: sentencepiece.SentencePieceProcessor, index: int) -> bytes:
    piece: str = processor.id_to_piece(index)
    return bytes([int(piece[3:5], 16)]) if processor.is_byte(index) else piece.replace(_SPACE, " ").encode()


def _sentences(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Lines of at most ``_LONGEST`` bytes, until the limit."""
    taken = 0
    for text in texts:
        for line in text.splitlines():
            # A character has at most four bytes, so a quarter of the bytes is a safe number of characters.
            for start in range(0, len(line), _LONGEST // 4):
                part = line[start : start + _LONGEST // 4].replace(_SPACE, " ").replace("\0", " ")
                taken += len(part.encode("utf-8", "replace")) + 1
                yield part
                if taken > max_bytes:
                    return


def _explain(error: RuntimeError, vocab_size: int) -> TokenizerError:
    """What the trainer's message means for the caller."""
    text = str(error)
    if high := re.search(r"too high \(\d+\).*?<= (\d+)", text):
        return TokenizerError(
            "the vocabulary is larger than the text supports",
            where="tokenizer.vocab_size",
            found=vocab_size,
            expected=f"at most {high[1]}",
            fix=f"set tokenizer.vocab_size={high[1]}, or train on more text",
        )
    if low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text):
        return TokenizerError(
            "the text has more characters than the vocabulary",
            where="tokenizer.vocab_size",
            found=vocab_size,
            expected=f"more than {low[1]}",
            fix=f"set tokenizer.vocab_size={2 * int(low[1])}, or lower character_coverage",
        )
    return TokenizerError(
        "SentencePiece could not be trained",
        where="tokenizer",
        found=text.splitlines()[-1],
        fix="give it more text" if "sentences" in text else None,
    )
