"""Archives of modules that users wrote: what is described before training is what can be read after it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nemolet as nl
from nemolet.archive import described, load, save
from nemolet.container import read_config, write_config
from nemolet.errors import ArchiveError, ConversionError, DeclarationError
from nemolet.types import HiddenBTD


class Plain(nl.NeuralModule):
    """Its sizes are a tuple, and it takes words with line ends of all kinds."""

    def __init__(self, *, sizes: tuple[int, ...] = (1, 2), table: dict = {0: 1.0}, word: str = "a\x85b\u2028c") -> None:  # noqa: B006
        super().__init__()
        self.sizes, self.table, self.word = sizes, table, word

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        return hidden


class Elaborate(nl.NeuralModule):
    """Takes many operations for each weight that it keeps."""

    def __init__(self, *, layers: int = 40, waste: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)
        for _ in range(waste):
            torch.ones(1)

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        return hidden


class Turning(nl.NeuralModule):
    """Has complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", torch.ones(4, dtype=torch.complex64))

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        return hidden


for _kind in (Plain, Elaborate, Turning):
    nl.register(_kind)


def test_defaults_come_back_as_they_were(tmp_path):
    model = load(save(tmp_path / "m.nemolet", model=Plain())).model
    assert (model.sizes, model.table, model.word) == ((1, 2), {0: 1.0}, "a\x85b\u2028c")


def test_keys_that_are_no_strings_are_refused():
    with pytest.raises(DeclarationError, match="by strings"):
        described(Plain(table={3: 1.0}))


@pytest.mark.parametrize("text", ["a\x85b", "\u2028", " \u2029 ", "\ufeff", "a\nb\r\n", "'\"", "\t", "\x07", "é"])
def test_text_of_a_config_comes_back(text):
    assert read_config(write_config({"model": {"word": text}}), "here") == {"model": {"word": text}}


def test_elaborate_initial_values_are_allowed(tmp_path):
    model = Elaborate(layers=200)
    described(model)
    assert len(load(save(tmp_path / "m.nemolet", model=model)).model.layers) == 200


def test_what_could_not_be_read_is_refused_before_training():
    with pytest.raises(ArchiveError, match="more tensors are made"):
        described(Elaborate(layers=1, waste=2000))
    with pytest.raises(ConversionError, match="complex64"):
        described(Turning())
