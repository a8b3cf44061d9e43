"""The loss against its definition."""

import pytest
import torch

from nemolet.errors import ConfigError
from nemolet.language.losses import CrossEntropy


def test_sum_and_count_leave_out_ignored_labels():
    generator = torch.Generator().manual_seed(0)
    logits_BTV = torch.randn(3, 5, 7, generator=generator)
    labels_BT = torch.randint(0, 7, (3, 5), generator=generator)
    labels_BT[0, :2] = -100
    loss, count = CrossEntropy()(logits_BTV, labels_BT)
    expected = sum(
        -logits_BTV[b, t].log_softmax(-1)[labels_BT[b, t]]
        for b in range(3)
        for t in range(5)
        if labels_BT[b, t] != -100
    )
    torch.testing.assert_close(loss, expected)
    assert count.item() == 13


def test_z_loss_adds_the_squared_partition_of_counted_positions():
    logits_BTV = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    labels_BT = torch.tensor([[0, 1, -100], [2, -100, 3]])
    plain, _ = CrossEntropy()(logits_BTV, labels_BT)
    with_z, _ = CrossEntropy(z_loss=0.5)(logits_BTV, labels_BT)
    expected = 0.5 * (logits_BTV.exp().sum(-1).log() ** 2)[labels_BT != -100].sum()
    torch.testing.assert_close(with_z - plain, expected)


def test_all_ignored_gives_zero_of_zero():
    loss, count = CrossEntropy()(torch.randn(1, 2, 3), torch.full((1, 2), -100))
    assert loss.item() == 0 and count.item() == 0


def test_impossible_smoothing_is_refused():
    with pytest.raises(ConfigError, match="label_smoothing is a share"):
        CrossEntropy(label_smoothing=1.0)
