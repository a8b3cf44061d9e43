"""Recurrent layers that declare the axes of their weights."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from nemolet.module import NeuralModule
from nemolet.types import Axis, Hidden, HiddenBTD, LengthsB, NeuralType

HiddenBTO = Annotated[Tensor, NeuralType("B T O", Hidden())]


class LSTM(NeuralModule):
    """A long short-term memory over time, in one direction or both (Hochreiter and Schmidhuber, 1997; final).

    Rows end at their lengths, so that the way back begins at the last valid frame.

    Args:
        width: D of the input.
        hidden: F of the state; the result has F, or 2 F in both directions.
        bidirectional: whether time is also read backwards.

    Shape: hidden_BTD, lengths_B -> ``B T F``; weights ``(4 F) D`` and ``(4 F) F``.

    Example:
        >>> LSTM(4, 8, bidirectional=True)(torch.zeros(1, 5, 4), torch.tensor([3])).shape
        torch.Size([1, 5, 16])
    """

    def __init__(self, width: int, hidden: int, *, bidirectional: bool = False) -> None:
        ways = 2 if bidirectional else 1
        super().__init__(D=width, O=Axis("F", ways * hidden))
        self.hidden, self.ways = hidden, ways
        for way in range(ways):
            for name, size in (("input", width), ("state", hidden)):
                weight = torch.empty(4 * hidden, size).uniform_(-(hidden**-0.5), hidden**-0.5)
                self.register_parameter(f"{name}_weight_{way}", nn.Parameter(weight))
                self.register_parameter(f"{name}_bias_{way}", nn.Parameter(torch.zeros(4 * hidden)))
            self.declare_axes(
                **{
                    f"input_weight_{way}": f"(4 F={hidden}) D",
                    f"state_weight_{way}": f"(4 F={hidden}) F={hidden}",
                    f"input_bias_{way}": f"(4 F={hidden})",
                    f"state_bias_{way}": f"(4 F={hidden})",
                }
            )

    def forward(self, hidden: HiddenBTD, lengths: LengthsB) -> HiddenBTO:
        packed = pack_padded_sequence(hidden, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        weights = [
            getattr(self, f"{name}_{way}")
            for way in range(self.ways)
            for name in ("input_weight", "state_weight", "input_bias", "state_bias")
        ]
        start = hidden.new_zeros(self.ways, len(hidden), self.hidden)
        result, _, _ = torch.lstm(
            packed.data, packed.batch_sizes, (start, start), weights, True, 1, 0.0, self.training, self.ways == 2
        )
        rows = PackedSequence(result, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return pad_packed_sequence(rows, batch_first=True, total_length=hidden.shape[1])[0]
