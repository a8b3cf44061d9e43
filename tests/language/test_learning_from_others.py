"""Preferences and teachers: losses by hand, and models that change in the right direction only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import nemolet as nl
from nemolet.errors import ConfigError
from nemolet.language import DistillationLoss, Distilled, PreferenceLoss, PreferenceModel
from nemolet.language.preference import answer_log_likelihood
from nemolet.types import IGNORED


def model(seed=0, vocab=12):
    torch.manual_seed(seed)
    return nl.language.CausalLM(vocab_size=vocab, layers=1, width=16, heads=2)


BATCH = {
    "tokens": torch.tensor([[1, 2, 3, 4], [1, 5, 6, 0]]),
    "labels": torch.tensor([[IGNORED, 3, 4, 7], [IGNORED, 6, IGNORED, IGNORED]]),
    "rejected_tokens": torch.tensor([[1, 2, 9], [1, 5, 8]]),
    "rejected_labels": torch.tensor([[IGNORED, 9, 7], [IGNORED, 8, 7]]),
}


def test_the_likelihood_of_an_answer_is_a_sum_over_its_tokens():
    logits = torch.randn(2, 4, 12)
    expected = [
        sum(
            F.log_softmax(logits[row, t], -1)[BATCH["labels"][row, t]] for t in range(4) if BATCH["labels"][row, t] >= 0
        )
        for row in range(2)
    ]
    assert torch.allclose(answer_log_likelihood(logits, BATCH["labels"]), torch.stack(expected))


def test_preferences_make_the_better_answer_likelier_and_leave_the_reference():
    preference = PreferenceModel(policy=model())
    reference = {name: p.clone() for name, p in preference.reference.named_parameters()}
    first = preference(**BATCH)
    assert torch.equal(first.chosen, torch.zeros(2))
    optimizer = torch.optim.Adam([p for p in preference.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        loss, count = PreferenceLoss(beta=0.5)(*preference(**BATCH))
        (loss / count).backward()
        optimizer.step()
    gains = preference(**BATCH)
    assert (gains.chosen > gains.rejected).all()
    assert all(torch.equal(p, reference[name]) for name, p in preference.reference.named_parameters())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_preferences_is_that_of_the_paper(smoothing):
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    loss, count = PreferenceLoss(beta=0.3, label_smoothing=smoothing)(chosen, rejected)
    sigma = torch.sigmoid(0.3 * (chosen - rejected))
    expected = -((1 - smoothing) * sigma.log() + smoothing * (1 - sigma).log()).sum()
    assert torch.allclose(loss, expected)
    assert count == 2


def by_hand(policy, reference, beta, smoothing):
    """The loss of a batch as TRL documents it, from plain logits, one token after the other."""
    total = 0.0
    for row in range(2):
        gains = []
        for kind in ("", "rejected_"):
            tokens, labels = (BATCH[f"{kind}{what}"][row] for what in ("tokens", "labels"))
            scores = [m.eval()(tokens[None])[0].double().log_softmax(-1) for m in (policy, reference)]
            said = [(t, int(label)) for t, label in enumerate(labels) if label != IGNORED]
            gains.append(sum(scores[0][t, label] - scores[1][t, label] for t, label in said))
        margin = beta * (gains[0] - gains[1])
        total -= (1 - smoothing) * torch.sigmoid(margin).log() + smoothing * torch.sigmoid(-margin).log()
    return total.item()


@torch.no_grad()
@pytest.mark.parametrize("dora", [None, False, True])
def test_preferences_by_hand_without_dropout_and_against_the_model_without_its_addition(dora):
    def made():
        torch.manual_seed(0)
        return nl.language.CausalLM(vocab_size=12, layers=2, width=16, heads=2, dropout=0.4)

    policy, base = made(), made()
    if dora is not None:
        nl.nn.adapt(policy, nl.nn.Adapter(rank=2, dropout=0.4, dora=dora))
    preference = PreferenceModel(policy=policy).train()
    assert (preference.reference is None) == (dora is not None)  # no second copy beside an addition
    torch.testing.assert_close(preference(**BATCH).chosen, torch.zeros(2), atol=1e-5, rtol=0)
    torch.manual_seed(3)
    changed = [p for n, p in policy.named_parameters() if n.rpartition(".")[2] in ("up", "lengths")]
    for parameter in changed or policy.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.2)
    loss, count = PreferenceLoss(beta=0.4, label_smoothing=0.1)(*preference.train()(**BATCH))
    assert count == 2
    assert all(module.training for module in policy.modules())
    assert loss.item() == pytest.approx(by_hand(policy, base, 0.4, 0.1), rel=1e-4)
    assert policy.config()["dropout"] == 0.4


def test_gradients_of_preferences_go_to_the_addition_only():
    policy = model()
    nl.nn.adapt(policy, nl.nn.Adapter(rank=2))
    preference = PreferenceModel(policy=policy).train()
    loss, _ = PreferenceLoss()(*preference(**BATCH))
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in policy.parameters())
    assert sum(p.numel() for p in preference.parameters()) == sum(p.numel() for p in policy.parameters())


def test_a_student_comes_to_agree_with_its_teacher():
    distilled = Distilled(student=model(0), teacher=model(1))
    tokens = torch.randint(12, (4, 8))
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1)}
    graph = nl.training.training_graph(distilled, DistillationLoss(share=1.0), distilled.measures())
    before = graph(**batch)
    optimizer = torch.optim.Adam([p for p in distilled.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        out = graph(**batch)
        (out["loss"] / out["count"]).backward()
        optimizer.step()
    after = graph(**batch)
    assert after["loss"] < before["loss"] / 2
    assert after["agreement_part"] == after["agreement_whole"] == 32
    assert all(p.grad is None for p in distilled.teacher.parameters())


def test_the_share_of_the_text_is_cross_entropy():
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    labels = torch.tensor([[1, IGNORED, 2], [0, 4, IGNORED]])
    loss, count = DistillationLoss(share=0.0)(student, teacher, labels)
    assert torch.allclose(loss, F.cross_entropy(student[labels >= 0], labels[labels >= 0], reduction="sum"))
    assert count == 4
    loss, _ = DistillationLoss(share=1.0, temperature=1.0)(student, teacher, labels)
    probs = teacher[labels >= 0].softmax(-1)
    own = student[labels >= 0].log_softmax(-1)
    assert torch.allclose(loss, (probs * (probs.log() - own)).sum(), atol=1e-5)


def test_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="different vocabularies"):
        Distilled(student=model(), teacher=model(vocab=13))
