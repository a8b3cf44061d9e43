"""From what a config says about data to a tokenizer and two loaders."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from nemolet.data.embedded import EmbeddedText
from nemolet.data.indexed import IndexedTokens
from nemolet.data.loader import TokenLoader, ValidationLoader
from nemolet.data.packing import Blend, Chain, PackedTokens, Sampler, shares
from nemolet.data.prepared import Progress, Unit, lasting
from nemolet.data.sources import BlendedText, InvalidUTF8, Pieces, TextFiles
from nemolet.data.splits import Split, set_aside, whole
from nemolet.data.tokenization import tokenize
from nemolet.errors import DataError
from nemolet.rules import Checked
from nemolet.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    PhoneTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
    save_tokenizer,
)
from nemolet.types import IGNORED


@dataclass(frozen=True)
class TokenizerSpec(Checked):
    """Which tokenizer to load, or to train from the data.

    Args:
        kind: ``"sentencepiece"``, ``"char"``, ``"word"``, ``"phone"``, ``"byte"``, or ``"file"`` for an existing one.
        path: of an existing one, or of the pronouncing dictionary of phones.
        vocab_size: of a trained SentencePiece model.
        model: its algorithm.
        special_tokens: further special tokens.
        byte_fallback: whether characters that were not seen are written as bytes (characters only).
        stress: whether vowels keep their stress (phones only).
        unknown: what a word is that the dictionary lacks: an error, or one phone for noise (phones only).
    """

    kind: Literal["sentencepiece", "char", "word", "phone", "byte", "file"] = "sentencepiece"
    path: str | None = None
    vocab_size: int = 1024
    model: Literal["bpe", "unigram"] = "bpe"
    special_tokens: tuple[str, ...] = ()
    byte_fallback: bool = False
    stress: bool = False
    unknown: Literal["error", "noise"] = "error"

    CONFIG_RULES = (
        ("kind != 'file' or path is not None", "kind=file needs a path"),
        ("kind != 'phone' or path is not None", "kind=phone needs the path of a pronouncing dictionary"),
        ("kind == 'phone' or stress == False and unknown == 'error'", "stress and unknown are settings of phones"),
        ("len(path) > 0", "path is empty; null for none"),
        (
            "kind != 'sentencepiece' or vocab_size > 259 + len(special_tokens)",
            "vocab_size holds 256 bytes, <unk>, </s>, the line end, the special tokens and some characters",
        ),
        ("kind == 'sentencepiece' or len(special_tokens) == 0", "only sentencepiece is trained with special_tokens"),
        ("kind == 'char' or byte_fallback == False", "byte_fallback is a setting of characters"),
    )

    @property
    def expected_size(self) -> int | None:
        """How many tokens it will have, where that is known before the text is read."""
        return {"sentencepiece": self.vocab_size, "byte": ByteTokenizer().vocab_size}.get(self.kind)

    def make(self, source: Pieces) -> Tokenizer:
        """Load or train it."""
        return self.make_of_texts(piece.text for piece in source.pieces())

    def make_of_texts(self, texts: Iterable[str]) -> Tokenizer:
        """Load it, or train it from texts."""
        if self.kind == "byte":
            return ByteTokenizer()
        if self.kind == "file":
            if self.path is None:
                raise DataError("the tokenizer's path is missing", where="tokenizer.path", fix="set tokenizer.path=...")
            return load_tokenizer(self.path)
        if self.kind == "char":
            return CharTokenizer.train(texts, byte_fallback=self.byte_fallback)
        if self.kind == "word":
            return WordTokenizer.train(texts)
        if self.kind == "phone":
            return PhoneTokenizer.read(self.path or "", stress=self.stress, unknown=self.unknown)
        return SentencePieceTokenizer.train(
            texts, vocab_size=self.vocab_size, model=self.model, special_tokens=self.special_tokens
        )


@dataclass(frozen=True)
class Corpus(Checked):
    """Text for training a language model (final). Tokens are made once and kept in a cache.

    Args:
        path: a file, a folder, a token file (``.bin``), or a mapping from such paths to weights; None for the
            text that Python carries.
        valid_path: text for validation; None sets part of ``path`` aside.
        valid_fraction: how much is set aside: whole documents where there are many, else the end of the text.
        sequence_length: T; None where the one who asks knows the model, as ``nemolet evaluate`` does.
        batch_size: sequences per rank and step.
        order: how sequences are cut and shuffled; see :class:`nemolet.data.PackedTokens`.
        respect_documents: whether attention stays inside documents.
        text_key: where the text lies in a JSON record.
        invalid_utf8: what to do with bytes that are no UTF-8.
        max_line_bytes: longest line of a JSON lines file.
        workers: processes that tokenise.
        cache: folder for tokens; None for ``$NEMOLET_CACHE`` or ``~/.cache/nemolet``.
        seed: of the order; None for 0, or for the seed of a run.
    """

    path: str | dict[str, float] | None = None
    valid_path: str | None = None
    valid_fraction: float = 0.05
    sequence_length: int | None = 256
    batch_size: int = 16
    order: Literal["shuffled", "sequential", "random"] = "shuffled"
    respect_documents: bool = True
    text_key: str = "text"
    invalid_utf8: InvalidUTF8 = "error"
    max_line_bytes: int = 1 << 26
    workers: int = 1
    cache: str | None = None
    seed: int | None = None

    __buildable__ = True
    FREE = ("path", "valid_path", "workers", "cache")
    CONFIG_RULES = (
        ("sequence_length >= 1 and batch_size >= 1", "sequence_length and batch_size are at least 1"),
        ("valid_fraction > 0 and valid_fraction < 1", "valid_fraction is a share between 0 and 1"),
        ("workers >= 1", "workers is at least 1"),
        ("max_line_bytes >= 1", "max_line_bytes is at least 1"),
        ("len(path) > 0", "path is empty; null for the text that Python carries"),
        ("min(path) > 0", "the weights of a blend are above 0; leave out what is not to be read"),
        ("len(valid_path) > 0", "valid_path is empty; null sets part of path aside"),
        ("seed >= 0", "seed is at least 0"),
    )

    @property
    def typical(self) -> dict[str, int]:
        """Sizes of a batch."""
        return {"B": self.batch_size, "T": self.length}

    @property
    def length(self) -> int:
        """T, once it is known."""
        if self.sequence_length is None:
            raise DataError(
                "the length of sequences is not known",
                where="data.sequence_length",
                expected="a number",
                found="null",
                fix="set data.sequence_length=256, or what the model's context is",
            )
        return self.sequence_length

    def prepare(
        self, tokenizer: TokenizerSpec | Tokenizer, *, progress: Progress | None = None, split: bool = True
    ) -> PreparedCorpus:
        """Tokenise what is not in the cache, and split it.

        Args:
            tokenizer: one, or what to make one of.
            progress: makes a bar from a title and a number of bytes; returns what advances it.
            split: set a part aside for validation; otherwise all of the text is for training and for validation.

        Raises:
            DataError: for bad input, naming file and line.
        """
        weights = self._weights()
        shares(list(weights.values()))  # before anything is read
        chosen = tokenizer if isinstance(tokenizer, Tokenizer) else self._tokenizer(tokenizer)
        train: list[Split] = []
        valid: list[Split] = []
        for path in weights:
            tokens = self._tokens(path, chosen, progress)
            if not split:
                kept, aside = whole(tokens, chosen), whole(tokens, chosen)
            elif self.valid_path:
                kept, aside = whole(tokens, chosen), None
            else:
                kept, aside = set_aside(tokens, self.valid_fraction, chosen)
            train.append(kept)
            if aside is not None:
                valid.append(aside)
        if self.valid_path and split:
            valid.append(whole(self._tokens(self.valid_path, chosen, progress), chosen))
        return PreparedCorpus(self, chosen, tuple(train), tuple(valid), tuple(weights.values()))

    def _source(self, *paths: str | None) -> EmbeddedText | TextFiles:
        named = [path for path in paths if path is not None]
        if not named:
            return EmbeddedText()
        return TextFiles(named, self.text_key, self.invalid_utf8, self.max_line_bytes)

    def _weights(self) -> Mapping[str | None, float]:
        """Paths and their weights."""
        return cast("Mapping[str | None, float]", self.path) if isinstance(self.path, Mapping) else {self.path: 1.0}

    def _tokenizer(self, spec: TokenizerSpec) -> Tokenizer:
        if spec.kind in ("byte", "file", "phone"):
            return spec.make(EmbeddedText())
        weights = self._weights()
        tokens = next((path for path in weights if path is not None and _is_tokens(path)), None)
        if tokens is not None:
            raise DataError(
                "a token file cannot train a tokenizer",
                where="tokenizer",
                expected="tokenizer=file",
                found=f"tokenizer.kind={spec.kind}, data.path={tokens}",
                fix="name the tokenizer the tokens were made with: tokenizer=file tokenizer.path=...",
            )
        source: Pieces = self._source(*weights)  # a set of characters or words asks for no shares
        if spec.kind == "sentencepiece":
            source = BlendedText([self._source(path) for path in weights], list(weights.values()))
        key = [_identity(self._source(*weights)), list(weights.items()), asdict(spec)]
        return load_tokenizer(self._cached("tokenizer", key, lambda target: save_tokenizer(spec.make(source), target)))

    def _tokens(self, path: str | None, tokenizer: Tokenizer, progress: Progress | None) -> IndexedTokens:
        if path is not None and _is_tokens(path):
            return _fitting(IndexedTokens(path), tokenizer)
        source = self._source(path)

        def make(target: Path) -> None:
            update = progress(f"tokenise {path or 'embedded text'}", source.total_bytes()) if progress else None
            tokenize(source, target / "tokens", tokenizer, workers=self.workers, progress=update)

        return IndexedTokens(self._cached("tokens", [_identity(source), tokenizer.fingerprint], make) / "tokens")

    def _cached(self, name: str, key: list[Any], make: Callable[[Path], None]) -> Path:
        """A folder that ``make`` filled once, for ever; it appears only when it is complete."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:20]
        root = Path(self.cache or os.environ.get("NEMOLET_CACHE") or Path.home() / ".cache" / "nemolet")
        folder = root / f"{name}-{digest}"
        if folder.is_dir():
            return folder
        root.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        try:
            make(partial)
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster, with the same result
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus with its tokenizer, ready to be read."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: tuple[Split, ...]
    valid: tuple[Split, ...]
    weights: tuple[float, ...]

    def train_loader(self, *, rank: int = 0, ranks: int = 1) -> TokenLoader:
        """Batches without end."""
        parts: list[Sampler] = [self._packed(split, self.corpus.order) for split in self.train]
        sampler = parts[0] if len(parts) == 1 else Blend(parts, self.weights)
        return TokenLoader(sampler, batch_size=self.corpus.batch_size, rank=rank, ranks=ranks)

    def valid_loader(self, *, rank: int = 0, ranks: int = 1, max_batches: int | None = None) -> ValidationLoader:
        """Every validation token once, in order."""
        return ValidationLoader(
            self.valid_sampler(), batch_size=self.corpus.batch_size, rank=rank, ranks=ranks, max_batches=max_batches
        )

    def valid_sampler(self, *, tail: bool = True) -> Sampler:
        """The text for validation, file after file; with ``tail``, the rest of each that fills no whole sequence."""
        parts = [self._packed(split, "sequential", tail=tail) for split in self.valid]
        return parts[0] if len(parts) == 1 else Chain(parts)

    @property
    def fields(self) -> tuple[str, ...]:
        """The entries of a batch: documents are told apart where there are several."""
        several = any(len(split.lengths) > 1 for split in (*self.train, *self.valid))
        numbered = self.corpus.respect_documents and several
        return ("tokens", "labels", "segments", "positions") if numbered else ("tokens", "labels")

    @property
    def unit(self) -> Unit:
        """Progress is counted in tokens."""
        return Unit("tokens")

    @property
    def sizes(self) -> dict[str, int]:
        """What a model has to know."""
        return {"vocab_size": self.tokenizer.vocab_size}

    @property
    def summary(self) -> str:
        """For a card."""
        total = int(sum(split.lengths.sum() for split in self.train))
        return f"{self.corpus.path or 'the text that Python carries'} ({total:,} tokens)"

    @property
    def identity(self) -> dict[str, Any]:
        """Settings and ids."""
        parts = {"train": self.train, "valid": self.valid}
        digests = {name: [split.digest for split in splits] for name, splits in parts.items()}
        return {**lasting(self.corpus), "weights": list(self.weights), **digests}

    def derived(self, valid_loss: float) -> dict[str, float]:
        """A loss per token is also so many bits per byte, which do not depend on the tokenizer."""
        return {"bits_per_byte": valid_loss / math.log(2) / self.valid_bytes_per_token}

    @functools.cached_property
    def valid_bytes_per_token(self) -> float:
        """UTF-8 bytes that a predicted validation token stands for, on average; for bits per byte.

        Of a large text it is measured on sequences spread evenly over it.
        """
        sampler = self.valid_sampler()
        most = max(1, _MEASURED // self.corpus.length)
        tokens = size = 0
        for number in np.unique(np.linspace(0, sampler.size - 1, min(most, sampler.size)).astype(np.int64)).tolist():
            labels = sampler.sample(number).labels
            predicted = labels[labels != IGNORED]
            tokens, size = tokens + len(predicted), size + self.tokenizer.count_bytes(predicted.tolist())
        if not size:
            raise DataError(
                "the text for validation holds nothing to predict",
                where="data",
                found=f"{tokens} tokens of {size} bytes",
                expected="at least a few words",
                fix="use more text, raise data.valid_fraction, or set data.valid_path",
            )
        return size / tokens

    def _packed(
        self, split: Split, order: Literal["shuffled", "sequential", "random"], *, tail: bool = False
    ) -> PackedTokens:
        return PackedTokens(
            split.tokens,
            split.starts,
            split.lengths,
            sequence_length=self.corpus.length,
            order=order,
            seed=self.corpus.seed or 0,
            opener=self.tokenizer.opener,
            led=split.led,
            respect_documents=self.corpus.respect_documents,
            tail=tail,
        )


_MEASURED = 1 << 22  # tokens whose bytes are counted
_BLOCK, _BLOCKS = 1 << 20, 64  # ids that are looked at together, and how many such blocks


def _is_tokens(path: str) -> bool:
    return Path(path).suffix in (".bin", ".idx")


def _fitting(tokens: IndexedTokens, tokenizer: Tokenizer) -> IndexedTokens:
    """Refuse ids that the tokenizer does not have; of a large file, blocks spread evenly over it are looked at."""
    ids = tokens.tokens
    blocks = -(-len(ids) // _BLOCK)
    chosen = np.unique(np.linspace(0, blocks - 1, min(blocks, _BLOCKS)).astype(np.int64))
    largest = max(int(ids[n * _BLOCK : (n + 1) * _BLOCK].max()) for n in chosen.tolist())
    if largest >= tokenizer.vocab_size:
        raise DataError(
            "the tokens are outside the vocabulary",
            where=str(tokens.prefix),
            found=f"id {largest}",
            expected=f"ids below {tokenizer.vocab_size}",
            fix="name the tokenizer the tokens were made with",
        )
    return tokens


def _identity(source: EmbeddedText | TextFiles) -> Any:
    """What tells this text from another: settings, and path, size and time of each file."""
    if isinstance(source, EmbeddedText):
        import platform

        return ["embedded", asdict(source), platform.python_version()]
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in source.files()]
    return [stats, source.text_key, source.invalid_utf8, source.max_line_bytes]
