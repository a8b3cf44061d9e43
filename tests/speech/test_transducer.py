"""Transducer losses against a sum over all alignments, one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import nemolet as nl
from nemolet.errors import ShapeError
from nemolet.speech.losses import CTC
from nemolet.speech.transducer import TokenAndDuration, Transducer


def rnnt_by_hand(log_probs, labels):
    """Minus the log of the sum over all paths, by plain recursion over states."""
    frames, blank = log_probs.shape[0], log_probs.shape[-1] - 1

    def paths(t, s):
        row = log_probs[t, s]
        total = 0.0
        if t == frames - 1 and s == len(labels):
            total += math.exp(row[blank])
        if t + 1 < frames:
            total += math.exp(row[blank]) * paths(t + 1, s)
        if s < len(labels):
            total += math.exp(row[labels[s]]) * paths(t, s + 1)
        return total

    return -math.log(paths(0, 0))


def tdt_by_hand(tokens, skips, durations, labels):
    frames, blank = tokens.shape[0], tokens.shape[-1] - 1

    def paths(t, s):
        total = 0.0
        for weight, skip in zip(skips[t, s].tolist(), durations):
            arc = math.exp(tokens[t, s, blank] + weight)
            if skip and t + skip == frames and s == len(labels):
                total += arc
            if skip and t + skip < frames:
                total += arc * paths(t + skip, s)
            if s < len(labels) and t + skip < frames:
                total += math.exp(tokens[t, s, labels[s]] + weight) * paths(t + skip, s + 1)
        return total

    whole = paths(0, 0)
    return -math.log(whole) if whole else 0.0


def example(batch=3, frames=5, labels=3, columns=5, dtype=torch.double):
    torch.manual_seed(0)
    logits = torch.randn(batch, frames, labels + 1, columns, dtype=dtype) * 2
    lengths = torch.tensor([frames, frames - 2, frames - 1])[:batch]
    targets = torch.randint(0, 4, (batch, labels))
    for row, size in enumerate([labels, labels - 1, 0][:batch]):
        targets[row, size:] = -100
    return logits, lengths, targets


class Living(TorchDispatchMode):
    """The most bytes that new tensors hold at a time, and how many are as large as the logits."""

    def __init__(self, logits_bytes):
        super().__init__()
        self.logits_bytes, self.most, self.large, self.storages = logits_bytes, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, out if isinstance(out, (tuple, list)) else [out]):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {place: kept for place, kept in self.storages.items() if not kept[0].expired()}
        sizes = [size for _, size in self.storages.values()]
        self.most = max(self.most, sum(size for size in sizes if size != self.logits_bytes))
        self.large = max(self.large, sizes.count(self.logits_bytes))
        return out


def rows(logits, lengths, targets):
    for one, frames, labels in zip(logits, lengths.tolist(), targets):
        labels = [label for label in labels.tolist() if label >= 0]
        yield one[:frames, : len(labels) + 1], labels


@pytest.mark.parametrize("dtype, near", [(torch.double, 1e-9), (torch.float, 1e-5)])
def test_the_loss_is_the_sum_over_all_paths(dtype, near):
    logits, lengths, targets = example(dtype=dtype)
    loss, count = Transducer()(logits, lengths, targets)
    expected = sum(rnnt_by_hand(one.double().log_softmax(-1), labels) for one, labels in rows(logits, lengths, targets))
    assert abs(loss.item() - expected) < near * max(1, abs(expected))
    assert count.item() == 5


def test_gradients_are_those_of_finite_differences():
    logits, lengths, targets = example()

    def loss(x):
        return Transducer()(x, lengths, targets).loss

    assert torch.autograd.gradcheck(loss, logits.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("durations", [[0, 1, 2], [1, 2], [0, 1, 4], [0, 3, 1], [0, 2], [2, 3]])
def test_tdt_is_the_sum_over_all_paths_with_the_gradient_of_finite_differences(durations):
    logits, lengths, targets = example(frames=8, columns=5 + len(durations))
    loss = TokenAndDuration(durations=durations)
    expected = []
    for one, labels in rows(logits, lengths, targets):
        skips = one[..., 5:].log_softmax(-1)
        expected.append(tdt_by_hand(one[..., :5].log_softmax(-1), skips, durations, labels))
    assert abs(loss(logits, lengths, targets).loss.item() - sum(expected)) < 1e-9 * sum(expected)
    assert torch.autograd.gradcheck(lambda x: loss(x, lengths, targets).loss, logits.requires_grad_(), fast_mode=True)


def test_padding_changes_nothing():
    logits, lengths, targets = example()
    alone = sum(
        Transducer()(one[None], torch.tensor([len(one)]), torch.tensor([labels], dtype=torch.long).view(1, -1)).loss
        for one, labels in rows(logits, lengths, targets)
    )
    assert torch.allclose(alone, Transducer()(logits, lengths, targets).loss, rtol=0, atol=1e-9)


def test_a_very_unlikely_label_leaves_finite_numbers():
    logits, lengths, targets = example(dtype=torch.float)
    logits[..., 0] = -1e4
    logits.requires_grad_()
    loss = Transducer()(logits, lengths, targets).loss
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("least", [-1e4, -1e5, -1e6])
def test_a_label_that_never_comes_leaves_finite_numbers(least):
    logits, lengths, targets = example(dtype=torch.float)
    logits[:, :, 0].scatter_(-1, targets[:, :1, None].clamp(min=0).expand(-1, logits.shape[1], 1), least)
    logits.requires_grad_()
    loss = Transducer()(logits, lengths, targets).loss
    loss.backward()
    assert 1e4 < loss.item() < 3e6
    assert logits.grad.isfinite().all()
    assert logits.grad[1, lengths[1] :].eq(0).all()


@pytest.mark.parametrize("scale, near", [(1.0, 1e-5), (10.0, 1e-4)])
def test_two_thousand_frames_in_single_precision_are_those_in_double(scale, near):
    torch.manual_seed(0)
    logits = scale * torch.randn(2, 2000, 31, 6)
    targets, lengths = torch.randint(0, 5, (2, 30)), torch.tensor([2000, 1500])
    losses, grads = [], []
    for dtype in (torch.float, torch.double):
        given = logits.to(dtype).requires_grad_()
        losses.append(Transducer()(given, lengths, targets).loss)
        grads.append(torch.autograd.grad(losses[-1], given)[0])
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert torch.allclose(grads[0].double(), grads[1], rtol=0, atol=near)


@pytest.mark.parametrize("loss", [Transducer(), TokenAndDuration(durations=[0, 1, 3])], ids=["rnnt", "tdt"])
def test_an_utterance_without_any_alignment_adds_nothing(loss):
    logits, _, targets = example(columns=8)
    lengths = torch.tensor([5, 0, 4])
    logits.requires_grad_()
    whole = loss(logits, lengths, targets).loss
    [grad] = torch.autograd.grad(whole, logits)
    rest = loss(logits[::2], lengths[::2], targets[::2]).loss
    assert whole.item() == pytest.approx(rest.item(), abs=1e-12)
    assert grad[1].eq(0).all()
    assert grad[0].ne(0).any()


@pytest.mark.parametrize("loss", [Transducer(), TokenAndDuration(durations=[0, 1, 3])], ids=["rnnt", "tdt"])
def test_utterances_without_frames_add_nothing(loss):
    logits = torch.zeros(2, 0, 3, 5, requires_grad=True)
    found = loss(logits, torch.tensor([0, 0]), torch.tensor([[0, 1], [1, -100]]))
    [grad] = torch.autograd.grad(found.loss, logits)
    assert (found.loss.item(), found.count.item(), grad.shape) == (0.0, 3, logits.shape)


@pytest.mark.parametrize("loss", [CTC(), Transducer(), TokenAndDuration()], ids=["ctc", "rnnt", "tdt"])
def test_a_logit_that_is_no_number_gives_a_loss_that_is_none(loss):
    logits, lengths, targets = example(columns=10)
    logits = logits[:, :, 0] if isinstance(loss, CTC) else logits
    logits[1, 2, ..., 3] = math.nan
    assert loss(logits, lengths, targets).loss.isnan()
    assert loss(logits[::2], lengths[::2], targets[::2]).loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
def test_a_second_pass_over_the_same_graph_gives_the_same_gradient(dtype):
    logits, lengths, targets = example(dtype=dtype)
    loss = Transducer()(logits.requires_grad_(), lengths, targets).loss
    [first] = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    for factor in (1.0, -2.0):
        [again] = torch.autograd.grad(loss * factor, logits, retain_graph=True)
        assert torch.allclose(again, kept * factor, rtol=0, atol=1e-6)
    assert torch.equal(first, kept)  # what was handed out is nobody else's


def test_half_precision_is_summed_in_single():
    logits, lengths, targets = example(dtype=torch.bfloat16)
    loss = Transducer()(logits, lengths, targets).loss
    assert loss.dtype == torch.float
    assert torch.allclose(loss, Transducer()(logits.float(), lengths, targets).loss)


def test_earlier_labels_are_pushed_by_their_gradient_only():
    logits, lengths, targets = example()
    plain, pushed = Transducer(), Transducer(emit_weight=0.5)
    assert plain(logits, lengths, targets).loss == pushed(logits, lengths, targets).loss
    grads = [
        torch.autograd.grad(loss(logits.requires_grad_(), lengths, targets).loss, logits)[0] for loss in (plain, pushed)
    ]
    assert not torch.allclose(*grads)


def test_beside_logits_and_their_gradient_there_are_four_tensors_of_states():
    """The most that lives at a time, in both passes, counted over all storages."""
    logits, lengths, targets = example(batch=2, frames=70, labels=20, columns=60, dtype=torch.float)
    states = 4 * logits[..., 0].numel()
    with Living(4 * logits.numel()) as living:
        loss = Transducer()(logits.requires_grad_(), lengths, targets).loss
        after_forward = living.most
        torch.autograd.grad(loss, logits)
    assert 2 * states < after_forward <= living.most <= 4 * states
    assert living.large == 1


def test_a_lattice_of_other_labels_is_refused():
    logits, lengths, targets = example()
    with pytest.raises(ShapeError, match="S = 4 states"):
        Transducer()(logits[:, :, :3], lengths, targets)


def test_impossible_durations_are_refused():
    with pytest.raises(ShapeError, match="durations"):
        TokenAndDuration(durations=[0])


def test_the_ports_are_typed():
    logits = nl.Input(nl.types.LogitsBTSV, "logits")
    graph = nl.Graph(Transducer()(logits, nl.Input(nl.LengthsB, "lengths"), nl.Input(nl.types.LabelsBU, "labels")))
    assert list(graph.output_ports) == ["loss", "count"]
