"""Seeded mistakes: each is refused before any work, with its path, what was expected and a way out."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nemolet.cli import main

# (command, words that the message has to contain)
MISTAKES = {
    # names
    "verb": (["trian"], ["nemolet trian", "did you mean `nemolet train`?"]),
    "verb far from any": (["xyzzy"], ["nemolet xyzzy", "train, finetune, evaluate", "nemolet --help"]),
    "flag": (["train", "--multrun"], ["--multrun", "did you mean --multirun?"]),
    "flag without its value": (["train", "--cfg"], ["--cfg", "needs a value"]),
    "setting as a flag": (["train", "--name", "x"], ["--name", "did you mean name=...?"]),
    "text like a flag": (["generate", "a.nemolet", "--x y"], ["--x y", "after --: -- '--x y'"]),
    "text with an equals sign": (["train", "name=a = b"], ["put quotes around the value: 'name=\"a = b\"'"]),
    "text with commas": (["train", "name=a, b"], ["add --multirun", "in two kinds of quotes: name='\"a, b\"'"]),
    "option without its group": (["train", "gpt_tiny"], ["this is no override", "did you mean model=gpt_tiny?"]),
    "setting without its value": (["train", "seed"], ["this is no override", "write key=seed"]),
    "prompt like a setting": (["generate", "a.nemolet", "x=1"], ["no such setting", "after --: -- 'x=1'"]),
    "flag far from any": (["train", "--config-name", "x"], ["--config-name", "no such flag"]),
    "top key": (["train", "optm.lr=1"], ["optm", "did you mean optim?"]),
    "top value": (["train", "sed=1"], ["sed", "did you mean seed?"]),
    "nested key": (["train", "optim.lrr=1"], ["optim.lrr", "did you mean optim.lr?"]),
    "key of the model": (["train", "model.widht=64"], ["model.widht", "did you mean model.width?"]),
    "key with a plus": (["train", "+trainer.max_step=9"], ["trainer.max_step", "did you mean trainer.max_steps?"]),
    "key with two": (["train", "++schedule.warmup=9"], ["schedule.warmup", "did you mean schedule.warmup_steps?"]),
    "deep key": (["train", "sample.promt=x"], ["sample.promt", "did you mean sample.prompt?"]),
    "key of the loss": (["train", "loss.label_smooting=0.1"], ["loss.label_smooting", "label_smoothing"]),
    "checkpointing": (["train", "model.checkpointing=evry_2"], ["model.checkpointing", "every_2"]),
    "kind of scaling": (["train", "model.rope_scaling={kind: llama4, factor: 2.0}"], ["rope_scaling.kind", "llama3"]),
    "rope base": (["train", "model.rope_base=-1.0"], ["rope_base is above 0"]),
    "odd head": (["train", "model.attention={head_size: 7}"], ["even head size"]),
    "padded vocabulary": (["train", "model.pad_vocab_to=0"], ["pad_vocab_to is at least 1"]),
    "bound": (["train", "model.softcap=0.0"], ["softcap is above 0"]),
    "no window": (["train", "model.window=0"], ["window is at least 1"]),
    "local layers": (["train", "model.window=9", "model.local={layers: [true]}"], ["one value for each layer"]),
    "smoothing": (["train", "loss.label_smoothing=1.5"], ["label_smoothing is a share"]),
    "learning rate of Muon": (["train", "optim.muon_lr=-1.0"], ["muon_lr is above 0"]),
    "kept": (["train", "trainer.keep_checkpoints=-1"], ["keep_checkpoints is at least 0"]),
    "nodes": (["train", "trainer.num_nodes=0"], ["num_nodes is at least 1"]),
    "small vocabulary": (["train", "tokenizer.vocab_size=100"], ["vocab_size holds 256 bytes"]),
    "large vocabulary": (["train", "model.vocab_size=300"], ["more tokens than the model"]),
    "special bytes": (["train", "tokenizer=byte", "tokenizer.special_tokens=[a]"], ["only sentencepiece"]),
    "empty path": (["train", "data.path="], ["path is empty"]),
    "empty name": (["train", "name=''"], ["the name is empty"]),
    "nothing to write": (["generate", "archive=a", "max_new_tokens=0"], ["max_new_tokens is at least 1"]),
    "huge seed": (["generate", "archive=a", "seed=100000000000000000000"], ["below 2 ** 32"]),
    "key below a value": (["train", "model.layers.x=3"], ["model.layers", "a whole number"]),
    "key in generate": (["generate", "archive=a", "temprature=1"], ["temprature", "did you mean temperature?"]),
    "key in chat": (["chat", "archive=a", "top_kk=1"], ["top_kk", "did you mean top_k?"]),
    "key in evaluate": (["evaluate", "archive=a", "data.pth=x"], ["data.pth", "did you mean data.path?"]),
    "key in tokenize": (["tokenize", "out=a", "worker=2"], ["worker", "did you mean workers?"]),
    "key in check": (["check", "data.batchsize=2"], ["data.batchsize", "did you mean data.batch_size?"]),
    "key in graph": (["graph", "insde=true"], ["insde", "did you mean inside?"]),
    "key in list": (["list", "groop=model"], ["groop", "did you mean group?"]),
    "key far from any": (["list", "zzz=1"], ["zzz", "no such setting", "remove it"]),
    "option": (["train", "model=lama_tiny"], ["model", "lama_tiny", "did you mean model=llama_tiny?"]),
    "option of an optimizer": (["train", "optim=adam"], ["optim", "did you mean optim=adamw?"]),
    "option far from any": (["train", "schedule=zzzz"], ["schedule", "one of constant, cosine"]),
    "experiment": (["train", "experiment=dmeo"], ["experiment", "did you mean experiment=demo?"]),
    "experiment of another verb": (
        ["train", "experiment=digit_strings_transducer"],
        ["experiment", "digit_strings_transducer is not for `nemolet train`"],
    ),
    "group": (["train", "optimizer=adamw"], ["optimizer", "no such setting"]),
    "group of another verb": (["generate", "archive=a", "model=gpt_tiny"], ["model", "nemolet generate"]),
    "group to list": (["list", "group=modl"], ["group", "did you mean 'model'?"]),
    "target": (
        ["train", "model._target_=nemolet.language.CausalML"],
        ["model._target_", "did you mean nemolet.language.CausalLM?"],
    ),
    "target outside": (["train", "model._target_=torch.load"], ["model._target_", "'torch.load'", "register"]),
    "target that may not be built": (
        ["train", "model._target_=nemolet.archive.save"],
        ["model._target_", "a config may not build this"],
    ),
    "scaling": (["train", "model.rope_scaling=linear"], ["model.rope_scaling", "the settings of RopeScaling"]),
    # types
    "text for a number": (["train", "optim.lr=fast"], ["optim.lr", "a number", "'fast'"]),
    "quoted number": (["train", "seed='3'"], ["seed", "a whole number", "without quotes"]),
    "fraction for a count": (["train", "trainer.max_steps=1.5"], ["trainer.max_steps", "a whole number", "1.5"]),
    "float for a count": (["train", "trainer.max_steps=1e3"], ["trainer.max_steps", "write trainer.max_steps=1000"]),
    "number for text": (["train", "name=5"], ["name", "text", "name=\"'5'\""]),
    "number for a flag": (["train", "model.bias=1"], ["model.bias", "true or false"]),
    "flag for a number": (["train", "model.layers=true"], ["model.layers", "a whole number", "True"]),
    "null for a value": (["train", "data.batch_size=null"], ["data.batch_size", "a whole number", "None"]),
    "value for a block": (["train", "++optim=3"], ["optim", "there is no such option"]),
    "list for a value": (["train", "optim.lr=[1,2]"], ["optim.lr", "a number"]),
    "value for a list": (["train", "optim.betas=0.9"], ["optim.betas", "a list of 2"]),
    "list of another length": (["train", "optim.betas=[0.9]"], ["optim.betas", "a list of 2"]),
    "wrong item": (["train", "optim.betas=[0.9,high]"], ["optim.betas[1]", "a number", "'high'"]),
    "choice": (["train", "model.norm=rmss"], ["model.norm", "did you mean model.norm=rms?"]),
    "precision": (["train", "trainer.precision=fp16"], ["trainer.precision", "bf16-mixed", "'fp16'"]),
    "tokenizer": (["train", "tokenizer.kind=bype"], ["tokenizer.kind", "did you mean tokenizer.kind=byte?"]),
    "logger": (["train", "trainer.loggers=[tensorbord]"], ["trainer.loggers[0]", "tensorboard"]),
    "weight of a blend": (["train", "data.path={a.txt: much}"], ["data.path", "a number"]),
    "weight of zero": (["train", "data.path={a.txt: 1, b.txt: 0}"], ["weights of a blend are above 0", "leave out"]),
    "imports that are no list": (["train", "imports=mine"], ["imports", "a list of text"]),
    "prompt": (["generate", "archive=a", "prompt=[1,2]"], ["prompt", "text or a list of text"]),
    # missing
    "archive": (["generate"], ["archive", "a value is missing", "set archive=..."]),
    "archive to evaluate": (["evaluate"], ["archive", "a value is missing"]),
    "archive to chat with": (["chat"], ["archive", "a value is missing"]),
    "output": (["tokenize"], ["out", "a value is missing"]),
    "tokenizer file": (["train", "tokenizer=file"], ["tokenizer.path", "a value is missing"]),
    "kind without its file": (["train", "tokenizer.kind=file"], ["tokenizer.path", "needs"]),
    "deleted block": (["train", "~model"], ["model", "a value is missing"]),
    "deleted setting": (["train", "~model.layers"], ["model.layers", "a value is missing"]),
    "deleted nothing": (["train", "~missing"], ["missing", "no such group or setting"]),
    "module": (["train", "imports=[there_is_no_such_module]"], ["imports", "there_is_no_such_module"]),
    # grammar
    "brackets": (["train", "data.path=a b["], ["data.path=a b[", "key=value"]),
    "bare word": (["train", "nope"], ["nope", "this is no override"]),
    "no key": (["train", "=3"], ["=3", "this is no override"]),
    "open quote": (["train", "name='a"], ["name='a", "this is no override"]),
    "interpolation": (["train", "model.width=${nope}"], ["model.width", "nope"]),
    "interpolation of itself": (["train", "name=${name}"], ["name", "ecursive"]),
    "several values": (["train", "optim.lr=1,2"], ["optim.lr", "--multirun"]),
    "Hydra's own": (["train", "hydra.nope=1"], ["hydra.nope"]),
    # impossible together
    "heads": (["train", "model.heads=7"], ["width must be divisible by heads", "model.width=192", "model.heads=7"]),
    "key/value heads": (["train", "model.kv_heads=4"], ["heads must be divisible by kv_heads", "model.kv_heads=4"]),
    "more key/value heads": (["train", "model.kv_heads=12"], ["kv_heads may not exceed heads"]),
    "no heads": (["train", "model.heads=0"], ["width must be divisible by heads", "model.heads=0"]),
    "odd heads": (["train", "model.width=90"], ["rotary positions need an even head size", "model.width=90"]),
    "dropout": (["train", "model.dropout=1.5"], ["dropout is a probability", "model.dropout=1.5"]),
    "layers": (["train", "model.layers=0"], ["layers", "model.layers=0"]),
    "long sequences": (["train", "data.sequence_length=512"], ["data.sequence_length=512", "model.context=256"]),
    "long warm-up": (
        ["train", "trainer.max_steps=50"],
        ["warm-up", "schedule.warmup_steps=100", "trainer.max_steps=50"],
    ),
    "fraction of validation": (["train", "data.valid_fraction=1.5"], ["data.valid_fraction=1.5", "between 0 and 1"]),
    "smallest rate": (["train", "schedule.min_ratio=2"], ["schedule.min_ratio=2"]),
    "average": (["train", "trainer.ema=1.0"], ["trainer.ema=1.0", "between 0 and 1"]),
    "half on a CPU": (
        ["train", "trainer.precision=16-mixed", "trainer.accelerator=cpu"],
        ["16-mixed", "trainer.accelerator"],
    ),
    "rate": (["train", "optim.lr=-1e-3"], ["optim.lr=-0.001", "above 0"]),
    "rate of zero": (["train", "optim.lr=0"], ["optim.lr=0"]),
    "betas": (["train", "optim.betas=[0.9,1.5]"], ["optim.betas=[0.9, 1.5]"]),
    "accumulation": (["train", "trainer.accumulate=0"], ["trainer.accumulate=0", "at least 1"]),
    "steps": (["train", "trainer.max_steps=0"], ["trainer.max_steps=0"]),
    "batch": (["train", "data.batch_size=0"], ["data.batch_size=0"]),
    "devices": (["train", "trainer.devices=0"], ["trainer.devices=0"]),
    "seed": (["train", "seed=-1"], ["seed=-1"]),
    "sample": (["train", "sample.temperature=-1"], ["sample.temperature=-1"]),
    "temperature": (["generate", "archive=a", "temperature=-1"], ["temperature=-1", "at least 0"]),
    "nucleus": (["generate", "archive=a", "top_p=0"], ["top_p=0"]),
    "picture": (["graph", "out=graph.png"], ["out", "graph.png", ".svg or .md"]),
    "check refuses what train refuses": (["check", "model.heads=7"], ["model.heads=7"]),
    # sweeps
    "one bad job": (["train", "optim.lr=1e-3,-3", "--multirun"], ["optim.lr=-3", "job 1 of 2", "none was started"]),
    "bad option of a sweep": (
        ["train", "-m", "model=gpt_tiny,gpt_tinny", "data.sequence_length=8"],
        ["did you mean model=gpt_tiny?"],
    ),
    "key beside a sweep": (["train", "seed=1,2", "sede=3", "-m"], ["did you mean seed?"]),
    "printing a bad key": (["train", "nope=1", "--cfg", "job"], ["nope", "no such setting"]),
    "looking at a bad key": (["train", "--info", "model.widht=1"], ["did you mean model.width?"]),
    "help with a bad option": (["train", "model=gpt_tinny", "--help"], ["did you mean model=gpt_tiny?"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_with_its_place_and_remedy(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, words = MISTAKES[name]
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert err.startswith("ConfigError: ")
    assert "Traceback" not in out + err
    assert len(err.splitlines()) <= 24
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize(
    ("verb", "setting"), [("train", "data.path"), ("check", "data.path"), ("tokenize", "path"), ("manifest", "path")]
)
def test_a_file_without_its_setting_is_told_which(verb, setting, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rain.txt").write_text("it rains")
    assert main([verb, "rain.txt"]) == 2
    assert f"did you mean {setting}=rain.txt?" in capsys.readouterr().err


def test_there_are_many_of_them():
    assert len(MISTAKES) > 80


def test_several_mistakes_are_reported_at_once(capsys):
    assert (
        main(["train", "model=gpt_tiny", "model.widht=64", "model.heads=7", "optim.lr=fast", "schedule=cosin", "b["])
        == 2
    )
    err = capsys.readouterr().err
    assert "5 problems" in err
    for words in (
        "b[: this is no override",
        "did you mean schedule=cosine?",
        "did you mean model.width?",
        "width must be divisible by heads",
        "optim.lr: wrong type of value",
    ):
        assert words in err


def test_developers_may_see_where_it_was_raised(monkeypatch):
    monkeypatch.setenv("NEMOLET_TRACEBACK", "1")
    with pytest.raises(Exception, match="did you mean seed"):
        main(["train", "sede=1"])


def test_a_refusal_does_not_wait_for_torch():
    code = (
        "import sys; from nemolet.cli import main\n"
        "assert main(['train', 'model=gpt_tinny', 'optim.lrr=1']) == 2\n"
        "assert main(['train', 'model._target_=nemolet.module.torch.load']) == 2\n"
        "assert main(['generate', 'archive=a', 'temperature=-1']) == 2\n"
        "assert main(['train', 'seed=1,-2', '-m']) == 2\n"
        "assert main(['--help']) == main(['--version']) == main(['list']) == 0\n"
        "assert not {'torch', 'pytorch_lightning', 'numpy', 'sentencepiece'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
