"""Each scheme of tags: its spans are those of seqeval, its chains never break its rules."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import nemolet as nl
from nemolet.data import TaggedWords
from nemolet.data.schemes import SCHEMES, scheme_for, scheme_of
from nemolet.language import NgramEncoder, TagLoss, TokenClassifier, likeliest_chain, span_score, spans_of
from nemolet.language.crf import forbidden_transitions
from nemolet.language.spans import TagSpan
from nemolet.tokenizers import ByteTokenizer

NAMES = [name for name in SCHEMES if name != "free"]
STRICT = {
    "iob1": "IOB1",
    "iob2": "IOB2",
    "ioe2": "IOE2",
    "bioes": "IOBES",
    "bilou": "BILOU",
}  # seqeval's IOE1 is unfinished


def written(name, kind, length, joins_before, joins_after):
    """The tags of one span by the definition of its scheme; it may touch one of its own kind on either side."""
    tags = ["I"] * length
    if name == "iob2" or (name == "iob1" and joins_before):
        tags[0] = "B"
    if name == "ioe2" or (name == "ioe1" and joins_after):
        tags[-1] = "E"
    if name in ("bioes", "bilou"):
        first, last, only = "BES" if name == "bioes" else "BLU"
        tags = [only] if length == 1 else [first, *tags[2:], last]
    return [f"{mark}-{kind}" for mark in tags]


def sentence(name, seed):
    """Spans, and the tags that write them."""
    generator = random.Random(seed)
    parts = [(generator.choice(["a", "b", ""]), generator.randint(1, 4)) for _ in range(generator.randint(0, 7))]
    spans, tags = [], []
    for index, (kind, length) in enumerate(parts):
        if not kind:
            tags += ["O"] * length
            continue
        before = parts[index - 1][0] if index else ""
        after = parts[index + 1][0] if index + 1 < len(parts) else ""
        spans.append(TagSpan(kind, len(tags), len(tags) + length))
        tags += written(name, kind, length, before == kind, after == kind)
    return spans, tags


def label_set(name):
    return ["O", *(f"{mark}-{kind}" for mark in SCHEMES[name].marks for kind in "ab")]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_scheme_writes_is_read(name):
    sequence = pytest.importorskip("seqeval.metrics.sequence_labeling", reason="seqeval is the reference")
    scheme = pytest.importorskip("seqeval.scheme")
    for seed in range(200):
        spans, tags = sentence(name, seed)
        assert spans_of(tags) == spans
        if name in STRICT:
            entities = scheme.Entities([tags], getattr(scheme, STRICT[name])).entities[0]
            assert [(e.tag, e.start, e.end) for e in entities] == spans
        if name != "bilou":  # which seqeval reads only when it is told
            assert [(kind, start, end + 1) for kind, start, end in sequence.get_entities(tags)] == spans


@pytest.mark.parametrize("name", ["iob2", "ioe2", "bioes"])
def test_broken_tags_are_read_as_by_seqeval(name):
    sequence = pytest.importorskip("seqeval.metrics.sequence_labeling", reason="seqeval is the reference")
    generator = random.Random(0)
    rows = [generator.choices(label_set(name), k=generator.randint(1, 9)) for _ in range(400)]
    for tags in rows:
        assert [(s.label, s.start, s.end - 1) for s in spans_of(tags)] == sequence.get_entities(tags), tags
    score = span_score(
        rows[:200], [row[: len(said)] + ["O"] * (len(said) - len(row)) for row, said in zip(rows[200:], rows)]
    )
    assert 0 < score.f1 < 1


@pytest.mark.parametrize("name", NAMES)
def test_rules_allow_all_that_a_scheme_writes_and_forbid_the_rest(name):
    labels = label_set(name)
    forbidden = forbidden_transitions(labels, SCHEMES[name]) < 0
    seen = torch.zeros_like(forbidden)
    for seed in range(3000):
        rows = [labels.index(tag) for tag in sentence(name, seed)[1]]
        for before, after in itertools.pairwise([len(labels), *rows]):
            seen[before, after] = True
    assert torch.equal(seen[:-1], ~forbidden[:-1])
    assert not forbidden[-1].any()  # a sentence may be cut anywhere


@pytest.mark.parametrize("name", NAMES)
def test_the_likeliest_chain_keeps_the_rules(name):
    labels = label_set(name)
    logits = torch.randn(40, 6, len(labels), generator=torch.Generator().manual_seed(0)) * 3
    forbidden = forbidden_transitions(labels, SCHEMES[name])
    for row in likeliest_chain(logits, forbidden, torch.full((40,), 6)).tolist():
        assert all(forbidden[a, b] == 0 for a, b in itertools.pairwise([len(labels), *row]))


def test_the_scheme_of_labels_follows_from_their_marks():
    for name in NAMES:
        assert scheme_for(label_set(name), name).name == name
        assert scheme_for(label_set(name)).name == {"iob1": "iob2", "ioe1": "ioe2"}.get(name, name)
        assert scheme_for(label_set(name), "free").name == "free"
    assert scheme_for(["NOUN", "VERB", "X-ray"]).name == "free"
    assert scheme_for(["O", "I-x"]).name == "iob1"
    with pytest.raises(nl.NemoletError, match=r"belong to another scheme(.|\n)*set scheme to bioes or free"):
        scheme_for(["O", "S-x"], "iob2")
    with pytest.raises(nl.NemoletError, match=r"belong to no scheme(.|\n)*set scheme to free"):
        TokenClassifier(encoder=NgramEncoder(vocab_size=257, width=8, buckets=16), labels=["O", "S-x", "L-x"], crf=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_takes_the_scheme_of_its_data_so_no_label_is_impossible(name, tmp_path):
    sentences = [tags for seed in range(300) if (tags := sentence(name, seed)[1])]
    assert scheme_of(sentences) == name
    rows = "\n\n".join("\n".join(f"w\t{tag}" for tag in tags) for tags in sentences)
    (tmp_path / "t.conll").write_text(rows)
    data = TaggedWords(path=str(tmp_path / "t.conll")).prepare(ByteTokenizer())
    assert data.sizes["scheme"] == name
    names = {key: data.sizes[key] for key in ("labels", "scheme")}
    model = TokenClassifier(encoder=NgramEncoder(vocab_size=257, width=8, buckets=16), crf=True, **names).eval()
    batch = next(iter(data.valid_loader()))
    scores = model(batch["tokens"], batch["words"], batch["mask"])
    loss, count = TagLoss()(scores.logits, batch["labels"], scores.transitions)
    assert loss / count < 10


def test_tags_that_follow_no_scheme_are_learned_without_rules():
    assert scheme_of([["O", "I-x"], ["B-x", "B-x"], ["I-x", "B-x"], ["B-x"]]) == "free"
    assert scheme_of([["NOUN"], ["VERB", "NOUN"]]) == "free"
    assert scheme_of([]) == "free"


def test_a_model_with_many_tags_is_kept(tmp_path):
    tags = ["O", *(f"{mark}-{name}" for name in range(60) for mark in "BI")]
    model = TokenClassifier(encoder=NgramEncoder(vocab_size=300, width=8, buckets=16), labels=tags, crf=True)
    kept = nl.load(nl.save(tmp_path / "tags.nemolet", model=model)).model
    rules = model.eval()(torch.zeros(1, 2, dtype=torch.long), torch.tensor([[0, 1]])).transitions
    assert torch.equal(kept.eval()(torch.zeros(1, 2, dtype=torch.long), torch.tensor([[0, 1]])).transitions, rules)
