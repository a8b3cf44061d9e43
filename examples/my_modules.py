"""Modules of your own: registered, so that configs and archives may name them."""

import torch

import nemolet as nl


@nl.register
class Recurrence(nl.NeuralModule):
    """A recurrent layer on the residual stream.

    Args:
        width: model width D.
    """

    def __init__(self, *, width: int) -> None:
        super().__init__(D=width)
        self.norm = nl.nn.RMSNorm("D", width)
        self.cell = torch.nn.GRU(width, width, batch_first=True)

    def forward(self, hidden: nl.HiddenBTD) -> nl.HiddenBTD:
        return hidden + self.cell(self.norm(hidden))[0]


@nl.register
def recurrent_lm(*, vocab_size: int, width: int = 64) -> nl.Graph:
    """A language model without attention, from tokens to logits."""
    embed = nl.nn.Embedding("V", "D", vocab_size, width)
    recurrence = Recurrence(width=width)
    head = nl.nn.Head("D", "V", tied=embed)
    return nl.Graph(head(recurrence(embed(nl.Input(nl.TokenIdsBT)))))
