"""Shares of two counts, against counting by hand."""

from __future__ import annotations

import pytest
import torch

from nemolet.errors import ConfigError
from nemolet.metrics import Accuracy


@pytest.mark.parametrize("top", [1, 2, 3, 5, 9])
def test_a_class_counts_among_the_likeliest(top):
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 5), torch.randint(0, 5, (50,))
    labels[::7] = -100
    part, whole = Accuracy(top=top)(logits, labels)
    ranks = [(row > row[label]).sum().item() for row, label in zip(logits, labels) if label >= 0]
    assert (part.item(), whole.item()) == (sum(rank < top for rank in ranks), len(ranks))


def test_no_class_at_all_is_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        Accuracy(top=0)
