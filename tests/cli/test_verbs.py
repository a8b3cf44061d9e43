"""Each verb from end to end on a tiny model, and what it says where the world is not as asked."""

from __future__ import annotations

import importlib
import io
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml

import nemolet as nl
from nemolet.cli import VERBS, main
from nemolet.config import compose, registry

from .conftest import TINY


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def succeed(capsys, *command):
    assert main(list(map(str, command))) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def fail(capsys, status, *command):
    assert main(list(map(str, command))) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert 1 <= len(err.splitlines()) <= 24
    return err


# ---------------------------------------------------------------- train


def test_train_leaves_one_folder_with_everything(tiny_run):
    names = {path.name for path in tiny_run.folder.iterdir()}
    assert {"config.yaml", "git.txt", "metrics.csv", "loss.svg", "checkpoints", "model.nemolet"} <= names
    assert "parameters" in tiny_run.output
    assert "bits per byte" in tiny_run.output
    assert "--- sample ---" in tiny_run.output


def test_the_same_command_again_is_done_at_once_with_the_same_end(tiny_run, capsys):
    before = tiny_run.archive.read_bytes()
    rows = (tiny_run.folder / "metrics.csv").read_text()
    out = succeed(capsys, *tiny_run.command)
    last = [line for line in tiny_run.output.splitlines() if line.startswith("validation loss")]
    assert last[-1] in out
    assert tiny_run.archive.read_bytes() == before
    assert (tiny_run.folder / "metrics.csv").read_text() == rows


def test_a_folder_is_not_continued_with_another_config(tiny_run, capsys):
    err = fail(capsys, 1, *tiny_run.command, "optim.lr=5e-4", "model.dropout=0.1")
    assert "TrainingError" in err
    assert "optim.lr: 0.001 -> 0.0005" in err
    assert "model.dropout: 0.0 -> 0.1" in err
    assert "choose another name" in err


def test_a_longer_run_goes_on_where_the_short_one_stopped(poem, capsys):
    command = ["train", *TINY, f"data.path={poem}", "trainer.checkpoint_every=1", "folder=here"]
    assert "stopped by the time limit at step 1" in succeed(capsys, *command, "trainer.max_minutes=0")
    out = succeed(capsys, *command)
    assert "2/2" in out
    assert "archive here/model.nemolet" in out


def test_a_sweep_is_one_folder_for_each_job(poem, capsys, tmp_path):
    out = succeed(capsys, "train", *TINY, f"data.path={poem}", "optim.lr=1e-3,2e-3", "name=sweep", "--multirun")
    assert "Launching 2 jobs" in out
    rates = [yaml.safe_load((tmp_path / f"runs/sweep/{job}/config.yaml").read_text())["optim"]["lr"] for job in (0, 1)]
    assert rates == [1e-3, 2e-3]
    assert all((tmp_path / f"runs/sweep/{job}/model.nemolet").is_file() for job in (0, 1))
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_a_failing_job_of_a_sweep_leaves_the_others_alone(poem, capsys, tmp_path):
    err = fail(capsys, 1, "train", *TINY, f"data.path=nowhere.txt,{poem}", "sample.max_new_tokens=0", "name=s", "-m")
    assert "DataError: nowhere.txt" in err
    assert (tmp_path / "runs/s/1/model.nemolet").is_file()


# ---------------------------------------------------------------- use


def test_evaluate_scores_a_text(tiny_run, poem, capsys):
    out = succeed(capsys, "evaluate", f"archive={tiny_run.archive}", f"data.path={poem}", "max_batches=2")
    assert all(words in out for words in ("loss", "perplexity", "bits per byte"))


def brute_force(model, ids, window):
    """Bits for every token of a text but the first, in windows that follow each other."""
    bits = []
    for start in range(0, len(ids) - 1, window):
        part = torch.tensor([ids[start : start + window + 1]])
        with torch.no_grad():
            logits = model(part[:, :-1])[0]
        losses = torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="none")
        bits += (losses.double() / math.log(2)).tolist()
    return bits


@pytest.mark.parametrize("kind", ["byte", "char", "sentencepiece"])
@pytest.mark.parametrize("options", [[], ["context=7"], ["data.sequence_length=5", "data.batch_size=3"]])
def test_bits_per_byte_are_those_of_the_whole_text(kind, options, capsys):
    text = "naïve rain in spain \N{SNOWMAN} falls mainly on the plain, they say " * 3 + "né"
    Path("text.txt").write_text(text, encoding="utf-8")
    tokenizer = {
        "byte": nl.tokenizers.ByteTokenizer,
        "char": lambda: nl.tokenizers.CharTokenizer.train([text]),
        "sentencepiece": lambda: nl.tokenizers.SentencePieceTokenizer.train([text] * 9, vocab_size=290),
    }[kind]()
    torch.manual_seed(0)
    model = nl.language.CausalLM(vocab_size=tokenizer.vocab_size, layers=1, width=8, heads=2, context=23).eval()
    model.graph.head.weight.data.normal_(std=0.2)
    nl.save("m.nemolet", model=model, tokenizer=tokenizer)
    out = succeed(capsys, "evaluate", "archive=m.nemolet", "data.path=text.txt", *options)
    ids = tokenizer.encode(text)
    if tokenizer.eos_id is not None:  # a document stands between two of them
        ids = [tokenizer.eos_id, *ids, tokenizer.eos_id]
    window = 7 if "context=7" in options else 5 if options else 23
    bits = brute_force(model, ids, window)
    size = len(text.encode()) - (1 if kind == "char" else 0)  # nothing stands before the first letter
    loss = sum(bits) * math.log(2) / len(bits)
    assert f"loss {loss:.4f}  perplexity {math.exp(loss):.2f}  bits per byte {sum(bits) / size:.3f}" in out
    assert out.rstrip().endswith(f"over {len(bits):,} tokens")


def test_a_window_beyond_what_the_model_reads_is_refused(tiny_run, poem, capsys):
    err = fail(capsys, 2, "evaluate", f"archive={tiny_run.archive}", f"data.path={poem}", "context=33")
    assert "context: the model cannot read so much at once" in err
    assert "at most 32" in err


def test_generate_is_the_same_for_the_same_seed(tiny_run, capsys):
    command = ["generate", f"archive={tiny_run.archive}", "prompt='the '", "max_new_tokens=8"]
    first = succeed(capsys, *command, "seed=3")
    assert first.startswith("the ")
    assert len(first.rstrip("\n")) <= len("the ") + 8
    assert succeed(capsys, *command, "seed=3") == first
    assert succeed(capsys, *command, "seed=4") != first


TEXTS = [
    "the ",
    "the, rain = 'in' ",
    "[the rain",
    "it's",
    "${rain}",
    "the\n",
    "'the",
    "=",
    "a=b",
    "--the",
    "5",
    "null ",
]


@pytest.mark.parametrize("prompt", TEXTS)
def test_a_prompt_is_taken_as_it_is_written(prompt, capsys):
    nl.save(
        "m.nemolet",
        model=nl.language.CausalLM(vocab_size=257, layers=1, width=8, heads=2, context=64),
        tokenizer=nl.tokenizers.ByteTokenizer(),
    )
    options = ["max_new_tokens=2", "temperature=0"]
    ways = [["archive=m.nemolet", f"prompt={prompt}"], ["m.nemolet", "--", prompt]]
    if prompt not in ("a=b", "--the"):  # a setting and a flag, where no -- stands before them
        ways += [["m.nemolet", prompt], [f"prompt={prompt}", "m.nemolet"]]
    (out,) = {succeed(capsys, "generate", *options, *way) for way in ways}
    assert out.startswith(prompt)
    several = succeed(capsys, "generate", *options, "m.nemolet", "--", prompt, "other")
    assert f"--- {prompt!r}\n{out}" in several
    assert "--- 'other'" in several


def test_words_go_to_hydra_where_it_is_asked(capsys):
    out = succeed(capsys, "generate", "a b.nemolet", "it's, ${odd} ", "--cfg", "job", "--resolve")
    config = yaml.safe_load(out)
    assert (config["archive"], config["prompt"]) == ("a b.nemolet", "it's, ${odd} ")


@pytest.mark.parametrize(
    "command, words",
    [
        (["train", "my.txt"], "this is no override"),
        (["chat", "m.nemolet", "the rain"], "there is no place for this word"),
        (["train", "--", "my.txt"], "there is no place for this word"),
        (["generate", "m.nemolet", "tempratur=3"], "did you mean temperature?"),
    ],
)
def test_words_without_a_place_are_refused(command, words, capsys):
    assert words in fail(capsys, 2, *command)


def test_generate_from_several_prompts(tiny_run, capsys):
    out = succeed(
        capsys, "generate", f"archive={tiny_run.archive}", "prompt=[the,rain]", "max_new_tokens=4", "temperature=0"
    )
    assert out.count("---") == 2
    assert "--- 'the'\nthe" in out
    assert "--- 'rain'\nrain" in out


def test_generate_ends_at_a_stop_text(tiny_run, capsys):
    command = ["generate", f"archive={tiny_run.archive}", "prompt=the", "max_new_tokens=12", "temperature=0"]
    free = succeed(capsys, *command).rstrip("\n").removeprefix("the")
    letter = next(c for c in free if c.isalnum())
    stopped = succeed(capsys, *command, f'stop="{letter}"').rstrip("\n").removeprefix("the")
    assert stopped == free[: free.index(letter)]


def test_chat_continues_each_line(tiny_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\nrain\n\nplain\n"))
    out = succeed(capsys, "chat", f"archive={tiny_run.archive}", "max_new_tokens=3", "temperature=0")
    assert len(out.splitlines()) >= 2
    assert "Type a beginning" not in out  # nobody sits at a keyboard


def test_chat_goes_on_after_what_the_model_cannot_read(tiny_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the Q\nrain\n"))
    assert main(["chat", str(tiny_run.archive), "max_new_tokens=3", "temperature=0"]) == 0
    out, err = capsys.readouterr()
    assert "'Q'" in err and "Try another line" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("rain\n"))
    assert out == succeed(capsys, "chat", tiny_run.archive, "max_new_tokens=3", "temperature=0")


# ---------------------------------------------------------------- tokens


def test_tokens_and_their_tokenizer_are_enough_to_train(poem, capsys, tmp_path):
    out = succeed(capsys, "tokenize", f"path={poem}", "out=data/poem", "tokenizer=char")
    assert "1 documents" in out
    assert {p.name for p in (tmp_path / "data").iterdir()} == {"poem.bin", "poem.idx", "poem.tokenizer"}
    command = [c for c in TINY if c != "tokenizer=char"]
    out = succeed(
        capsys,
        "train",
        *command,
        "tokenizer=file",
        "tokenizer.path=data/poem.tokenizer",
        "data.path=data/poem.bin",
        "folder=from_tokens",
    )
    assert "archive from_tokens/model.nemolet" in out
    tokenizer = nl.load(tmp_path / "from_tokens/model.nemolet").tokenizer
    assert tokenizer.decode(tokenizer.encode("the rain")) == "the rain"


# ---------------------------------------------------------------- looking


def test_check_counts_without_training(capsys, tmp_path):
    out = succeed(capsys, "check", "model=llama3_8b")
    assert "8,030,261,248 parameters" in out
    assert "GFLOP per token" in out
    assert list(tmp_path.iterdir()) == []


def test_check_says_what_it_assumes_and_keeps_for_each_optimizer(capsys):
    assert "assumed" not in succeed(capsys, "check", "model=gpt_tiny", "model.vocab_size=2000")
    assert "assumed, since only the data knows: vocab_size 257" in succeed(capsys, "check", "tokenizer=char")
    kept = {}
    for name in ("adamw", "muon", "adafactor"):
        out = succeed(capsys, "check", "model=gpt2", "model.vocab_size=50257", f"optim={name}")
        kept[name] = float(out.split(" of optimizer state")[0].split()[-1])
    assert kept["adamw"] == pytest.approx(2 * 4 * 124_439_808 / 2**30, abs=0.01)
    assert kept["adafactor"] < 0.05 < kept["muon"] < kept["adamw"]  # tables and norms keep two numbers with Muon


def test_wiring_is_checked_before_the_data_is_read(capsys, tmp_path, poem):
    command = ["train", *TINY, f"data.path={poem}", "data.cache=cache"]
    assert "nothing of the model flows into the loss" in fail(capsys, 1, *command, "loss=classes")
    assert "the types do not fit" in fail(capsys, 1, *command, "+metrics.a._target_=nemolet.metrics.Accuracy")
    assert list(tmp_path.iterdir()) == []


def test_graph_as_table_picture_and_text(capsys, tmp_path):
    table = succeed(capsys, "graph", "model=gpt_tiny")
    assert "CausalLM" in table
    assert "CrossEntropy" in table
    assert "decoder" in succeed(capsys, "graph", "model=gpt_tiny", "inside=true")
    assert succeed(capsys, "graph", "model=gpt_tiny", "out=pictures/graph.svg") == "pictures/graph.svg\n"
    assert (tmp_path / "pictures/graph.svg").read_text().startswith("<svg")
    succeed(capsys, "graph", "model=gpt_tiny", "out=graph.md", "inside=true")
    assert "flowchart" in (tmp_path / "graph.md").read_text()


def test_list_shows_groups_and_options(capsys):
    out = succeed(capsys, "list")
    for words in ("model=", "gpt2_xl", "llama3_70b", "optim=", "muon", "experiment=", "demo"):
        assert words in out
    assert succeed(capsys, "list", "group=optim").split() == ["optim=", "adafactor", "adamw", "muon"]


@pytest.mark.parametrize("command", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_verb(command, capsys):
    out = succeed(capsys, *command)
    assert all(verb in out for verb in VERBS)


def test_version(capsys):
    assert succeed(capsys, "--version") == f"{nl.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_its_config(verb, capsys):
    out = succeed(capsys, verb, "--help")
    assert out.startswith(f"nemolet {verb}: {VERBS[verb]}")
    shown = yaml.safe_load(out.partition("== Config (override with key=value) ==")[2])
    assert shown == compose(verb)[0]


def test_help_shows_what_the_command_would_use(capsys):
    out = succeed(capsys, "train", "model=gpt_tiny", "model.layers=7", "--help")
    assert "layers: 7" in out
    assert "gpt2_xl" in out and "adapter:" not in out  # the groups of this verb only
    assert "did you mean model.layers?" in fail(capsys, 2, "train", "model.layer=7", "-h")
    assert "prompt: 'a, b '" in succeed(capsys, "generate", "m.nemolet", "a, b ", "--help")


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--cfg", "job", "model=gpt_tiny"],
        ["train", "model=gpt_tiny", "--cfg=job"],
        ["train", "model=gpt_tiny", "-c", "job", "+optim.eps=1e-6", "optim.momentum=0.9"],
    ],
)
def test_a_config_is_printed_and_nothing_is_done(command, capsys, tmp_path):
    config = yaml.safe_load(succeed(capsys, *command))
    assert config["model"]["width"] == 128
    if "optim.momentum=0.9" in command:
        assert (config["optim"]["eps"], config["optim"]["momentum"]) == (1e-6, 0.9)
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_a_config_is_printed(capsys):
    assert "max_steps: 1000" in succeed(capsys, "train", "--cfg", "job", "--package", "trainer")
    assert "archive: ???" in succeed(capsys, "generate", "--cfg", "job")  # not yet said, and no mistake here


def test_words_that_hydra_does_not_know_are_its_own_answer(capsys):
    err = fail(capsys, 2, "train", "--cfg", "everything")
    assert "invalid choice" in err


# ---------------------------------------------------------------- a world that is not as asked


@pytest.mark.parametrize(
    "command, words",
    [
        (["train", "data.path=nowhere.txt"], "nowhere.txt: there is no such file"),
        (["train", "data.path=empty"], "empty"),
        (["train", "data.path=nowhere.bin", "tokenizer=byte"], "the token file is missing"),
        (["train", "data.path=nowhere.bin"], "a token file cannot train a tokenizer"),
        (["train", "tokenizer=file", "tokenizer.path=nowhere"], "nowhere: there is no tokenizer here"),
        (["tokenize", "out=a", "path=nowhere.txt"], "nowhere.txt: there is no such file"),
        (["evaluate", "archive=nowhere.nemolet"], "nowhere.nemolet: there is no such file"),
        (["generate", "archive=nowhere.nemolet"], "nowhere.nemolet: there is no such file"),
        (["chat", "archive=nowhere.nemolet"], "nowhere.nemolet: there is no such file"),
        (["generate", "archive=empty"], "no folder of a Hugging Face model"),
        (["convert", "from=empty", "to=a.nemolet"], "no folder of a Hugging Face model"),
        (["convert", "from=nowhere.nemolet", "to=out"], "nowhere.nemolet: there is no such file"),
        (["convert", "from=empty", "to=other"], "there is nothing to convert"),
        (["generate", "archive=junk"], "this is no whole archive"),
    ],
)
def test_missing_and_broken_files(command, words, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk").write_bytes(b"junk" * 999)
    assert words in fail(capsys, 1, *command)


BAD = {
    "empty.txt": (b"", [], "empty.txt: the file is empty"),
    "binary.txt": (bytes(range(256)) * 99, [], "binary.txt:1: the file looks binary"),
    "latin.txt": ("one\ntwo: \u00e9".encode("latin-1"), [], "latin.txt:2: the file is no UTF-8"),
    "half.jsonl": (rb'{"text": "\ud800"}', [], "half.jsonl:1: a lone surrogate is not text"),
    "long.jsonl": (b'{"text": "%s"}' % (b"x" * 99_999), ["max_line_bytes=5000"], "long.jsonl:1: the line is too long"),
    "short.txt": (b"a few words", ["tokenizer.vocab_size=9999"], "the vocabulary is larger than the text supports"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("verb", ["tokenize", "train"])
def test_bad_text_is_refused_and_nothing_is_left(name, verb, capsys, tmp_path):
    content, options, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    if verb == "tokenize":
        command = ["tokenize", f"path={name}", "out=out/tokens", *options]
    else:
        command = ["train", f"data.path={name}", "data.cache=out", "folder=run"]
        command += [f"data.{option}" if option.startswith("max_line") else option for option in options]
    err = fail(capsys, 1, *command)
    assert words in err
    assert "fix" in err
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {name}


def test_a_vocabulary_too_small_for_the_tokenizer(poem, capsys):
    err = fail(capsys, 2, "train", *TINY, f"data.path={poem}", "model.vocab_size=3")
    assert "model.vocab_size" in err
    assert "model.vocab_size=null" in err


def test_a_device_that_is_not_there(tiny_run, poem, capsys):
    for device in ("gpu", "cuda:99"):
        assert "device" in fail(capsys, 2, "generate", f"archive={tiny_run.archive}", f"device={device}")
    err = fail(capsys, 2, "train", *TINY, f"data.path={poem}", "trainer.accelerator=gpu", "trainer.devices=64")
    assert "ConfigError: trainer" in err


def test_a_prompt_that_the_tokenizer_cannot_write(tiny_run, capsys):
    assert "'Q'" in fail(capsys, 1, "generate", f"archive={tiny_run.archive}", "prompt=Q")


def test_an_archive_without_a_tokenizer(capsys, tmp_path, poem):
    nl.save("bare.nemolet", model=nl.language.CausalLM(vocab_size=9, layers=1, width=8, heads=2))
    for verb in ("generate", "chat", "evaluate"):
        assert "no tokenizer" in fail(capsys, 2, verb, "archive=bare.nemolet")


def test_what_is_no_language_model_does_not_continue_texts(capsys, tmp_path):
    stack = nl.nn.Encoder(layers=1, width=8, heads=2)
    encoder = nl.language.TextEncoder(vocab_size=257, stack=stack)
    model = nl.language.TextClassifier(encoder=encoder, labels=["a", "b"])
    nl.save("classes.nemolet", model=model, tokenizer=nl.tokenizers.ByteTokenizer())
    for verb in ("generate", "chat"):
        assert "nemolet predict" in fail(capsys, 2, verb, "archive=classes.nemolet")


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in fail(capsys, 1, "graph", "model=gpt_tiny", "out=file/graph.svg")


MODULE = '''
import nemolet as nl
from nemolet.types import LogitsBTV, TokenIdsBT

@nl.register
class Bigram(nl.NeuralModule):
    """The next token from the last one."""

    def __init__(self, *, vocab_size: int) -> None:
        super().__init__(V=vocab_size)
        self.table = nl.nn.Embedding("V", "V", vocab_size, vocab_size)

    def forward(self, tokens: TokenIdsBT) -> LogitsBTV:
        return self.table(tokens)
'''


def test_an_archive_of_a_users_class_needs_its_module(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_bigram.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("my_bigram")
    nl.save("b.nemolet", model=mine.Bigram(vocab_size=257), tokenizer=nl.tokenizers.ByteTokenizer())
    monkeypatch.delitem(sys.modules, "my_bigram")  # as in another process
    monkeypatch.delitem(registry._registered, "my_bigram.Bigram")
    command = ["generate", "archive=b.nemolet", "prompt=a", "max_new_tokens=3"]
    assert "register" in fail(capsys, 1, *command)
    assert succeed(capsys, *command, "imports=[my_bigram]").startswith("a")
