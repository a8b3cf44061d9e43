"""Tasks from a table to answers: train, evaluate, predict; and what is said about bad input."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

import nemolet as nl
from nemolet.cli import main
from nemolet.cli import predict as verb
from nemolet.nn.adapter_files import save_adapter
from nemolet.nn.adapters import Adapter, adapt, adapted_layers

SHORT = [
    "tokenizer=byte",
    "model.encoder.width=16",
    "model.encoder.buckets=64",
    "model.context=32",
    "data.batch_size=8",
    "optim.lr=2e-2",
    "schedule.warmup_steps=1",
    "trainer.valid_every=60",
    "trainer.loggers=[]",
    "trainer.progress=false",
]
WORDS = ["red", "green", "blue", "black"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier that tells two kinds of words apart."""
    folder = tmp_path_factory.mktemp("task")
    rows = [
        {"text": f"{w} {i % 5}", "label": "cool" if w.startswith("b") else "warm"} for i in range(12) for w in WORDS
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ["model=text_classifier", "data=labelled", "loss=text_classes", f"data.path={folder / 'train.jsonl'}"]
    assert main(["train", *task, *SHORT, "trainer.max_steps=60", f"folder={folder / 'run'}"]) == 0
    return folder


def succeed(capsys, *command):
    assert main(list(map(str, command))) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def fail(capsys, status, *command):
    assert main(list(map(str, command))) == status
    return capsys.readouterr().err


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_trained_classifier_is_evaluated_on_its_task(trained, capsys):
    header = (trained / "run" / "metrics.csv").read_text().splitlines()[0]
    assert "accuracy" in header
    archive = f"archive={trained / 'run' / 'model.nemolet'}"
    out = succeed(capsys, "evaluate", archive, "data=labelled", f"data.path={trained / 'train.jsonl'}")
    assert "accuracy 1.0000" in out
    assert "over 48 examples" in out
    err = fail(capsys, 2, "evaluate", archive)
    assert "this data has no examples" in err


def test_answers_are_in_the_order_of_the_records(trained, capsys, tmp_path):
    rows = [{"id": i, "text": WORDS[i % 4] * (1 + i % 3)} for i in range(30)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["predict", f"archive={trained / 'run' / 'model.nemolet'}", "input=in.jsonl", "out=out/a.jsonl"]
    assert "30 answers: out/a.jsonl" in succeed(capsys, *command)
    found = answers(tmp_path / "out" / "a.jsonl")
    assert [a["id"] for a in found] == list(range(30))
    assert [a["label"] for a in found] == ["cool" if r["text"].startswith("b") else "warm" for r in rows]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.jsonl"}


def test_the_folder_of_a_run_stands_for_its_archive(trained, capsys, tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(WORDS))
    assert "4 answers" in succeed(capsys, "predict", f"archive={trained / 'run'}", "input=in.txt", "out=a.jsonl")


def test_a_broken_run_goes_on_and_ends_the_same(trained, capsys, tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("\n".join(WORDS * 5))
    command = ["predict", f"archive={trained / 'run' / 'model.nemolet'}", "input=in.txt"]
    succeed(capsys, *command, "out=whole.jsonl")
    monkeypatch.setattr(verb, "_CHUNK", 6)
    model = nl.language.TextClassifier
    real, calls = model.predict, []

    def breaks(self, tokenizer, records):
        calls.append(len(records))
        if len(calls) == 3:
            raise nl.errors.DataError("the light went out")
        return real(self, tokenizer, records)

    monkeypatch.setattr(model, "predict", breaks)
    fail(capsys, 1, *command, "out=cut.jsonl")
    partial = tmp_path / ".cut.jsonl.partial"
    partial.write_text(partial.read_text() + '{"half')
    monkeypatch.setattr(model, "predict", real)
    assert "20 answers, 12 of them from an earlier run" in succeed(capsys, *command, "out=cut.jsonl")
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_memory_does_not_depend_on_how_many_records_there_are(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "_CHUNK", 8)
    monkeypatch.setattr(
        nl.language.TextClassifier, "predict", lambda self, tokenizer, records: [{"n": len(r["text"])} for r in records]
    )
    command = ["predict", f"archive={trained / 'run' / 'model.nemolet'}", "out=a.jsonl"]
    lines = [f"{number} " + "x" * 2000 for number in range(2000)]
    (tmp_path / "in.txt").write_text("\n".join(lines))
    (tmp_path / "one.txt").write_text(lines[0])
    succeed(capsys, *command, "input=one.txt")  # what is imported and loaded is not counted
    tracemalloc.start()
    assert "2,000 answers" in succeed(capsys, *command, "input=in.txt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # the file has twice as many bytes
    assert [a["n"] for a in answers(tmp_path / "a.jsonl")] == [len(line) for line in lines]


KILLED = """
import json, os, signal, sys
from nemolet.cli import main, predict
calls, real = 0, json.dumps
def dumps(value, **options):
    global calls
    calls += "label" in value
    if calls == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real({**value, "long": "x" * 3000} if "label" in value else value, **options)
json.dumps, predict._CHUNK = dumps, 4
raise SystemExit(main(sys.argv[2:]))
"""


def test_a_killed_run_goes_on_with_every_line_whole_and_once(trained, capsys, tmp_path, monkeypatch):
    rows = [{"id": i, "text": f"{WORDS[i % 4]} {i}"} for i in range(22)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["predict", f"archive={trained / 'run' / 'model.nemolet'}", "input=in.jsonl", "out=a.jsonl"]
    partial = tmp_path / ".a.jsonl.partial"
    for call in (7, 12):  # within the second chunk of the first run, and within the third of the second
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", KILLED, str(call), *command], env=environment, check=False)
        assert done.returncode == -signal.SIGKILL
        with partial.open("ab") as file:
            file.write(b'{"id": 7, "lab')  # a buffer may reach the file before its line is whole
    monkeypatch.setattr(verb, "_CHUNK", 4)
    assert "22 answers, 1" in succeed(capsys, *command)
    found = answers(tmp_path / "a.jsonl")
    assert [a["id"] for a in found] == list(range(22))
    assert [a["label"] for a in found] == ["cool" if r["text"].startswith("b") else "warm" for r in rows]
    assert "long" in found[11] and "long" not in found[-1]
    assert not list(tmp_path.glob(".a.jsonl*"))


def changed_labels(trained, tmp_path):
    archive = nl.load(trained / "run" / "model.nemolet")
    archive.model.labels = ("hot", "cold")
    model = nl.language.TextClassifier(encoder=archive.model.encoder, labels=["hot", "cold"], context=32)
    model.load_state_dict(archive.model.state_dict())
    nl.save(tmp_path / "other.nemolet", model=model, tokenizer=archive.tokenizer)
    return ["archive=other.nemolet", "input=in.txt"]


def changed_input(trained, tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(["green", *WORDS]))
    return [f"archive={trained / 'run'}", "input=in.txt"]


def changed_setting(trained, tmp_path):
    return [f"archive={trained / 'run'}", "input=in.txt", "too_long=truncate"]


def broken(trained, tmp_path, monkeypatch):
    """A run that leaves three of four answers behind."""
    (tmp_path / "in.txt").write_text("\n".join(WORDS))
    model = nl.language.TextClassifier
    real = model.predict
    with monkeypatch.context() as patch:
        patch.setattr(verb, "_CHUNK", 2)
        patch.setattr(
            model,
            "predict",
            lambda self, tokenizer, records: real(self, tokenizer, records)[: len(records) - ("blue" in str(records))],
        )
        with pytest.raises(ValueError, match="shorter"):  # the second chunk fails
            main(["predict", f"archive={trained / 'run'}", "input=in.txt", "out=a.jsonl"])
    assert len((tmp_path / ".a.jsonl.partial").read_text().splitlines()) == 3


def test_a_setting_that_says_what_holds_anyway_changes_nothing(trained, capsys, tmp_path, monkeypatch):
    broken(trained, tmp_path, monkeypatch)
    command = ["predict", f"archive={trained / 'run'}", "input=in.txt", "out=a.jsonl", "too_long=error"]
    assert "4 answers, 3 of them from an earlier run" in succeed(capsys, *command)


@pytest.mark.parametrize(
    "change, said",
    [(changed_labels, "another model"), (changed_input, "another input"), (changed_setting, "another too_long")],
)
def test_answers_of_another_model_input_or_setting_are_not_kept(trained, capsys, tmp_path, monkeypatch, change, said):
    broken(trained, tmp_path, monkeypatch)
    command = ["predict", *change(trained, tmp_path), "out=a.jsonl"]
    out = succeed(capsys, *command)
    assert "starting again: the answers so far have" in out and said in out
    assert "from an earlier run" not in out
    found = [a["label"] for a in answers(tmp_path / "a.jsonl")]
    assert len(found) == len((tmp_path / "in.txt").read_text().splitlines())
    assert set(found) <= ({"hot", "cold"} if change is changed_labels else {"warm", "cool"})


@pytest.mark.parametrize("about", ["", '["other", "dig', "[1]", "7"])
def test_a_broken_note_of_what_answers_belong_to_starts_again(trained, capsys, tmp_path, about):
    (tmp_path / "in.txt").write_text("red\nblue")
    (tmp_path / ".a.jsonl.partial").write_text('{"label": "old"}\n')
    (tmp_path / ".a.jsonl.about").write_text(about)
    command = ["predict", f"archive={trained / 'run' / 'model.nemolet'}", "input=in.txt", "out=a.jsonl"]
    assert "2 answers: a.jsonl" in succeed(capsys, *command)
    assert "old" not in (tmp_path / "a.jsonl").read_text()


def test_two_processes_do_not_write_the_same_answers(trained, capsys, tmp_path):
    (tmp_path / "in.txt").write_text("red\nblue")
    command = ["predict", f"archive={trained / 'run' / 'model.nemolet'}", "input=in.txt", "out=a.jsonl"]
    with (tmp_path / ".a.jsonl.partial").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process writes these answers" in fail(capsys, 1, *command)
    succeed(capsys, *command)


@pytest.mark.parametrize(
    "name, content, status, message",
    [
        ("in.jsonl", '{"text": "a"}\n{"txt": "b"}\n', 1, "in.jsonl:2: the record lacks what the model reads"),
        ("in.jsonl", '{"text": " "}\n', 1, "in.jsonl:1"),
        ("in.txt", "fine\n\nfine\n", 1, "in.txt:2"),
        ("other.jsonl", "{}", 1, "in.jsonl: there is no such file"),
    ],
)
def test_bad_records_are_refused_with_their_line(trained, capsys, tmp_path, name, content, status, message):
    (tmp_path / name).write_text(content)
    wanted = name if name.startswith("in") else "in.jsonl"
    command = ["predict", f"archive={trained / 'run' / 'model.nemolet'}", f"input={wanted}", "out=a.jsonl"]
    assert message in fail(capsys, status, *command)
    assert not (tmp_path / "a.jsonl").exists()


def test_mistakes_of_a_classifier_as_a_page(trained, tmp_path, capsys):
    data = ["data=labelled", f"data.path={trained / 'train.jsonl'}"]
    succeed(capsys, "evaluate", trained / "run", *data, "report=page.html")
    assert "of 48 right" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "odd, setting, why",
    [
        (" ", ["data.empty=skip"], "left out (empty)"),
        ("green " * 40, ["data.too_long=skip", "context=20"], "left out (longer than 20 tokens)"),
        ("green " * 40, ["data.too_long=truncate", "context=20"], "cut after 20 tokens"),
    ],
)
def test_a_page_is_of_the_texts_that_are_measured(trained, tmp_path, capsys, odd, setting, why):
    kept = (trained / "train.jsonl").read_text().splitlines()[:8]
    label = json.loads(kept[0])["label"]
    rows = [json.dumps({"text": odd, "label": label}), *kept]
    (tmp_path / "some.jsonl").write_text("\n".join(rows))
    command = ["evaluate", trained / "run", "data=labelled", "data.path=some.jsonl", *setting, "report=page.html"]
    printed, page = succeed(capsys, *command), (tmp_path / "page.html").read_text()
    count = 9 if why.startswith("cut") else 8
    assert f"over {count} examples; 1 {why}: some.jsonl:1" in printed
    right = round(float(printed.split("accuracy ")[1].split()[0]) * count)
    assert f"<p>{right} of {count} right; 1 {why}: some.jsonl:1</p>" in page
    assert "leave max_batches out" in fail(capsys, 2, *command, "max_batches=1")


def test_what_guesses_masked_tokens_is_evaluated_and_writes_nothing(tmp_path, capsys):
    tokenizer = nl.tokenizers.SentencePieceTokenizer.train(["a b"] * 9, vocab_size=263, special_tokens=["<mask>"])
    stack = nl.nn.Encoder(layers=1, width=16, heads=2)
    encoder = nl.language.TextEncoder(vocab_size=tokenizer.vocab_size, stack=stack)
    nl.save("m.nemolet", model=nl.language.MaskedLM(encoder=encoder), tokenizer=tokenizer)
    (tmp_path / "t.txt").write_text("abc def\n" * 100)
    command = ["evaluate", "m.nemolet", "data=masked", "data.text.sequence_length=16"]
    assert succeed(capsys, *command, "data.text.path=t.txt").startswith("loss")
    assert "did you mean data.text.path?" in fail(capsys, 2, *command, "data.path=t.txt")
    assert "does not hold a language model" in fail(capsys, 2, "generate", "m.nemolet", "abc")


def test_a_graph_of_your_own_is_evaluated_with_its_loss(tmp_path, capsys):
    """Features are those of the speakers that training set aside."""
    frames = {f"u{n}": np.random.default_rng(n).normal(size=(40, 5)).astype("float32") for n in range(4)}
    np.savez(tmp_path / "f.npz", **frames)
    rows = [{"utt": name, "text": "ab", "speaker": name} for name in frames]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data=features", "data.path=f.jsonl", "data.arrays=f.npz"]
    small = {"bins": 5, "layers": 1, "width": 8, "hidden": 8, "channels": 4}
    sizes = [f"model.modules.encoder.{name}={size}" for name, size in small.items()]
    short = ["optim.lr=1e-2", "schedule.warmup_steps=1", "trainer.max_steps=2", "trainer.loggers=[]", "folder=run"]
    train = ["model=features_ctc", "loss=ctc", "tokenizer=char", "model.modules.head.vocab=4", *sizes, *short]
    succeed(capsys, "train", *train, *data)
    assert "over 1 examples" in succeed(capsys, "evaluate", "run", *data, "loss=ctc")


def test_a_language_model_predicts_no_labels(tiny_run, capsys, tmp_path):
    (tmp_path / "in.txt").write_text("a")
    err = fail(capsys, 2, "predict", f"archive={tiny_run.archive}", "input=in.txt", "out=a.jsonl")
    assert "the archive holds no task model" in err


def test_texts_longer_than_the_model_reads_are_refused_before_training(trained, capsys):
    task = ["model=text_classifier", "data=labelled", "loss=text_classes", f"data.path={trained / 'train.jsonl'}"]
    assert "texts may not be longer" in fail(capsys, 2, "train", *task, *SHORT, "data.context=64")


@pytest.mark.parametrize("task", ["request_tagger", "token_classifier", "question_answerer", "sentence_embedder"])
def test_each_task_trains_from_its_config(task, tmp_path, capsys):
    if task == "request_tagger":
        rows = [{"text": f"go to {c}", "tags": "O O B-city", "intent": "Go"} for c in WORDS * 4]
        options = ["data=requests", "loss=requests"]
    elif task == "token_classifier":
        (tmp_path / "t.conll").write_text("see\tO\nRome\tB-city\n\n" * 16)
        rows, options = [], ["data=tagged", "loss=tags", "data.path=t.conll"]
    elif task == "question_answerer":
        question = {"id": "q", "question": "who", "answers": [{"text": "Ann", "answer_start": 0}]}
        article = {"paragraphs": [{"context": "Ann is here", "qas": [question] * 16}]}
        (tmp_path / "t.json").write_text(json.dumps({"data": [article]}))
        rows, options = [], ["data=questions", "loss=answers", "data.path=t.json"]
    else:
        rows = [{"text": w, "other": w.upper()} for w in WORDS * 4]
        options = ["data=similar", "loss=contrastive"]
    if rows:
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options.append("data.path=t.jsonl")
    command = ["train", f"model={task}", *options, *SHORT, "trainer.max_steps=2", "trainer.valid_every=2", "folder=run"]
    succeed(capsys, *command)
    data = [o for o in options if o.startswith("data")]
    assert "loss" in succeed(capsys, "evaluate", "archive=run/model.nemolet", *data)


def test_answers_with_an_adapter_belong_to_it(trained, capsys, tmp_path, monkeypatch):
    """Another adapter is another model, and so is one of the same weights that count for more."""
    (tmp_path / "in.txt").write_text("\n".join(WORDS))
    archive = nl.load(trained / "run" / "model.nemolet")
    adapt(archive.model, Adapter(rank=1))
    for _, layer in adapted_layers(archive.model):
        torch.nn.init.normal_(layer.up)
    config = save_adapter(archive.model, tmp_path / "adapter") / "adapter_config.json"
    command = ["predict", f"archive={trained / 'run'}", "input=in.txt", "out=a.jsonl", "with_adapter=adapter"]
    plain = succeed(capsys, *command[:-1]), answers(tmp_path / "a.jsonl")
    succeed(capsys, *command)
    added = answers(tmp_path / "a.jsonl")
    assert added != plain[1]
    monkeypatch.setattr(verb._Partial, "finish", lambda self: None)
    succeed(capsys, *command)
    (tmp_path / "adapter").rename(tmp_path / "elsewhere")
    assert "4 of them from an earlier run" in succeed(capsys, *command[:-1], "with_adapter=elsewhere")
    settings = tmp_path / "elsewhere" / config.name
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "lora_alpha": 50}))
    assert "another model" in succeed(capsys, *command[:-1], "with_adapter=elsewhere")
