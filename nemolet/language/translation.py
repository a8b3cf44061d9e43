"""Translation and summarisation: a text is read, another is written by beam search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from nemolet.data.encoding import TextEncoding
from nemolet.errors import GenerationError
from nemolet.language.beam import Beam, beam_search
from nemolet.language.losses import CrossEntropy
from nemolet.language.scores import bleu, chrf
from nemolet.language.seq2seq import EncoderDecoder
from nemolet.language.tasks import in_batches
from nemolet.metrics import TokenAccuracy
from nemolet.module import NeuralModule
from nemolet.tokenizers import Tokenizer
from nemolet.types import LogitsBTV, MaskBS, TokenIdsBS, TokenIdsBT


class Translator(NeuralModule):
    """Write one text after reading another (final).

    Args:
        model: an encoder and a decoder.
        context: longest source in tokens; the end of longer ones is not read.
        label_smoothing: of the loss.

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

    def __init__(self, *, model: EncoderDecoder, context: int = 128, label_smoothing: float = 0.1) -> None:
        super().__init__(V=model.vocab_size)
        self.context, self.label_smoothing, self.vocab_size = context, label_smoothing, model.vocab_size
        self.model = model

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
        self, tokenizer: Tokenizer, texts: Sequence[str], *, beam: Beam | None = None, batch_size: int = 32
    ) -> list[str]:
        """Translate raw texts.

        Args:
            tokenizer: the one the model was trained with.
            texts: none of them empty.
            beam: how far the search looks.
            batch_size: texts at once.

        Raises:
            DataError: for an empty text, naming its place.
            GenerationError: for a tokenizer without an end-of-text token.
        """
        beam = beam or Beam(max_length=self.context)
        end = tokenizer.eos_id
        if end is None:
            raise GenerationError("the tokenizer has no end-of-text token", where="tokenizer")
        start = end if tokenizer.bos_id is None else tokenizer.bos_id
        encoding = TextEncoding(tokenizer, self.context, "truncate")
        samples = [{"source": encoding.text(text, f"text {i}")} for i, text in enumerate(texts)]

        def run(batch: dict[str, Tensor]) -> list[str]:
            found = beam_search(self.model, batch["source"], batch["source_mask"], start=start, end=end, beam=beam)
            return [tokenizer.decode(hypotheses[0].tokens).strip() for hypotheses in found]

        return in_batches(self, samples, self.PORTS, run, batch_size=batch_size)

    def predict(self, tokenizer: Tokenizer, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Translations of records with a ``source`` or a ``text``."""
        texts = [record.get("source") or record["text"] for record in records]
        return [{"translation": text} for text in self.translate(tokenizer, texts)]

    def score_texts(self, tokenizer: Tokenizer, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """BLEU and chrF of whole translations."""
        said = self.translate(tokenizer, [record["source"] for record in records])
        real = [record["target"] for record in records]
        return {"bleu": bleu(said, real).score, "chrf": chrf(said, real)}
