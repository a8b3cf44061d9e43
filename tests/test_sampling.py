"""Sampling against plain definitions written with loops and numpy."""

import numpy as np
import pytest
import torch

from nemolet.errors import GenerationError
from nemolet.sampling import Sampling, choose, keep_likely, penalise


def reference_top_p(logits: np.ndarray, p: float) -> set[int]:
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    kept, mass = set(), 0.0
    for index in np.argsort(-probs):
        if mass >= p:
            break
        kept.add(int(index))
        mass += probs[index]
    return kept


@pytest.fixture
def logits_BV() -> torch.Tensor:
    return torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3


def kept(logits_BV: torch.Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in logits_BV]


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_with_the_mass(logits_BV, p):
    expected = [reference_top_p(row.double().numpy(), p) for row in logits_BV]
    assert kept(keep_likely(logits_BV, Sampling(top_p=p))) == expected


@pytest.mark.parametrize("k", [1, 7, 39])
def test_top_k_keeps_the_k_best(logits_BV, k):
    expected = [set(np.argsort(-row.numpy())[:k].tolist()) for row in logits_BV]
    assert kept(keep_likely(logits_BV, Sampling(top_k=k))) == expected


def test_min_p_is_relative_to_the_best(logits_BV):
    probs_BV = logits_BV.softmax(-1)
    expected = [set((row >= 0.1 * row.max()).nonzero().flatten().tolist()) for row in probs_BV]
    assert kept(keep_likely(logits_BV, Sampling(min_p=0.1))) == expected


@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_is_what_transformers_keeps(seed):
    """Its warpers come in this order, which tells where several of them are on."""
    generation = pytest.importorskip("transformers.generation")
    numbers = torch.Generator().manual_seed(seed)
    logits_BV = torch.randn(5, 40, generator=numbers) * 2
    top_k, top_p, min_p = [(12, 0.6, 0.2), (0, 0.3, 0.1), (5, 1.0, 0.3), (20, 0.5, 0.05)][seed % 4]
    warpers = [generation.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [generation.TopPLogitsWarper(top_p), generation.MinPLogitsWarper(min_p)]
    expected = logits_BV
    for warper in warpers:
        expected = warper(None, expected)
    assert kept(keep_likely(logits_BV, Sampling(top_k=top_k, top_p=top_p, min_p=min_p))) == kept(expected)


def test_repetition_penalty_follows_the_papers_rule():
    logits_BV, seen_BV = torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[True, True, False]])
    assert penalise(logits_BV, seen_BV, 2.0).tolist() == [[1.0, -4.0, 1.0]]


def test_repetition_penalty_agrees_with_transformers(logits_BV):
    processors = pytest.importorskip("transformers.generation.logits_process")
    ids_BT = torch.randint(0, 40, (5, 6), generator=torch.Generator().manual_seed(1))
    seen_BV = torch.zeros(5, 40, dtype=torch.bool).scatter(1, ids_BT, True)
    expected = processors.RepetitionPenaltyLogitsProcessor(1.7)(ids_BT, logits_BV.clone())
    torch.testing.assert_close(penalise(logits_BV, seen_BV, 1.7), expected)


def test_samples_follow_the_distribution():
    logits_BV = torch.tensor([[0.5, 1.5, -1.0, 0.0]])
    generator = [torch.Generator().manual_seed(3)]
    draws = torch.stack([choose(logits_BV, Sampling(), generator) for _ in range(4000)]).flatten()
    frequency = torch.bincount(draws, minlength=4) / len(draws)
    torch.testing.assert_close(frequency, logits_BV[0].softmax(-1), atol=0.03, rtol=0)


def test_greedy_takes_the_best(logits_BV):
    generators = [torch.Generator() for _ in range(5)]
    assert torch.equal(choose(logits_BV, Sampling(temperature=0.0), generators), logits_BV.argmax(-1))


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
    ],
)
def test_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(GenerationError, match=f"sampling.{field}"):
        Sampling(**{field: value})


@pytest.mark.parametrize("temperature", [1e-40, 1e-30, 1e-7, 2e-6])
def test_a_tiny_temperature_takes_the_best(temperature):
    logits = torch.tensor([[0.5, 30.0, 2.0], [80.0, -90.0, 3.0]])
    generators = [torch.Generator().manual_seed(row) for row in range(2)]
    assert choose(logits, Sampling(temperature=temperature), generators).tolist() == [1, 0]
