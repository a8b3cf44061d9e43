"""Translation and summarisation: a text is read, another is written by beam search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from nemolet.data.encoding import LongText, TextEncoding, as_list, as_text
from nemolet.errors import GenerationError
from nemolet.generation_rules import Beam, GenerationRules
from nemolet.language.beam import beam_search
from nemolet.language.constraints import Constraints
from nemolet.language.decoding import written_rules
from nemolet.language.losses import CrossEntropy
from nemolet.language.scores import bleu, chrf
from nemolet.language.seq2seq import EncoderDecoder
from nemolet.language.tasks import fields_of, in_windows
from nemolet.metrics import TokenAccuracy
from nemolet.module import NeuralModule
from nemolet.tokenizers import Tokenizer
from nemolet.types import LogitsBTV, MaskBS, TokenIdsBS, TokenIdsBT

_LONGEST = 512  # tokens of a source, for a model that says nothing


class Translator(NeuralModule):
    """Write one text after reading another (final).

    Args:
        model: an encoder and a decoder.
        context: longest source in tokens.
        label_smoothing: of the loss.

    Its attribute ``beam`` says how far :meth:`translate` looks: as the rules of the model say. ``too_long`` says what
    happens to longer sources: an ``error``, ``truncate`` to their beginning, or ``window`` for the translations of
    parts, one after the other.

    Shape: source_BS, tokens_BT, source_mask_BS -> logits_BTV.

    Example:
        >>> from nemolet.nn import Decoder, Encoder
        >>> from nemolet.tokenizers import ByteTokenizer
        >>> parts = {"encoder": Encoder(layers=1, width=8, heads=2),
        ...          "decoder": Decoder(layers=1, width=8, heads=2, cross=True)}
        >>> model = Translator(model=EncoderDecoder(vocab_size=257, **parts))
        >>> len(model.translate(ByteTokenizer(), ["a text"], beam=Beam(max_length=4)))
        1
    """

    CONFIG_RULES: ClassVar = (("label_smoothing >= 0 and label_smoothing < 1", "label smoothing is a share below 1"),)
    READS: ClassVar = (("source",), ("text",))
    PORTS: ClassVar = {"source": TokenIdsBS, "source_mask": MaskBS}
    too_long: LongText = "error"

    def __init__(self, *, model: EncoderDecoder, context: int = 128, label_smoothing: float = 0.1) -> None:
        super().__init__(V=model.vocab_size)
        self.beam = model.generation.beam or Beam()
        self.context, self.label_smoothing, self.vocab_size = context, label_smoothing, model.vocab_size
        self.model = model

    @property
    def start(self) -> int | None:
        """The token that stands before a translation; None for that of the tokenizer."""
        return self.model.generation.start

    def _rules(self, tokenizer: Tokenizer) -> GenerationRules:
        """Those of the model, with the marks of the tokenizer for what they do not say."""
        rules = written_rules(self.model, tokenizer)
        if not rules.stop:
            raise GenerationError("the tokenizer has no end-of-text token", where="tokenizer")
        start = next(token for token in (rules.start, *tokenizer.marks[0], rules.stop[0]) if token is not None)
        return replace(rules, start=start)

    def forward(self, source: TokenIdsBS, tokens: TokenIdsBT, source_mask: MaskBS | None = None) -> LogitsBTV:
        logits: Tensor = self.model(source=source, tokens=tokens, source_mask=source_mask)
        return logits

    def objective(self) -> NeuralModule:
        """Cross-entropy of the next token."""
        return CrossEntropy(label_smoothing=self.label_smoothing)

    def measures(self) -> dict[str, NeuralModule]:
        """How many tokens are the likeliest ones, given those before."""
        return {"token_accuracy": TokenAccuracy()}

    def translate(
        self,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        *,
        beam: Beam | None = None,
        batch_size: int = 32,
        forced: Sequence[str] = (),
        forbidden: Sequence[str] = (),
    ) -> list[str]:
        """Translate raw texts.

        Args:
            tokenizer: the one the model was trained with.
            texts: none of them empty.
            beam: how far the search looks; None for the model's own ``beam``.
            batch_size: texts at once.
            forced: words or phrases that every translation contains, as they are written within a sentence.
            forbidden: words or phrases that no translation contains, not even as a part of a word.

        Raises:
            DataError: for an empty text, or one that is too long, naming its place.
            GenerationError: for a tokenizer without an end-of-text token, or where no translation obeys.
        """
        rules = self._rules(tokenizer)
        beam = beam or self.beam
        beam = replace(beam, max_length=beam.max_length or rules.room(1) or self.context)
        encoding = TextEncoding(tokenizer, self.context, self.too_long)
        parts = [encoding.parts(text, f"text {i}", overlap=False) for i, text in enumerate(as_list(texts, "texts"))]
        if forced and any(len(part) > 1 for part in parts):
            raise GenerationError(
                "a text in several windows has no one place for a forced word",
                where="forced",
                expected=f"texts of at most {self.context} tokens",
                fix="set too_long to error or truncate, or leave forced out",
            )
        samples = [[{"source": ids} for ids in part] for part in parts]

        constraints = _constraints(tokenizer, forced, forbidden)

        def run(batch: dict[str, Tensor]) -> list[str]:
            source, mask = batch["source"], batch["source_mask"]
            found = beam_search(self.model, source, mask, rules=rules, beam=beam, constraints=constraints)
            said = [[tokenizer.decode(each.tokens).strip() for each in hypotheses] for hypotheses in found]
            return [_obedient(translations, forced, forbidden) for translations in said]

        return [" ".join(said) for said in in_windows(self, samples, self.PORTS, run, batch_size=batch_size)]

    def predict(self, tokenizer: Tokenizer, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Translations of records with a ``source`` or a ``text``; and ``forced`` and ``forbidden`` words, if any."""
        groups: dict[tuple[tuple[str, ...], ...], list[int]] = {}
        sources = fields_of(records, "source", "text")
        for number, record in enumerate(records):
            where = f"record {number}"
            words = tuple(
                tuple(as_text(phrase, where) for phrase in as_list(record.get(name) or (), where))
                for name in ("forced", "forbidden")
            )
            groups.setdefault(words, []).append(number)
        said: dict[int, str] = {}
        for (forced, forbidden), numbers in groups.items():
            texts = [sources[n] for n in numbers]
            said |= dict(zip(numbers, self.translate(tokenizer, texts, forced=forced, forbidden=forbidden)))
        return [{"translation": said[number]} for number in range(len(records))]

    def score_texts(self, tokenizer: Tokenizer, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """BLEU and chrF of whole translations."""
        said = self.translate(tokenizer, [record["source"] for record in records])
        real = [record["target"] for record in records]
        return {"bleu": bleu(said, real).score, "chrf": chrf(said, real)}


def in_use(model: Any) -> Any:
    """An encoder-decoder as a translator, whatever it writes: translations, summaries, answers; others as they are.

    Example:
        >>> in_use("another model")
        'another model'
    """
    if not isinstance(model, EncoderDecoder):
        return model
    return Translator(model=model, context=model.context or _LONGEST, label_smoothing=0.0).train(model.training)


def _constraints(tokenizer: Tokenizer, forced: Sequence[str], forbidden: Sequence[str]) -> Constraints:
    """Phrases as tokens: forced ones within a sentence, forbidden ones also at its beginning."""
    empty = [phrase for phrase in (*forced, *forbidden) if not phrase.strip()]
    if empty:
        raise GenerationError("a phrase is empty", where="forced, forbidden", found=empty)
    forms = [form for phrase in forbidden for form in (phrase.strip(), f" {phrase.strip()}")]
    return Constraints(
        tuple(tuple(tokenizer.encode(f" {phrase.strip()}")) for phrase in forced),
        tuple(tuple(tokenizer.encode(form)) for form in forms),
    )


def _obedient(translations: Sequence[str], forced: Sequence[str], forbidden: Sequence[str]) -> str:
    """The best translation that obeys as a text, too: a word can be spelled with several rows of tokens."""
    for text in translations:
        if all(phrase.strip() in text for phrase in forced) and not any(bad.strip() in text for bad in forbidden):
            return text
    raise GenerationError(
        "no translation that was found obeys",
        where="forced, forbidden",
        expected=f"all of {list(forced)} and none of {list(forbidden)}",
        found=translations[0] if translations else "nothing",
        fix="search with a wider beam",
    )
