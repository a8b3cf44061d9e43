"""``nemolet finetune``: everything from one archive, by config."""

from __future__ import annotations

import json

import pytest
import torch

import nemolet as nl
from nemolet.cli import main
from nemolet.tokenizers import ByteTokenizer

SMALL_FILES = {"generation_config.json": b'{"eos_token_id": 256}'}
SHORT = [
    "optim.lr=1e-2",
    "schedule.warmup_steps=1",
    "trainer.max_steps=4",
    "trainer.valid_every=2",
    "trainer.loggers=[]",
    "trainer.progress=false",
    "data.batch_size=4",
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    model = nl.language.CausalLM(vocab_size=257, layers=1, width=16, heads=2, context=64)
    return nl.save(tmp_path / "base.nemolet", model=model, tokenizer=ByteTokenizer(), extra=SMALL_FILES)


@pytest.fixture
def chats(tmp_path):
    answers = {"chosen": "x", "rejected": "y", "text": "c", "label": "z"}
    rows = [{"prompt": "ab"[i % 2], "response": "xy"[i % 2], **answers} for i in range(24)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def succeed(capsys, *command):
    assert main(list(map(str, command))) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def weights(path):
    return nl.load(path).model.state_dict()


def test_what_is_left_out_of_instructions_is_counted_and_named(base, chats, capsys):
    """Beside the number why and where, of the examples for training and of those that are measured."""
    rows = chats.read_text().splitlines()
    for line in (3, 7, 8, 20):
        rows[line - 1] = json.dumps({"prompt": "a" * 70, "response": "x"})
    chats.write_text("\n".join(rows))
    held = chats.with_name("held.jsonl")
    held.write_text("\n".join(rows[:8]))
    command = ["finetune", "experiment=instruct", f"archive={base}", f"data.path={chats}", f"data.valid_path={held}"]
    out = succeed(capsys, *command, "folder=run", *SHORT)
    named = [f"{chats}:{line}" for line in (3, 7, 8)]
    assert f"{chats} (24 examples; 7 left out (longer than 64 tokens): {', '.join(named)}, ...)" in out
    assert "7 left out (longer than 64 tokens)" in nl.load("run").card
    counted = succeed(capsys, "evaluate", "archive=run", "data=instructions", f"data.path={held}", "data.too_long=skip")
    named = [f"{held}:{line}" for line in (3, 7, 8)]
    assert counted.endswith(f"over 5 examples; 3 left out (longer than 64 tokens): {', '.join(named)}\n")


@pytest.mark.parametrize("adapter", [None, "lora", "dora", "qlora"])
def test_instructions_with_and_without_an_addition(base, chats, capsys, adapter):
    if adapter == "qlora":
        pytest.importorskip("torchao")
    command = ["finetune", f"archive={base}", f"data.path={chats}", "folder=run", *SHORT]
    targets = [] if adapter is None else [f"adapter={adapter}", "adapter.targets=[attention.qkv]"]
    out = succeed(capsys, *command, *targets, "show=1")
    assert "\033[32mx" in out
    scores = [
        float(succeed(capsys, "evaluate", f"archive={a}", "data=instructions", f"data.path={chats}").split()[1])
        for a in (base, "run/model.nemolet")
    ]
    assert scores[1] < scores[0]  # the answers became likelier
    assert nl.load("run").extra.items() > SMALL_FILES.items()
    assert set(nl.load("run").extra) - set(SMALL_FILES) == {"chat_template.jinja"}  # with which it was trained
    before, after = weights(base), weights("run/model.nemolet")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if adapter is None:
        assert len(changed) == len(before)
    else:
        assert changed == {"graph.decoder.blocks.0.attention.qkv.weight"}
        model = nl.load(base).model
        nl.nn.load_adapter(model, "run/adapter")
        tokens = torch.arange(10)[None]
        bound = 0.02 if adapter == "qlora" else 1e-5  # its archive keeps what four bits made of the weights
        assert torch.allclose(model(tokens), nl.load("run/model.nemolet").model(tokens), atol=bound)


def test_the_best_of_a_model_with_tied_weights_is_merged(base, chats, capsys):
    tied = nl.load(base).model
    assert len(tied.state_dict()) > len(list(tied.parameters()))
    command = ["finetune", f"archive={base}", f"data.path={chats}", "folder=run", *SHORT]
    succeed(capsys, *command, "adapter=lora", "adapter.targets=[attention.qkv]", "+trainer.archive=best")
    before, after = weights(base), weights("run/model.nemolet")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"graph.decoder.blocks.0.attention.qkv.weight"}


def test_text_as_long_as_can_be_is_as_long_as_the_model_reads(base, poem, capsys):
    command = ["finetune", f"archive={base}", "data=text", f"data.path={poem}", "folder=run", *SHORT]
    succeed(capsys, *command, "data.sequence_length=null")
    assert nl.load("run").card


def test_half_precision_is_trained_in_float32(base, poem, capsys):
    model = nl.load(base).model.bfloat16()
    nl.save("half.nemolet", model=model, tokenizer=ByteTokenizer())
    command = ["finetune", "archive=half.nemolet", "teacher=half.nemolet", "data=text", f"data.path={poem}"]
    succeed(capsys, *command, "folder=run", *SHORT, "data.sequence_length=8", "optim.lr=1e-4")
    before, after = weights("half.nemolet"), weights("run/model.nemolet")
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(not torch.equal(after[name], before[name].float()) for name in before)  # steps below half precision
    assert "loss" in succeed(capsys, "evaluate", "half.nemolet", f"data.path={poem}", "max_batches=2")
    assert succeed(capsys, "generate", "half.nemolet", "a", "max_new_tokens=3").startswith("a")


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_a_run_with_an_addition_goes_on(adapter, base, chats, capsys):
    if adapter == "qlora":
        pytest.importorskip("torchao")
    command = [
        "finetune",
        f"archive={base}",
        f"data.path={chats}",
        f"adapter={adapter}",
        *SHORT,
        "trainer.checkpoint_every=1",
    ]
    command.append("adapter.targets=[feed_forward.up]")
    succeed(capsys, *command, "folder=whole")
    assert "stopped by the time limit" in succeed(capsys, *command, "folder=cut", "trainer.max_minutes=0")
    succeed(capsys, *command, "folder=cut")
    whole, cut = weights("whole/model.nemolet"), weights("cut/model.nemolet")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_run_is_known_by_its_addition_too(base, chats, capsys):
    command = ["finetune", f"archive={base}", f"data.path={chats}", "folder=run", *SHORT]
    added = [*command, "adapter=lora", "adapter.targets=[attention.qkv]"]
    succeed(capsys, *added)
    for other in (["adapter.rank=4"], ["adapter.targets=[feed_forward.up]"], ["adapter.alpha=4"], ["freeze=[down]"]):
        assert main(list(map(str, [*added, *other]))) == 1
        said = capsys.readouterr().err
        assert "another run" in said and ("adapter" in said or "frozen" in said)
    assert main(list(map(str, command))) == 1
    assert main(list(map(str, added))) == 0


def test_preferences(base, chats, capsys):
    command = ["finetune", f"archive={base}", "data=preferences", f"data.path={chats}", "folder=run", *SHORT]
    assert "preferred" in succeed(capsys, *command, "optim.weight_decay=0")
    assert isinstance(nl.load("run/model.nemolet").model, nl.language.CausalLM)


def test_a_reward_model_scores_answers(base, chats, capsys):
    command = ["finetune", f"archive={base}", "task=reward", "data=preferences", f"data.path={chats}", "folder=run"]
    long = [*SHORT, "trainer.max_steps=30", "trainer.valid_every=30"]
    assert "preferred 1.0" in succeed(capsys, *command, *long, "optim.weight_decay=0")
    rows = [{"prompt": "a", "response": answer} for answer in "xy"]
    (chats.parent / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    succeed(capsys, "predict", "archive=run/model.nemolet", "input=new.jsonl", "out=rewards.jsonl")
    better, worse = (json.loads(line)["reward"] for line in (chats.parent / "rewards.jsonl").read_text().splitlines())
    assert better > worse


def test_a_prompt_is_learned_and_nothing_else(base, chats, capsys):
    command = ["finetune", f"archive={base}", "task=prompt", "model.length=4", f"data.path={chats}", "folder=run"]
    out = succeed(capsys, *command, *SHORT, "data.pack=false", "data.context=64")
    assert "0.000M parameters are trained" in out
    before, after = weights(base), weights("run/model.nemolet")
    assert all(torch.equal(after[f"base.{name}"], tensor) for name, tensor in before.items())
    again = nl.language.load_prompt(nl.load(base).model, "run/adapter")
    assert torch.equal(again.prompt, after["prompt"])
    scores = [
        float(
            succeed(
                capsys, "evaluate", f"archive={a}", "data=instructions", f"data.path={chats}", "data.pack=false"
            ).split()[1]
        )
        for a in (base, "run/model.nemolet")
    ]
    assert scores[1] < scores[0]
    assert succeed(capsys, "generate", "run/model.nemolet", "a", "max_new_tokens=3").startswith("a")
    assert main([*map(str, command), *SHORT, "folder=packed"]) == 1
    assert "set data.pack=false" in capsys.readouterr().err


def test_a_teacher(base, chats, capsys, poem):
    command = ["finetune", f"archive={base}", f"teacher={base}", "data=text", f"data.path={poem}", "folder=run"]
    out = succeed(capsys, *command, *SHORT, "data.sequence_length=32", "trainer.valid_batches=1")
    assert "agreement" in out
    assert isinstance(nl.load("run/model.nemolet").model, nl.language.CausalLM)


def test_an_encoder_gets_a_new_head_and_layers_their_own_rates(tmp_path, capsys):
    encoder = nl.language.TextEncoder(vocab_size=257, stack=nl.nn.Encoder(layers=2, width=16, heads=2))
    nl.save(tmp_path / "mlm.nemolet", model=nl.language.MaskedLM(encoder=encoder), tokenizer=ByteTokenizer())
    rows = [{"text": w, "label": w[0]} for w in ("aa", "ab", "ba", "bb") * 6]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["finetune", "archive=mlm.nemolet", "task=classify", "data=labelled", "data.path=t.jsonl", *SHORT]
    out = succeed(capsys, *command, "folder=run", "layer_decay=0.5", "freeze=[embed.tokens.weight]")
    assert "accuracy" in out
    before, after = weights("mlm.nemolet"), weights("run/model.nemolet")
    table = next(name for name in after if name.endswith("embed.tokens.weight"))
    assert torch.equal(after[table], next(t for n, t in before.items() if n.endswith("embed.tokens.weight")))
    again = ["finetune", "archive=run/model.nemolet", "data=labelled", "data.path=t.jsonl", *SHORT, "folder=again"]
    assert "accuracy" in succeed(capsys, *again)


@pytest.mark.parametrize("task, data", [("classify", "labelled"), ("embed", "similar")])
def test_an_archive_that_is_an_encoder_gets_a_head(tmp_path, capsys, task, data):
    encoder = nl.language.TextEncoder(vocab_size=257, stack=nl.nn.Encoder(layers=1, width=16, heads=2))
    nl.save(tmp_path / "encoder.nemolet", model=encoder, tokenizer=ByteTokenizer())
    rows = [{"text": w, "other": w, "label": w[0]} for w in ("aa", "ab", "ba", "bb") * 6]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    succeed(capsys, "finetune", "encoder.nemolet", f"task={task}", f"data={data}", "data.path=t.jsonl", *SHORT)
    assert isinstance(nl.load("runs/finetune/model.nemolet").model.encoder, nl.language.TextEncoder)


def test_an_encoder_that_reads_no_tokens_is_refused(tmp_path, capsys):
    parts = {"encoder": nl.nn.Encoder(layers=1, width=8, heads=2)}
    parts["decoder"] = nl.nn.Decoder(layers=1, width=8, heads=2, cross=True)
    nl.save("m.nemolet", model=nl.language.EncoderDecoder(vocab_size=257, **parts), tokenizer=ByteTokenizer())
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": "b"}\n' * 20)
    command = ["finetune", "m.nemolet", "task=classify", "data=labelled", "data.path=t.jsonl", *SHORT]
    assert main(command) == 1
    assert "does not read tokens" in capsys.readouterr().err


def test_labels_are_those_of_the_model_and_an_encoder_needs_a_head(tmp_path, capsys):
    encoder = nl.language.TextEncoder(vocab_size=257, stack=nl.nn.Encoder(layers=1, width=16, heads=2))
    nl.save("encoder.nemolet", model=encoder, tokenizer=ByteTokenizer())
    nl.save(
        "m.nemolet", model=nl.language.TextClassifier(encoder=encoder, labels=["a", "b"]), tokenizer=ByteTokenizer()
    )
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": "b"}\n' * 20)
    data = ["data=labelled", "data.path=t.jsonl", *SHORT]
    assert main(["finetune", "m.nemolet", *data, "data.labels=[b,c]"]) == 2
    assert "the model has other names" in capsys.readouterr().err
    assert main(["finetune", "encoder.nemolet", *data]) == 2
    assert "an encoder alone predicts nothing" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(base, chats, capsys):
    command = ["finetune", f"archive={base}", f"data.path={chats}", *SHORT]
    assert main([*command, "adapter=lora", "adapter.targets=[q_proj]"]) == 2
    assert "no linear layer has this name" in capsys.readouterr().err
    assert main([*command, "freeze=[nothing]"]) == 2
    assert "no parameter has this name" in capsys.readouterr().err
    assert main([*command, "+adapter.rnak=3"]) == 2
    assert "did you mean adapter.rank" in capsys.readouterr().err
    labelled = ["data=labelled", f"data.path={chats}", "task=classify"]
    assert main(["finetune", f"archive={base}", *SHORT, *labelled]) == 2
    assert "no encoder to put this head on" in capsys.readouterr().err
