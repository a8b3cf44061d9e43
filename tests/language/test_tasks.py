"""Task models learn tasks that can be learned, answer raw texts, and keep their order, labels and archives."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import nemolet as nl
from nemolet.data.encoding import TextEncoding
from nemolet.data.schemes import scheme_for
from nemolet.language import (
    AnswerLoss,
    ClassLoss,
    ContrastiveLoss,
    LabelF1,
    MultiLabelLoss,
    NgramEncoder,
    QuestionAnswerer,
    RequestTagger,
    SentenceEmbedder,
    SpanF1,
    TagLoss,
    TextClassifier,
    TokenClassifier,
    chain_log_likelihood,
    fill,
    likeliest_chain,
    span_score,
    spans_of,
)
from nemolet.language.crf import forbidden_transitions
from nemolet.language.tasks import width_of
from nemolet.tokenizers import ByteTokenizer
from nemolet.types import IGNORED, HiddenBTD, MaskBT, TokenIdsBT

BYTES = ByteTokenizer()


@nl.register
class Mean(nl.NeuralModule):
    """The smallest encoder that looks both ways."""

    def __init__(self, *, width: int = 8) -> None:
        super().__init__(V=257, D=width)
        self.embed = nl.nn.Embedding("V", "D", 257, width, init_std=0.5)

    def forward(self, tokens: TokenIdsBT, mask: MaskBT | None = None) -> HiddenBTD:
        hidden = self.embed(tokens)
        keep = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        mean = (hidden * keep[..., None]).sum(1, keepdim=True) / keep.sum(1)[:, None, None]
        return hidden + mean


def models():
    return {
        "classes": TextClassifier(encoder=Mean(), labels=["a", "b", "c"]),
        "labels": TextClassifier(encoder=Mean(), labels=["a", "b", "c"], multi_label=True),
        "tags": TokenClassifier(encoder=Mean(), labels=["O", "B-x", "I-x"], crf=True),
        "requests": RequestTagger(encoder=Mean(), intents=["go", "stop"], slots=["O", "B-x", "I-x"]),
        "answers": QuestionAnswerer(encoder=Mean(), context=64),
        "vectors": SentenceEmbedder(encoder=Mean()),
    }


RECORDS = [
    {"text": text, "question": "who?", "context": text}
    for text in ("one two three", "a", "zwei und drei", "four", "the last one")
]


@pytest.mark.parametrize("name", list(models()))
def test_predictions_do_not_depend_on_the_batch_and_keep_their_order(name):
    torch.manual_seed(0)
    model = models()[name]
    together = model.predict(BYTES, RECORDS)
    alone = [model.predict(BYTES, [record])[0] for record in RECORDS]
    assert [_rounded(a) for a in together] == [_rounded(a) for a in alone]
    assert model.training


def _rounded(value):
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", list(models()))
def test_an_archive_gives_the_same_answers(name, tmp_path):
    torch.manual_seed(1)
    model = models()[name].eval()
    archive = nl.load(nl.save(tmp_path / "m.nemolet", model=model, tokenizer=BYTES))
    assert archive.model.predict(archive.tokenizer, RECORDS) == model.predict(BYTES, RECORDS)
    assert set(nl.parameter_axes(model)) == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("name", list(models()))
def test_a_model_fits_the_loss_and_the_measures_it_names(name):
    from nemolet.training import training_graph

    model = models()[name]
    fields = ("tokens", "mask", *model.objective().input_ports)
    graph = training_graph(model, model.objective(), model.measures(), fields=fields)
    assert {"loss", "count"} <= set(graph.output_ports)
    assert {f"{m}_part" for m in model.measures()} <= set(graph.output_ports)
    assert "mask" in graph.input_ports


def test_an_empty_text_is_refused_with_its_place():
    with pytest.raises(nl.NemoletError, match="text 1: the text is empty"):
        models()["classes"].classify(BYTES, ["fine", " "])


def test_a_long_sentence_is_tagged_as_far_as_the_context():
    model = TokenClassifier(encoder=Mean(), labels=["O", "B-x"], context=8)
    model.too_long = "truncate"
    tagged = model.tag(BYTES, [["ab", "cd", "ef", "gh"]])[0]
    assert len(tagged.tags) == 4
    assert tagged.tags[2:] == ("O", "O")


def test_an_encoder_has_to_say_its_width():
    class Silent(nl.NeuralModule):
        def forward(self, tokens: TokenIdsBT) -> HiddenBTD:
            return F.one_hot(tokens).float()

    with pytest.raises(nl.NemoletError, match="no known width"):
        width_of(Silent())


def test_the_encoder_of_bert_fits_every_task():
    encoder = nl.language.NgramEncoder(vocab_size=257, width=8, buckets=16, layers=1, heads=2)
    model = TextClassifier(encoder=encoder, labels=["a", "b"], pooling="first")
    assert model(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 2)


# ---------------------------------------------------------------------------------------- learning


def learn(model, batch, steps=60, lr=0.1):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    graph = nl.training.training_graph(model, model.objective(), fields=("mask",))
    for _ in range(steps):
        optimizer.zero_grad()
        result = graph(**batch)
        (result.loss / result.count).backward()
        optimizer.step()
    return (result.loss / result.count).item()


def test_a_classifier_learns_which_letter_is_there():
    torch.manual_seed(0)
    texts = [c * n for c in "abc" for n in (1, 3, 5)]
    encoding = TextEncoding(BYTES, 16)
    samples = [{"tokens": encoding.text(t, ""), "labels": "abc".index(t[0])} for t in texts]
    from nemolet.data import LabelledTexts, collate

    model = TextClassifier(encoder=Mean(), labels=list("abc"), dropout=0.0)
    learn(model, collate(samples, LabelledTexts.PORTS))
    assert [c.label for c in model.classify(BYTES, texts)] == [t[0] for t in texts]


def test_an_embedder_brings_partners_together():
    torch.manual_seed(0)
    from nemolet.data import SimilarTexts, collate

    encoding = TextEncoding(BYTES, 16)
    pairs = [("a", "x"), ("b", "y"), ("c", "z")]
    samples = [{"tokens": encoding.text(a, ""), "other_tokens": encoding.text(b, "")} for a, b in pairs]
    model = SentenceEmbedder(encoder=Mean())
    learn(model, collate(samples, SimilarTexts.PORTS), steps=40)
    found = model.search(BYTES, ["a", "b", "c"], ["z", "y", "x"], top=1)
    assert [f[0].index for f in found] == [2, 1, 0]
    assert model.embed(BYTES, ["a"]).norm().item() == pytest.approx(1.0, abs=1e-5)


def test_a_hole_is_filled():
    class Knows(nl.NeuralModule):
        context = 16

        def __init__(self):
            super().__init__(V=3)
            self.weight = torch.nn.Parameter(torch.zeros(3))

        def forward(self, tokens: TokenIdsBT, mask: MaskBT | None = None) -> nl.types.LogitsBTV:
            return self.weight + F.one_hot(torch.full_like(tokens, 1), 3) * 9.0

    tokenizer = nl.tokenizers.SentencePieceTokenizer.train(["a b"] * 9, vocab_size=263, special_tokens=["<mask>"])
    assert len(fill(Knows(), tokenizer, ["a <mask> c"], hole="<mask>", top=2)[0]) == 2
    with pytest.raises(nl.NemoletError, match="needs one hole"):
        fill(Knows(), tokenizer, ["none"], hole="<mask>")


# ---------------------------------------------------------------------------------------- losses


def test_losses_are_sums_over_what_has_a_label():
    logits = torch.randn(3, 4)
    loss, count = ClassLoss()(logits, torch.tensor([1, IGNORED, 2]))
    assert torch.allclose(loss, F.cross_entropy(logits[[0, 2]], torch.tensor([1, 2]), reduction="sum"))
    assert count == 2
    targets = torch.tensor([[1, 0, 1, 0]] * 3)
    loss, count = MultiLabelLoss()(logits, targets)
    assert torch.allclose(loss, F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="sum"))
    assert count == 12
    first, last = torch.randn(2, 5), torch.randn(2, 5)
    loss, count = AnswerLoss()(first, last, torch.tensor([1, 2]), torch.tensor([3, 4]))
    expected = F.cross_entropy(first, torch.tensor([1, 2]), reduction="sum")
    expected = (expected + F.cross_entropy(last, torch.tensor([3, 4]), reduction="sum")) / 2
    assert torch.allclose(loss, expected)
    vectors = F.normalize(torch.randn(4, 3), dim=-1)
    loss, count = ContrastiveLoss(temperature=0.1)(vectors, vectors)
    assert torch.allclose(loss, F.cross_entropy(vectors @ vectors.T / 0.1, torch.arange(4), reduction="sum"), atol=1e-5)


def test_f1_of_several_labels_is_that_of_sklearn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference")
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 5), (torch.rand(20, 5) < 0.4).long()
    share = LabelF1()(logits, labels)
    expected = metrics.f1_score(labels.numpy(), (logits > 0).int().numpy(), average="micro")
    assert float(share.part / share.whole) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------- chains


def brute(logits_UV, transitions_PV):
    """Score of every chain."""
    words, tags = logits_UV.shape
    scores = {}
    for chain in itertools.product(range(tags), repeat=words):
        score = transitions_PV[tags, chain[0]] + transitions_PV[tags + 1, chain[-1]]
        score = score + sum(logits_UV[u, t] for u, t in enumerate(chain))
        scores[chain] = score + sum(transitions_PV[a, b] for a, b in itertools.pairwise(chain))
    return scores


def test_chains_are_those_of_brute_force():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 3, dtype=torch.double, requires_grad=True)
    transitions = torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    labels = torch.tensor([[0, 1, 2, 0], [2, 1, IGNORED, IGNORED], [1, IGNORED, IGNORED, IGNORED]])
    lengths = (labels != IGNORED).sum(1)
    found = chain_log_likelihood(logits, transitions, labels)
    expected = []
    for row, length in enumerate(lengths.tolist()):
        scores = brute(logits[row, :length], transitions)
        gold = tuple(labels[row, :length].tolist())
        expected.append(scores[gold] - torch.logsumexp(torch.stack([*scores.values()]), 0))
        best = max(scores, key=lambda chain: float(scores[chain].detach()))
        assert tuple(likeliest_chain(logits, transitions, lengths)[row, :length].tolist()) == best
    assert torch.allclose(found, torch.stack(expected))
    ours = torch.autograd.grad(found.sum(), (logits, transitions))
    theirs = torch.autograd.grad(torch.stack(expected).sum(), (logits, transitions))
    for mine, real in zip(ours, theirs):
        assert torch.allclose(mine, real)


def test_a_chain_never_continues_what_did_not_begin():
    labels = ["O", "B-x", "I-x", "B-y", "I-y"]
    logits = torch.randn(50, 6, 5, generator=torch.Generator().manual_seed(0)) * 3
    rows = likeliest_chain(logits, forbidden_transitions(labels, scheme_for(labels)), torch.full((50,), 6))
    for row in rows.tolist():
        for before, tag in itertools.pairwise(["O", *(labels[t] for t in row)]):
            assert not tag.startswith("I-") or before[2:] == tag[2:]


def test_the_loss_of_tags_is_cross_entropy_without_transitions():
    logits, labels = torch.randn(2, 3, 4), torch.tensor([[1, 2, IGNORED], [0, IGNORED, IGNORED]])
    loss, count = TagLoss()(logits, labels)
    kept = labels != IGNORED
    assert torch.allclose(loss, F.cross_entropy(logits[kept], labels[kept], reduction="sum"))
    chained, _ = TagLoss()(logits, labels, torch.zeros(6, 4))
    assert torch.allclose(chained, loss, atol=1e-5)
    assert count == 3


# ---------------------------------------------------------------------------------------- spans


def random_tags(seed, count=200):
    generator = torch.Generator().manual_seed(seed)
    names = ["O", "B-a", "I-a", "B-b", "I-b"]
    return [[names[i] for i in torch.randint(5, (n % 9 + 1,), generator=generator).tolist()] for n in range(count)]


def test_spans_are_those_of_seqeval():
    sequence = pytest.importorskip("seqeval.metrics", reason="seqeval is the reference")
    gold, said = random_tags(0), random_tags(1)
    for tags in gold:
        assert [(s.label, s.start, s.end - 1) for s in spans_of(tags)] == sequence.sequence_labeling.get_entities(tags)
    score = span_score(said, gold)
    assert score.f1 == pytest.approx(sequence.f1_score(gold, said))
    assert score.right / score.predicted == pytest.approx(sequence.precision_score(gold, said))


def test_the_metric_adds_up_over_batches():
    labels = ["O", "B-a", "I-a", "B-b", "I-b"]
    gold, said = random_tags(2, 40), random_tags(3, 40)
    parts = []
    for start in range(0, 40, 10):
        rows = list(zip(gold, said))[start : start + 10]
        longest = max(len(g) for g, _ in rows)
        target = torch.full((10, longest), IGNORED)
        logits = torch.zeros(10, longest, 5)
        for i, (g, s) in enumerate(rows):
            target[i, : len(g)] = torch.tensor([labels.index(t) for t in g])
            logits[i, torch.arange(len(s)), torch.tensor([labels.index(t) for t in s])] = 1.0
        parts.append(SpanF1(labels=labels)(logits, target))
    part, whole = (sum(int(x) for x in side) for side in zip(*parts))
    assert part / whole == pytest.approx(span_score(said, gold).f1)


# ---------------------------------------------------------------------------------------- the encoder


def test_padding_changes_nothing_that_is_not_padding():
    torch.manual_seed(0)
    encoder = NgramEncoder(vocab_size=20, width=8, buckets=64, layers=1, heads=2).eval()
    tokens = torch.randint(20, (1, 5))
    padded = torch.cat([tokens, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    mask = torch.tensor([[True] * 5 + [False] * 4])
    assert torch.allclose(encoder(tokens), encoder(padded, mask)[:, :5], atol=1e-6)


def test_runs_of_tokens_have_rows_of_their_own():
    embed = NgramEncoder(vocab_size=50, width=8, buckets=1 << 15).embed
    tokens = torch.tensor([[1, 2, 3, 1, 2, 3], [2, 1, 3, 9, 2, 3]])
    two, three = embed.rows(tokens, 2), embed.rows(tokens, 3)
    assert two[0, 1] == two[0, 4] != two[1, 1]
    assert three[0, 2] == three[0, 5] != three[1, 5]
    assert two[0, 2] == two[0, 5] == two[1, 5]
