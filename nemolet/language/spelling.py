"""An encoder of words by how they are written: runs of letters, capitals, and the words beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemolet.language.ngrams import BIG, PRIME, HiddenBUD, MaskBU, Neighbours, run_rows
from nemolet.module import NeuralModule
from nemolet.nn.embedding import Embedding
from nemolet.nn.transformer import Encoder
from nemolet.types import HiddenBTD, MaskBT, PositionsBT, TokenIdsBT

BYTES = 257  # ids of ByteTokenizer: the bytes, and the end of a text
_EDGE = 0  # what runs of letters see before and after a word
_SPACE, _MARK, _SMALL, _CAPITAL, _DIGIT, _FOREIGN = range(6)
_USUAL = 5  # bytes of an English word with its space, where the bytes themselves are not known


def _kind(byte: int) -> int:
    if byte >= 128:
        return _MARK if byte == 256 else _FOREIGN
    letter = chr(byte)
    if letter.isalpha():
        return _CAPITAL if letter.isupper() else _SMALL
    return _SPACE if letter.isspace() else _DIGIT if letter.isdigit() else _MARK


def _counting() -> contextlib.AbstractContextManager[object]:
    """How many words there are stays a number of the graph that is compiled."""
    if not torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True)


class Places(NamedTuple):
    """Where the words of a batch stand among its bytes: B T, the last one B U."""

    word: Tensor  # the number of the word of each byte
    first: Tensor  # where the letters of that word begin
    inside: Tensor  # whether the byte is neither a space nor padding
    last: Tensor  # whether the word ends with it
    real: Tensor  # how many words each text has, as a mask


class SpelledWords(NamedTuple):
    """A vector for each word, and which bytes are its."""

    hidden: HiddenBUD
    real: MaskBU
    word: PositionsBT


class SpelledEmbedding(NeuralModule):
    """A vector for each word, the sum of vectors of its pieces, which share a table by hashing (final).

    The pieces are runs of letters as in fastText (Bojanowski et al., 2017), with the edges of the word; runs of words
    that end with it; and its shape, ``Xx`` for ``Anna`` and ``X-d`` for ``AB-12``. Only shapes see capitals. No word
    is unknown.

    Args:
        width: size of a vector.
        letters: lengths of the runs of letters.
        words: lengths of the runs of words; 1 is the word itself.
        shapes: whether the shape of a word is a piece of it.
        marks: whether a mark such as a comma is a word; otherwise words are what stands between spaces.
        buckets: rows of the table.
        word_dropout: share of words whose vectors are left out, in training.

    Shape: tokens_BT, mask_BT -> hidden_BUD, real_BU, word_BT; weight ``V D``. A space belongs to the word after it.

    Example:
        >>> from nemolet.tokenizers import ByteTokenizer
        >>> embed = SpelledEmbedding(width=4, buckets=64)
        >>> embed(torch.tensor([ByteTokenizer().encode("Is it?")])).word.tolist()
        [[0, 0, 1, 1, 1, 2]]
    """

    def __init__(
        self,
        *,
        width: int,
        letters: Sequence[int] = (2, 3, 4, 5),
        words: Sequence[int] = (1, 2),
        shapes: bool = False,
        marks: bool = True,
        buckets: int = 1 << 16,
        word_dropout: float = 0.0,
        init_std: float = 0.1,
    ) -> None:
        super().__init__(V=BYTES, D=width)
        self.letters, self.words, self.shapes, self.marks = tuple(letters), tuple(words), shapes, marks
        self.buckets, self.word_dropout = buckets, word_dropout
        self.pieces = Embedding("V", "D", buckets, width, init_std=init_std)
        self.kinds: Tensor
        self.symbols: Tensor
        small = [byte + 32 if _kind(byte) == _CAPITAL else byte for byte in range(BYTES)]
        self.register_buffer("kinds", torch.tensor([_kind(byte) for byte in range(BYTES)]), persistent=False)
        self.register_buffer("symbols", torch.tensor(small) + _EDGE + 1, persistent=False)

    def forward(self, tokens: TokenIdsBT, mask: MaskBT | None = None) -> SpelledWords:
        with _counting():
            places = self.places(tokens, mask)
            rows_N, word_N, weight_N = self.rows(tokens, places)
        vectors_ND: Tensor = self.pieces(rows_N[None])[0]
        vectors_ND = vectors_ND * weight_N[:, None].to(vectors_ND.dtype)
        real_BU = places.real
        hidden = vectors_ND.new_zeros(real_BU.numel(), vectors_ND.shape[-1]).index_add(0, word_N, vectors_ND)
        hidden = hidden.unflatten(0, real_BU.shape)
        if self.word_dropout and self.training:
            hidden = hidden * (torch.rand(real_BU.shape, device=hidden.device) >= self.word_dropout)[..., None]
        return SpelledWords(hidden, real_BU, places.word)

    def places(self, tokens_BT: Tensor, mask_BT: Tensor | None = None) -> Places:
        """Where words begin and end."""
        kinds = self.kinds[tokens_BT]
        there = torch.ones_like(kinds, dtype=torch.bool) if mask_BT is None else mask_BT
        before = F.pad(kinds, (1, 0), value=_SPACE)[:, :-1]
        inside = there & (kinds != _SPACE)
        starts = (kinds == _SPACE) & (before != _SPACE)
        if self.marks:
            starts |= inside & (before != _SPACE) & ((kinds == _MARK) | (before == _MARK))
        starts[:, 0] = True
        starts &= there
        word = (starts.cumsum(1) - 1).clamp(min=0)
        begins = inside & (starts | (before == _SPACE))
        at = torch.arange(kinds.shape[1], device=kinds.device)
        first = torch.where(begins, at, 0).cummax(1).values
        goes_on = F.pad(there & ~starts, (0, 1))[:, 1:]
        most = kinds.shape[1] // _USUAL if word.is_meta else int(word.max())
        real = torch.arange(most + 1, device=kinds.device) <= word[:, -1:]
        return Places(word, first, inside, inside & ~goes_on, real)

    def rows(self, tokens_BT: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        """All pieces of a batch: their rows, the numbers of their words in it, and what they count.

        Shape: -> [N], [N], [N].
        """
        symbols, kinds, real = self.symbols[tokens_BT], self.kinds[tokens_BT], places.real
        number = torch.arange(real.numel(), device=real.device).view_as(real)
        ends = [(order, closed) for order in self.letters for closed in (False, True) if order > closed]
        runs = [self._run(symbols, places, *each) for each in ends]
        letters = [(rows, there, number.gather(1, places.word)) for rows, there in runs]
        whole = [run_rows(self._code(symbols, places.inside, places), order, self.buckets) for order in self.words]
        if self.shapes:
            changes = (kinds != F.pad(kinds, (1, 0))[:, :-1]) | (kinds == _MARK) | self._is_first(places)
            shape = torch.where(kinds == _MARK, symbols, kinds + BYTES + 1)
            whole.append(run_rows(self._code(shape, places.inside & changes, places), 1, self.buckets))
        pieces = [*letters, *((rows, real, number) for rows in whole)]
        rows, there, word = (torch.cat([part.flatten() for part in parts]) for parts in zip(*pieces))
        kept_N = torch.nonzero_static(there, size=there.numel() if there.is_meta else int(there.sum()))[:, 0]
        of_letters = there & (torch.arange(len(there), device=there.device) < len(letters) * symbols.numel())
        count = number.new_zeros(number.numel()).index_add(0, word, of_letters.long())
        # The sum of many runs of letters is as long as the vector of one.
        weight = torch.where(of_letters, count[word].clamp(min=1).rsqrt(), 1.0)
        return rows[kept_N], word[kept_N], weight[kept_N]

    def _run(self, symbols_BT: Tensor, places: Places, order: int, closed: bool) -> tuple[Tensor, Tensor]:
        """The row of the run of letters that ends with each byte, or with the edge after it; and where there is one."""
        at = torch.arange(symbols_BT.shape[1], device=symbols_BT.device)
        mixed = torch.full_like(symbols_BT, BYTES + order)  # other than that of any run of words
        reach = order - closed
        if closed:
            mixed = (mixed * PRIME + _EDGE) % BIG
        for back in range(reach):
            shifted = F.pad(symbols_BT, (back, 0))[:, : symbols_BT.shape[1]]
            mixed = (mixed * PRIME + torch.where(at - back >= places.first, shifted, _EDGE)) % BIG
        fits = at - reach + 1 >= places.first - 1  # one edge before the word, not two
        return mixed % self.buckets, fits & (places.last if closed else places.inside)

    def _code(self, symbols_BT: Tensor, counted_BT: Tensor, places: Places) -> Tensor:
        """A number for each word from those of its symbols that count, in their order. Shape: [B, U]."""
        order = counted_BT.cumsum(1)
        order = order - order.gather(1, places.first)
        mixed = (symbols_BT * 4096 + order + 1) * PRIME % BIG
        parts = (mixed * mixed % BIG) * counted_BT
        return parts.new_zeros(places.real.shape).scatter_add(1, places.word, parts) % BIG

    def _is_first(self, places: Places) -> Tensor:
        return places.first == torch.arange(places.first.shape[1], device=places.first.device)


class SpellingEncoder(NeuralModule):
    """Hidden states of a short text, read word by word, for tasks with some thousand examples (final).

    Every byte gets the state of its word, so tags and answers find theirs at any byte of it.

    Args:
        vocab_size: of the tokenizer, which has to be that of bytes.
        width: model width D.
        letters: lengths of the runs of letters that have vectors.
        words: lengths of the runs of words that have.
        shapes: whether capitals, digits and marks are seen.
        marks: whether a mark is a word.
        buckets: rows of the table of vectors.
        neighbours: number of gated convolutions over words.
        reach: how many words each sees to either side.
        layers: number of transformer blocks above them.
        heads: of each.
        dropout: probability, in training.
        word_dropout: share of words that are left out, in training.

    Shape: tokens_BT, mask_BT -> hidden_BTD.

    Example:
        >>> encoder = SpellingEncoder(width=8, buckets=64, layers=1, heads=2)
        >>> encoder(torch.tensor([[72, 105, 256]])).shape
        torch.Size([1, 3, 8])
    """

    CONFIG_RULES: ClassVar = (
        ("vocab_size == 257", "an encoder of spelling reads bytes: tokenizer=byte"),
        ("width >= 1 and buckets >= 1", "width and buckets are at least 1"),
        ("layers == 0 or width % heads == 0", "width must be divisible by heads"),
        ("dropout >= 0 and dropout < 1", "dropout is a probability below 1"),
        ("word_dropout >= 0 and word_dropout < 1", "word_dropout is a share below 1"),
    )

    def __init__(
        self,
        *,
        vocab_size: int = BYTES,
        width: int = 128,
        letters: Sequence[int] = (2, 3, 4, 5),
        words: Sequence[int] = (1, 2),
        shapes: bool = False,
        marks: bool = True,
        buckets: int = 1 << 16,
        neighbours: int = 2,
        reach: int = 1,
        layers: int = 0,
        heads: int = 4,
        dropout: float = 0.1,
        word_dropout: float = 0.0,
    ) -> None:
        super().__init__(V=vocab_size, D=width)
        self.dropout = dropout
        self.embed = SpelledEmbedding(
            width=width,
            letters=letters,
            words=words,
            shapes=shapes,
            marks=marks,
            buckets=buckets,
            word_dropout=word_dropout,
        )
        self.neighbours = nn.ModuleList(
            Neighbours(width=width, reach=reach, dropout=dropout) for _ in range(neighbours)
        )
        self.blocks = Encoder(layers=layers, width=width, heads=heads, dropout=dropout) if layers else None

    def forward(self, tokens: TokenIdsBT, mask: MaskBT | None = None) -> HiddenBTD:
        found: SpelledWords = self.embed(tokens, mask)
        hidden = F.dropout(found.hidden, self.dropout, self.training)
        for layer in self.neighbours:
            hidden = layer(hidden, found.real)
        if self.blocks is not None:
            hidden = self.blocks(hidden, mask=found.real)
        return hidden.gather(1, found.word[..., None].expand(-1, -1, hidden.shape[-1]))
