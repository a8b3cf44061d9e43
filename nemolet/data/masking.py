"""Text with holes, for masked-language-model pre-training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemolet.data.corpus import Corpus, PreparedCorpus, TokenizerSpec
from nemolet.data.loader import TokenLoader, ValidationLoader
from nemolet.data.packing import Blend, PackedTokens, Sample, Sampler
from nemolet.data.prepared import Batch, Loader, Progress, Unit, lasting
from nemolet.errors import DataError
from nemolet.rules import check_settings
from nemolet.tokenizers import Tokenizer
from nemolet.types import IGNORED

_NAMES = ("[MASK]", "<mask>")


@dataclass(frozen=True)
class MaskedText:
    """Text in which some tokens are hidden and have to be guessed (Devlin et al., 2019; final).

    Of the chosen tokens 80% become the mask, 10% a random token, and 10% stay. What is chosen depends on the number of
    the sample alone, so that a run resumes exactly.

    Args:
        text: where it lies and how it is cut.
        share: of the tokens that are chosen.
        seed: of the order and of the choice; None for 0, or for the seed of a run.
    """

    text: Corpus = field(default_factory=Corpus)
    share: float = 0.15
    seed: int | None = None

    __buildable__ = True
    CONFIG_RULES = (("share > 0 and share < 1", "the share of hidden tokens is between 0 and 1"),)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def typical(self) -> Mapping[str, int]:
        """Sizes of a batch."""
        return self.text.typical

    def prepare(
        self, tokenizer: TokenizerSpec | Tokenizer, *, progress: Progress | None = None, split: bool = True
    ) -> PreparedMasked:
        """Tokenise and split; see :meth:`nemolet.data.Corpus.prepare`.

        Raises:
            DataError: for bad text, or a tokenizer without a mask token.
        """
        text = replace(self.text, respect_documents=False, seed=self.seed or self.text.seed)
        prepared = text.prepare(tokenizer, progress=progress, split=split)
        return PreparedMasked(self, prepared, mask_token(prepared.tokenizer))


def mask_token(tokenizer: Tokenizer) -> int:
    """The id of the mask.

    Raises:
        DataError: where the tokenizer has none.
    """
    for name in _NAMES:
        if name in tokenizer.special_tokens:
            return tokenizer.special_tokens[name]
    raise DataError(
        "the tokenizer has no mask token",
        where="tokenizer.special_tokens",
        expected=" or ".join(_NAMES),
        found=", ".join(tokenizer.special_tokens) or "no special tokens",
        fix='set tokenizer.special_tokens=["<mask>"]',
    )


@dataclass(frozen=True)
class PreparedMasked:
    """Masked text, ready to be learned from (final)."""

    source: MaskedText
    text: PreparedCorpus
    mask: int
    fields = ("tokens", "labels")
    unit = Unit("tokens")

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the text."""
        return self.text.tokenizer

    @property
    def sizes(self) -> Mapping[str, int]:
        """What a model has to know."""
        return self.text.sizes

    @property
    def summary(self) -> str:
        """For a card."""
        return f"{self.text.summary}, {self.source.share:.0%} masked"

    @property
    def identity(self) -> dict[str, Any]:
        """That of the text, with what is hidden."""
        return {**self.text.identity, **lasting(self.source)}

    def derived(self, valid_loss: float) -> dict[str, float]:
        """A loss per hidden token has no second name."""
        return {}

    def train_loader(self, *, rank: int = 0, ranks: int = 1) -> Loader:
        """Batches without end."""
        return TokenLoader(self._masked(self.text.train_loader().samples), **self._share(rank, ranks))

    def valid_loader(self, *, rank: int = 0, ranks: int = 1, max_batches: int | None = None) -> Iterable[Batch]:
        """Every validation sequence once, always with the same holes."""
        sampler = self._masked(self.text.valid_sampler(tail=False))
        return ValidationLoader(sampler, max_batches=max_batches, **self._share(rank, ranks))

    def _share(self, rank: int, ranks: int) -> dict[str, Any]:
        return {"batch_size": self.source.text.batch_size, "rank": rank, "ranks": ranks}

    def _masked(self, sampler: Sampler | PackedTokens | Blend) -> MaskedSampler:
        return MaskedSampler(
            sampler,
            mask=self.mask,
            vocab_size=self.tokenizer.vocab_size,
            share=self.source.share,
            spared=frozenset(self.tokenizer.special_tokens.values()),
            seed=self.source.seed or 0,
        )


class MaskedSampler:
    """Samples with holes, each a function of its number (final).

    Args:
        sampler: of whole sequences.
        mask: id of the mask.
        vocab_size: from which random tokens are drawn.
        share: of the tokens that are chosen.
        spared: ids that are never chosen.
        seed: of the choice.
    """

    def __init__(
        self, sampler: Sampler, *, mask: int, vocab_size: int, share: float, spared: frozenset[int], seed: int
    ) -> None:
        self.inner, self.mask, self.vocab_size, self.share, self.seed = sampler, mask, vocab_size, share, seed
        self.spared = np.array(sorted(spared), np.int64)
        self.size = sampler.size

    def sample(self, number: int) -> Sample:
        """A sequence with holes, and the hidden tokens as labels where they are to be guessed."""
        whole = self.inner.sample(number)
        random = np.random.default_rng([self.seed, number])
        tokens: NDArray[np.int64] = whole.tokens.copy()
        chosen = (random.random(len(tokens)) < self.share) & ~np.isin(tokens, self.spared)
        labels = np.where(chosen, whole.tokens, IGNORED)
        fate = random.random(len(tokens))
        tokens[chosen & (fate < 0.8)] = self.mask
        swapped = chosen & (fate >= 0.9)
        tokens[swapped] = random.integers(0, self.vocab_size, int(swapped.sum()))
        return Sample(tokens, labels, None, None)
