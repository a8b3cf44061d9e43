"""An encoder on features that are still arriving, equal to the whole with the same context."""

from __future__ import annotations

import torch
from torch import Tensor

from nemolet.errors import ShapeError
from nemolet.nn.relative_attention import RelativeContext, relative_distances
from nemolet.speech.conformer import ConformerBlock, ConformerEncoder


class ConformerStream:
    """Hidden states of features that arrive in pieces of any length (final).

    Every block keeps the keys and values of the chunks that may still be seen, and the last inputs of its
    convolution; nothing is computed twice but the subsampling of two hidden states.

    Args:
        encoder: one with chunks, in evaluation.
        batch: rows.

    Raises:
        ShapeError: for an encoder that looks at whole utterances.

    Example:
        >>> encoder = ConformerEncoder(bins=8, layers=1, width=8, heads=2, kernel=3, chunk=2).eval()
        >>> features, stream = torch.randn(1, 30, 8), ConformerStream(encoder)
        >>> parts = [stream.push(features[:, :17]), stream.push(features[:, 17:]), stream.flush()]
        >>> whole = encoder(features, torch.tensor([30])).hidden
        >>> torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
        True
    """

    def __init__(self, encoder: ConformerEncoder, *, batch: int = 1) -> None:
        if encoder.chunk is None or encoder.training:
            raise ShapeError(
                "the encoder cannot stream",
                where=encoder.label,
                expected="an encoder in evaluation that reads in chunks",
                found=f"chunk={encoder.chunk}, training={encoder.training}",
                fix="train it with chunk=... and left_chunks=..., and call eval()",
            )
        self.encoder, self.chunk = encoder, encoder.chunk
        weight = next(encoder.parameters())
        self.waiting_BTC = weight.new_zeros(batch, 0, encoder.bins)
        self.read_BTC = self.waiting_BTC  # the last frames that were encoded, which the subsampling sees again
        self.blocks = [block for block in encoder.blocks if isinstance(block, ConformerBlock)]
        self.states = [block.start(batch) for block in self.blocks]

    @property
    def step(self) -> int:
        """Frames of features that complete a chunk."""
        return self.chunk * self.encoder.factor

    @torch.inference_mode()
    def push(self, features_BTC: Tensor) -> Tensor:
        """Take features of all rows; returns the hidden states of the chunks that are now complete, ``B T D``."""
        self.waiting_BTC = torch.cat((self.waiting_BTC, features_BTC.to(self.waiting_BTC)), 1)
        done = []
        while self.waiting_BTC.shape[1] >= self.step:
            now, self.waiting_BTC = self.waiting_BTC[:, : self.step], self.waiting_BTC[:, self.step :]
            done.append(self._encode(now))
        return torch.cat(done, 1) if done else self._nothing()

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """The hidden states of the last chunk, which the end cut short."""
        now, self.waiting_BTC = self.waiting_BTC, self.waiting_BTC[:, :0]
        return self._encode(now) if now.shape[1] else self._nothing()

    def _nothing(self) -> Tensor:
        return self.waiting_BTC.new_zeros(len(self.waiting_BTC), 0, self.encoder.width)

    def _encode(self, features_BTC: Tensor) -> Tensor:
        encoder = self.encoder
        seen = torch.cat((self.read_BTC, features_BTC), 1)
        lengths_B = torch.full((len(seen),), seen.shape[1], device=seen.device)
        again = self.read_BTC.shape[1] // encoder.factor  # hidden states that were handed out before
        hidden_BTD: Tensor = encoder.subsampling(seen, lengths_B).hidden[:, again:]
        self.read_BTC = seen[:, max(0, seen.shape[1] - encoder.subsampling.memory) :]
        known = self.states[0].past.keys.shape[1] + hidden_BTD.shape[1]
        distances = relative_distances(hidden_BTD.shape[1], known, encoder.width, device=seen.device)
        keep = encoder.left_chunks * self.chunk
        for layer, block in enumerate(self.blocks):
            context = RelativeContext(distances, None)
            hidden_BTD, self.states[layer] = block.advance(hidden_BTD, context, self.states[layer], keep)
        return hidden_BTD
