"""A recognizer with an attention decoder, steadied by CTC in training and in decoding."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemolet.data.ports import LabelsBU
from nemolet.errors import ShapeError
from nemolet.module import NeuralModule
from nemolet.nn.cache import KVCache
from nemolet.nn.embedding import Embedding, Head
from nemolet.nn.transformer import Decoder
from nemolet.speech.ctc_prefix import align
from nemolet.speech.decoding import Hypothesis
from nemolet.speech.encoder import Encoded, SpeechEncoder
from nemolet.speech.front_end import FrontEnd
from nemolet.speech.guards import frames_needed, refuse_misfits
from nemolet.speech.losses import CTC, SequenceLoss, label_lengths
from nemolet.speech.models import Recognizer
from nemolet.types import IGNORED, AudioBN, AudioLengthsB, LengthsB, Logits, LogitsBTV, NeuralType

LogitsBSV = Annotated[Tensor, NeuralType("B S V", Logits())]


class JointScores(NamedTuple):
    """Scores of the label after each number of labels, whose last is that of the end; and CTC's of each frame."""

    logits: LogitsBSV
    frame_logits: LogitsBTV
    lengths: LengthsB


class AttentionRecognizer(Recognizer):
    """An attention decoder and CTC on one encoder (Watanabe et al., 2017; final).

    The decoder writes label after label and looks at all of the encoder's states. CTC keeps it from skipping or
    repeating parts: in training by its share of the loss, in decoding by the probability of what begins so.

    Args:
        front_end: from audio to features.
        encoder: from features to hidden states.
        decoder: causal blocks that attend to a memory (``cross=True``), of the encoder's width.
        vocab_size: labels, without the blank and the end, which share the last id; from the tokenizer in a config.
        ctc_weight: of CTC's scores in decoding by beam; the decoder has the rest.

    Shape: audio_BN, lengths_B, labels_BU -> logits_BSV with S = U + 1, frame_logits_BTV, lengths_B.

    Raises:
        ShapeError: for a decoder that cannot read the encoder's states.

    Example:
        >>> from nemolet.speech import ConvEncoder, LogMel
        >>> model = AttentionRecognizer(
        ...     front_end=FrontEnd(features=LogMel(sample_rate=8000, bins=8)),
        ...     encoder=ConvEncoder(bins=8, width=8, kernels=[3]),
        ...     decoder=Decoder(layers=1, width=8, heads=2, cross=True),
        ...     vocab_size=5)
        >>> scores = model(torch.randn(1, 800), torch.tensor([800]), torch.tensor([[1, 2]]))
        >>> scores.logits.shape, scores.frame_logits.shape
        (torch.Size([1, 3, 6]), torch.Size([1, 5, 6]))
    """

    CONFIG_RULES = (
        ("vocab_size >= 1", "vocab_size is at least 1; null takes it from the tokenizer"),
        ("ctc_weight >= 0 and ctc_weight <= 1", "ctc_weight is a share between 0 and 1"),
    )

    def __init__(
        self,
        *,
        front_end: FrontEnd,
        encoder: SpeechEncoder,
        decoder: Decoder,
        vocab_size: int,
        ctc_weight: float = 0.3,
    ) -> None:
        if not decoder.cross or decoder.width != encoder.width:
            raise ShapeError(
                "the decoder cannot read the encoder's states",
                where="AttentionRecognizer.decoder",
                expected=f"cross=True and width={encoder.width}",
                found=f"cross={decoder.cross}, width={decoder.width}",
                fix="build the decoder with cross=True and the width of the encoder",
            )
        super().__init__(front_end=front_end, encoder=encoder, vocab_size=vocab_size, columns=vocab_size + 1)
        self.ctc_weight, self.end = ctc_weight, vocab_size
        self.head = Head("D", "V", encoder.width, vocab_size + 1)
        self.embed = Embedding("V", "D", vocab_size + 1, encoder.width)
        self.decoder = decoder
        self.out = Head("D", "V", encoder.width, vocab_size + 1)

    def forward(self, audio: AudioBN, audio_lengths: AudioLengthsB, labels: LabelsBU) -> JointScores:
        encoded = self.encode(audio, audio_lengths)
        known_BS = F.pad(labels.masked_fill(labels < 0, self.end), (1, 0), value=self.end)
        return JointScores(self.next_logits(known_BS, encoded), self.head(encoded.hidden), encoded.lengths)

    def next_logits(self, known_BS: Tensor, encoded: Encoded, cache: KVCache | None = None) -> Tensor:
        """Scores of what follows each known label; before the first one stands the end. Shape: [B, S, V]."""
        memory_BSD, lengths_B = encoded
        seen_BS = torch.arange(memory_BSD.shape[1], device=memory_BSD.device) < lengths_B.clamp_min(1)[:, None]
        hidden_BSD = self.decoder(self.embed(known_BS), cache=cache, memory=memory_BSD, memory_mask=seen_BS)
        logits_BSV: Tensor = self.out(hidden_BSD)
        return logits_BSV

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` texts of up to ``capacity`` labels."""
        attention: Any = self.decoder.blocks[0].attention
        return KVCache(
            layers=len(self.decoder.blocks),
            batch=batch,
            kv_heads=attention.kv_heads,
            capacity=capacity,
            head_size=attention.head_size,
            device=self.out.weight.device,
            dtype=self.out.weight.dtype,
        )

    def check_data(self, data: Any) -> None:
        """Refuse utterances with more labels than frames, before training."""
        refuse_misfits(self, data)

    def frame_logits(self, hidden_BTD: Tensor) -> Tensor:
        """CTC's scores of each frame."""
        logits: Tensor = self.head(hidden_BTD)
        return logits

    @torch.inference_mode()
    def greedy(self, encoded: Encoded) -> list[Hypothesis]:
        """The decoder's likeliest label each time, all rows at once; CTC says where each of them lies.

        A text ends at the latest where CTC would have no frame for another label.
        """
        rooms = encoded.lengths.tolist()
        found = [Hypothesis() for _ in rooms]
        open_B = [room > 0 for room in rooms]
        cache = self.new_cache(len(rooms), max(1, *rooms) + 1)
        last_B1 = torch.full((len(rooms), 1), self.end, device=encoded.hidden.device)
        while any(open_B):
            best_B, label_B = self.next_logits(last_B1, encoded, cache)[:, -1].float().log_softmax(-1).max(-1)
            for row, (value, label) in enumerate(zip(best_B.tolist(), label_B.tolist())):
                if not open_B[row]:
                    continue
                hypothesis = found[row]
                open_B[row] = label != self.end and frames_needed([*hypothesis.labels, label]) <= rooms[row]
                hypothesis.score += value
                if open_B[row]:
                    hypothesis.labels.append(label)
                    hypothesis.confidence.append(float(torch.tensor(value).exp()))
            last_B1 = label_B[:, None]
        return self.placed(found, encoded)

    def placed(self, found: list[Hypothesis], encoded: Encoded) -> list[Hypothesis]:
        """Hypotheses with the frames of their labels, by CTC."""
        log_probs_BTV = self.frame_logits(encoded.hidden).float().log_softmax(-1).cpu().numpy()
        for hypothesis, rows, length in zip(found, log_probs_BTV, encoded.lengths.tolist()):
            if hypothesis.labels:
                hypothesis.first, hypothesis.last, _ = align(rows[:length], hypothesis.labels)
        return found


class JointAttention(NeuralModule):
    """Loss of an attention decoder and of CTC on one encoder (final).

    Args:
        ctc_weight: of CTC; the decoder has the rest.
        label_smoothing: share of probability spread over all labels, of the decoder.

    Shape: logits_BSV, frame_logits_BTV, lengths_B, labels_BU -> scalar, scalar.

    Example:
        >>> logits, frames = torch.zeros(1, 3, 3), torch.zeros(1, 4, 3)
        >>> loss = JointAttention(ctc_weight=0.0, label_smoothing=0.0)
        >>> round(loss(logits, frames, torch.tensor([4]), torch.tensor([[0, 1]])).loss.item(), 3)  # two labels, the end
        3.296
    """

    CONFIG_RULES = (
        ("ctc_weight >= 0 and ctc_weight <= 1", "ctc_weight is a share between 0 and 1"),
        ("label_smoothing >= 0 and label_smoothing < 1", "label_smoothing is a share below 1"),
    )

    def __init__(self, *, ctc_weight: float = 0.3, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.ctc_weight, self.label_smoothing = ctc_weight, label_smoothing
        self.ctc = CTC()

    def forward(self, logits: LogitsBSV, frame_logits: LogitsBTV, lengths: LengthsB, labels: LabelsBU) -> SequenceLoss:
        by_frame, count = self.ctc(frame_logits, lengths, labels)
        ends_B1 = label_lengths(labels)[:, None]
        following_BS = F.pad(labels, (0, 1), value=IGNORED).scatter(1, ends_B1, logits.shape[-1] - 1)
        wide_BSV = logits.to(torch.promote_types(logits.dtype, torch.float32))
        by_label = F.cross_entropy(
            wide_BSV.flatten(0, 1),
            following_BS.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        return SequenceLoss(self.ctc_weight * by_frame + (1 - self.ctc_weight) * by_label, count)
