"""Every kind of bad text goes through the commands: an error with file and line, or a policy that is told."""

from __future__ import annotations

import json

import pytest
import torch

import nemolet as nl
from nemolet.cli import main
from nemolet.language import CausalLM, NgramEncoder, QuestionAnswerer, SentenceEmbedder, TextClassifier, TokenClassifier
from nemolet.tokenizers import ByteTokenizer

CONTEXT = 24
SMALL = ["tokenizer=byte", "model.encoder.width=16", "model.encoder.buckets=64", f"model.context={CONTEXT}"]
SMALL += ["data.batch_size=4", "schedule.warmup_steps=1", "trainer.loggers=[]", "trainer.progress=false"]
SMALL += ["trainer.max_steps=2", "trainer.valid_every=2", "folder=run"]
CLASSIFY = ["train", "model=text_classifier", "data=labelled", "loss=text_classes", "data.path=in.jsonl", *SMALL]
TAG = ["train", "model=token_classifier", "data=tagged", "loss=tags", "data.path=in.conll", *SMALL]
GOOD = [{"text": f"word {i}", "label": "ab"[i % 2]} for i in range(12)]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Untrained models of tasks, by name."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)

    def encoder():
        return NgramEncoder(vocab_size=257, width=8, buckets=16)

    models = {
        "classes": TextClassifier(encoder=encoder(), labels=["a", "b"], context=CONTEXT),
        "tags": TokenClassifier(encoder=encoder(), labels=["O", "B-x", "I-x"], context=CONTEXT, crf=True),
        "answers": QuestionAnswerer(encoder=encoder(), context=CONTEXT),
        "vectors": SentenceEmbedder(encoder=encoder(), context=CONTEXT),
        "words": CausalLM(vocab_size=257, layers=1, width=8, heads=2, context=32),
        "others": CausalLM(vocab_size=257, layers=1, width=8, heads=2, context=32),
    }
    return {n: nl.save(folder / f"{n}.nemolet", model=m, tokenizer=ByteTokenizer()) for n, m in models.items()}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *command):
    status = main([str(word) for word in command])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return status, out, err


def jsonl(tmp_path, rows):
    (tmp_path / "in.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))


LONG = "a long text " * 4
BAD = {  # model, what is on the second line, what is said of it
    "empty text": ("classes", {"text": " "}, "the record lacks what the model reads"),
    "nothing but control characters": ("tags", {"words": ["", " "]}, "the text is empty"),
    "no text": ("classes", {"txt": "a"}, "the record lacks what the model reads"),
    "a number": ("vectors", {"text": 7}, "the record lacks what the model reads"),
    "a list for a text": ("classes", {"text": ["a"]}, "this is no text"),
    "words that are numbers": ("tags", {"words": ["a", 1]}, "this is no text"),
    "a lone surrogate": ("classes", '{"text": "a \\ud800 b"}', "a lone surrogate is not text"),
    "no JSON": ("classes", '{"text": "a"', "the line is no JSON"),
    "a list": ("classes", "[1]", "the line is no record"),
    "beyond the context": ("classes", {"text": LONG}, "the text is longer than the context"),
    "beyond the context, in words": ("tags", {"text": LONG}, "the text is longer than the context"),
    "beyond the context, a vector": ("vectors", {"text": LONG}, "the text is longer than the context"),
    "a question that fills the context": (
        "answers",
        {"question": "why " * 5, "context": "a"},
        "the question leaves no room for the text",
    ),
    "an empty question": ("answers", {"question": "", "context": "a"}, "the record lacks what the model reads"),
}


@pytest.mark.parametrize("name", BAD)
def test_predict_names_the_line(name, archives, tmp_path, capsys):
    model, bad, said = BAD[name]
    jsonl(tmp_path, [{"text": "fine", "question": "who?", "context": "Anna"}, bad])
    status, _, err = run(capsys, "predict", f"archive={archives[model]}", "input=in.jsonl", "out=a.jsonl")
    assert status == 1
    assert f"in.jsonl:2: {said}" in err
    assert "expected" in err and "found" in err
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("model", ["classes", "tags", "vectors"])
def test_texts_beyond_the_context_are_cut_or_read_in_windows_when_asked(model, archives, tmp_path, capsys):
    jsonl(tmp_path, [{"text": LONG}, {"text": LONG[: CONTEXT - 1]}])
    command = ["predict", f"archive={archives[model]}", "input=in.jsonl"]
    assert run(capsys, *command, "too_long=truncate", "out=cut.jsonl")[0] == 0
    assert run(capsys, *command, "too_long=window", "out=parts.jsonl")[0] == 0
    cut, short = (json.loads(line) for line in (tmp_path / "cut.jsonl").read_text().splitlines())
    parts, again = (json.loads(line) for line in (tmp_path / "parts.jsonl").read_text().splitlines())
    assert short == again
    if model == "tags":
        assert len(cut["tags"]) == len(parts["tags"]) == len(LONG.split())
    else:
        assert cut == short != parts
    status, _, err = run(capsys, *command, "too_long=skip", "out=a.jsonl")
    assert status == 2 and "too_long" in err


def test_a_model_that_always_reads_in_windows_has_no_choice(archives, tmp_path, capsys):
    jsonl(tmp_path, [{"question": "who?", "context": "Anna " * 30}])
    command = ["predict", f"archive={archives['answers']}", "input=in.jsonl", "out=a.jsonl"]
    assert run(capsys, *command)[0] == 0
    status, _, err = run(capsys, *command, "too_long=window")
    assert status == 2 and "this model has no choice" in err


def test_labels_outside_the_label_set_are_listed_before_training(tmp_path, capsys):
    jsonl(tmp_path, [*GOOD, {"text": "a", "label": "aa"}, {"text": "a", "label": "c"}])
    status, _, err = run(capsys, *CLASSIFY, "data.labels=[a,b]")
    assert status == 1
    assert "in.jsonl:13: 2 labels are not in the label set" in err
    assert "in.jsonl:14: 'c'" in err and "did you mean 'a'?" in err
    assert not (tmp_path / "run").exists()


def test_evaluation_refuses_labels_that_the_model_does_not_know(archives, tmp_path, capsys):
    jsonl(tmp_path, [*GOOD, {"text": "a", "label": "c"}])
    status, _, err = run(capsys, "evaluate", f"archive={archives['classes']}", "data=labelled", "data.path=in.jsonl")
    assert status == 1 and "in.jsonl:13: 1 labels are not in the label set" in err


@pytest.mark.parametrize(
    "bad, said, policy, count",
    [
        ({"text": " ", "label": "a"}, "the text is empty", "data.empty=skip", "left out (empty)"),
        ({"text": LONG, "label": "a"}, "longer than the context", "data.too_long=skip", "left out (longer than"),
        ({"text": LONG, "label": "a"}, "longer than the context", "data.too_long=truncate", "cut after"),
    ],
)
def test_training_refuses_bad_texts_or_counts_them(bad, said, policy, count, tmp_path, capsys):
    jsonl(tmp_path, [*GOOD, bad])
    status, _, err = run(capsys, *CLASSIFY)
    assert status == 1 and f"in.jsonl:13: the text is {said.removeprefix('the text is ')}" in err
    assert not (tmp_path / "run").exists()
    status, out, err = run(capsys, *CLASSIFY, policy)
    assert status == 0
    assert f"1 {count}" in out + err or count in out + err


def test_tags_of_another_scheme_are_refused_by_name(tmp_path, capsys):
    (tmp_path / "in.conll").write_text("Rome\tB-city\nis\tO\nRome\tI-city\n\n" * 12)
    status, _, err = run(
        capsys, *TAG, "model.scheme=bioes", "model.labels=[O,B-city,L-city]", "data.labels=[O,B-city,I-city]"
    )
    assert status != 0
    status, _, err = run(capsys, *TAG, "model.scheme=ioe2")
    assert status != 0 and "scheme" in err
    assert run(capsys, *TAG)[0] == 0
    assert nl.load(tmp_path / "run" / "model.nemolet").model.head.never.min() == 0  # no rules: none fits


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch escaped') }}",
        "{% for m in messages %}{{ m.update(role='x') }}{% endfor %}",
        "{{ raise_exception.__globals__ }}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(template, archives, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 12)
    (tmp_path / "t.jinja").write_text(template)
    command = ["finetune", f"archive={archives['words']}", "data=instructions", "data.path=in.jsonl", "folder=run"]
    options = ["schedule.warmup_steps=1", "trainer.max_steps=2", "trainer.loggers=[]", "data.batch_size=2"]
    quoted = json.dumps(template)
    status, _, err = run(capsys, *command, *options, f"data.template={quoted}")
    assert status == 1
    said = ("tries to leave its sandbox", "the template fails", "nothing here is said by the assistant")
    assert any(words in err for words in said), err
    assert not (tmp_path / "escaped").exists() and not (tmp_path / "run").exists()


def test_an_adapter_of_another_base_is_refused(archives, tmp_path, capsys):
    model = nl.load(archives["words"]).model
    nl.nn.adapt(model, nl.nn.Adapter(rank=2, targets=("attention.qkv",)))
    nl.nn.save_adapter(model, tmp_path / "adapter")
    status, _, err = run(capsys, "convert", "from=adapter", "to=peft", f"base={archives['others']}")
    assert status != 0
    assert "this adapter belongs to another base model" in err
    assert not (tmp_path / "peft").exists()
