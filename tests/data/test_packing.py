"""Packing and blending, against plain Python over the concatenated documents."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from nemolet.data import Blend, PackedTokens, TokenLoader, ValidationLoader
from nemolet.data.prepared import DummyBatch
from nemolet.errors import DataError


def random_documents(seed, count=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50, rng.integers(0, 30)).tolist() for _ in range(count)]


def packed(documents, **kwargs):
    lengths = np.array([len(d) for d in documents])
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    return PackedTokens(np.array(sum(documents, []), np.uint16), starts, lengths, **kwargs)


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("seed", range(3))
def test_every_sequence_equals_plain_python(length, seed):
    documents = random_documents(seed)
    stream = [(token, number, place) for number, d in enumerate(documents) for place, token in enumerate(d)]
    sampler = packed(documents, sequence_length=length, order="sequential")
    assert sampler.size == (len(stream) - 1) // length
    for n in range(sampler.size):
        window = stream[n * length : n * length + length + 1]
        sample = sampler.sample(n)
        assert sample.tokens.tolist() == [t for t, _, _ in window[:-1]]
        labels = [b[0] if a[1] == b[1] else -100 for a, b in itertools.pairwise(window)]
        assert sample.labels.tolist() == labels
        numbers = [d for _, d, _ in window[:-1]]
        if len(set(numbers)) == 1:
            assert sample.segments is None
            continue
        order = sorted(set(numbers))
        assert sample.segments.tolist() == [order.index(d) + 1 for d in numbers]
        first = [numbers.index(d) for d in numbers]
        assert sample.positions.tolist() == [i - f for i, f in enumerate(first)]


def test_a_subset_of_documents_can_be_packed():
    sampler = PackedTokens(np.arange(20), [2, 10], [3, 4], sequence_length=6, order="sequential")
    assert sampler.sample(0).tokens.tolist() == [2, 3, 4, 10, 11, 12]


def test_each_pass_is_another_permutation():
    sampler = packed([list(range(45))], sequence_length=4, seed=3)
    passes = [[int(sampler.sample(e * 11 + i).tokens[0]) for i in range(11)] for e in range(3)]
    assert all(sorted(p) == list(range(0, 44, 4)) for p in passes)
    assert passes[0] != passes[1] != passes[2]
    again = packed([list(range(45))], sequence_length=4, seed=3)
    assert [int(again.sample(11 + i).tokens[0]) for i in range(11)] == passes[1]


def test_random_cuts_cover_the_text_and_repeat_exactly():
    sampler = packed([list(range(100))], sequence_length=4, order="random", seed=1)
    starts = [int(sampler.sample(n).tokens[0]) for n in range(4000)]
    assert min(starts) == 0
    assert max(starts) == 95
    assert starts[17] == int(sampler.sample(17).tokens[0])
    counts = np.bincount(starts, minlength=96)
    assert counts.min() > 15
    assert counts.max() < 80


def test_documents_need_not_be_told_apart():
    sample = packed([[1, 2], [3, 4, 5]], sequence_length=4, order="sequential", respect_documents=False).sample(0)
    assert sample.segments is None
    assert sample.labels.tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.2, 0.1), (1, 2, 3, 994)])
def test_blends_keep_their_shares_and_skip_nothing(weights):
    parts = [packed([[k] * 5000], sequence_length=1, order="sequential") for k in range(len(weights))]
    blend = Blend(parts, weights)
    chosen = np.array([int(blend.sample(n).tokens[0]) for n in range(3000)])
    for k, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs((chosen == k).sum() - 3000 * share) <= 3
        assert abs((chosen[:500] == k).sum() - 500 * share) <= 2  # evenly spread
    numbers = [[] for _ in parts]
    for part, seen in zip(parts, numbers):
        part.sample = seen.append
    for n in range(3000):
        blend.sample(n)
    assert all(seen == list(range(len(seen))) for seen in numbers)


@pytest.mark.parametrize("weights", [(1, 0), (1, -1), (1,), (1, float("nan")), (1, 1e-9)])
def test_impossible_blends_are_refused(weights):
    parts = [packed([[k] * 50], sequence_length=1) for k in range(2)]
    with pytest.raises(DataError, match="blend"):
        Blend(parts, weights)


def test_too_little_text_is_refused():
    with pytest.raises(DataError, match=r"sequence_length=4"):
        packed([[1, 2, 3, 4, 5]], sequence_length=9)


@pytest.mark.parametrize("tail", [True, False])
def test_a_single_token_predicts_nothing(tail):
    with pytest.raises(DataError, match="at least 2 tokens" if tail else "at least 10 tokens"):
        packed([[1]], sequence_length=9, tail=tail)


def test_ranks_share_the_work_and_resume_exactly():
    sampler = packed(random_documents(5, 200), sequence_length=8, seed=2)
    whole = iter(TokenLoader(sampler, batch_size=6))
    loaders = [TokenLoader(sampler, batch_size=3, rank=r, ranks=2) for r in range(2)]
    ranks = [iter(loader) for loader in loaders]
    for _ in range(5):
        expected = next(whole)["tokens"]
        assert torch.equal(torch.cat([next(r)["tokens"] for r in ranks]), expected)
    state = loaders[0].state_dict()
    resumed = TokenLoader(sampler, batch_size=2, rank=0, ranks=1)  # another layout goes on at the same sample
    resumed.load_state_dict(state)
    expected = next(whole)
    stream = iter(resumed)
    assert torch.equal(torch.cat([next(stream)["tokens"] for _ in range(3)]), expected["tokens"])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_sees_every_token_once(ranks):
    sampler = packed(random_documents(6, 60), sequence_length=8, order="sequential")
    loaders = [ValidationLoader(sampler, batch_size=4, rank=r, ranks=ranks) for r in range(ranks)]
    assert len({len(list(loader)) for loader in loaders}) == 1
    batches = [b for loader in loaders for b in loader if not isinstance(b, DummyBatch)]
    labels = sum(int((b["labels"] != -100).sum()) for b in batches)
    assert labels == sum(int((sampler.sample(n).labels != -100).sum()) for n in range(sampler.size))


@pytest.mark.parametrize("order", ["sequential", "random"])
def test_what_ends_a_document_opens_the_next(order):
    """The first token of a document is predicted from the end mark, and from nothing of the document before."""
    documents = [[*document, 99] for document in random_documents(5)]
    sampler = packed(documents, sequence_length=16, order=order, opener=99)
    opened = 0
    for n in range(2 * sampler.size):
        sample = sampler.sample(n)
        assert (sample.labels != -100).all()
        ends = np.flatnonzero(sample.tokens == 99)
        opened += len(ends)
        segments = np.zeros(16, int) if sample.segments is None else sample.segments
        inner = ends[ends > 0]
        assert np.flatnonzero(np.diff(segments)).tolist() == (inner - 1).tolist()
        if sample.positions is not None:
            assert (sample.positions[inner] == 0).all()
    assert opened


@pytest.mark.parametrize("led", ["first", "all", "none"])
@pytest.mark.parametrize("length", [1, 5, 16, 5000])
def test_openers_and_the_tail_equal_plain_python(led, length):
    """Every label of the text once, the last ones too; what opens a document counts as its beginning."""
    documents = random_documents(7)
    documents = [[*d, 99] for d in documents] if led == "first" else documents
    opens = [led == "all" or (led == "first" and number == 0) for number in range(len(documents))]
    sampler = packed(documents, sequence_length=length, order="sequential", opener=99, led=opens, tail=True)
    stream = []  # a token, the document it belongs to (what ends one opens the next), its place there
    for number, document in enumerate(documents):
        stream += [[99, number]] if opens[number] else []
        stream += [[token, number] for token in document]
        if led == "first" and number + 1 < len(documents):
            stream[-1][1] = number + 1
    assert sampler.size == -(-(len(stream) - 1) // length)
    labels, expected = (
        [],
        [b[0] if a[1] == b[1] or (b[0] == 99 and led == "first") else -100 for a, b in itertools.pairwise(stream)],
    )
    for n in range(sampler.size):
        sample = sampler.sample(n)
        assert len(sample.tokens) == len(sample.labels) == length
        here = stream[n * length : (n + 1) * length]
        assert sample.tokens[: len(here)].tolist() == [token for token, _ in here]
        numbers = [number for _, number in here]
        if len(set(numbers)) > 1:
            order = sorted(set(numbers))
            assert sample.segments[: len(here)].tolist() == [order.index(d) + 1 for d in numbers]
            assert sample.positions[: len(here)].tolist() == [i - numbers.index(d) for i, d in enumerate(numbers)]
        labels += sample.labels.tolist()
    assert labels[: len(expected)] == expected
    assert set(labels[len(expected) :]) <= {-100}
