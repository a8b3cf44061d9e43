"""The harness measures our models: its command line on a local task, and numbers that equal a direct computation."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import nemolet as nl
from nemolet.errors import ConfigError, DataError
from nemolet.language.decoding import _encode_prompt
from nemolet.language.likelihood import likelihoods
from nemolet.tokenizers import ByteTokenizer

pytest.importorskip("lm_eval")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from nemolet.lm_eval import HarnessModel

ROWS = [
    {"question": "The sky is", "choices": [" blue", " a long green thing"], "answer": 0},
    {"question": "Two and two make", "choices": [" five", " four"], "answer": 1},
    {"question": "Snow is", "choices": [" white", " hot"], "answer": 0},
]
CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WORDS = """
task: local_words
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list: [{metric: bits_per_byte}]
"""
ANSWERS = """
task: local_answers
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a table of questions and three tasks about it."""
    home = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    model = nl.language.CausalLM(vocab_size=tokenizer.vocab_size, layers=2, width=32, heads=2, context=24)
    with torch.no_grad():
        model.graph.embed.weight.mul_(20)
    nl.save(home / "m.nemolet", model=model.eval(), tokenizer=tokenizer)
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (home / "tasks").mkdir()
    for name, task in {"choices": CHOICES, "words": WORDS, "answers": ANSWERS}.items():
        (home / "tasks" / f"{name}.yaml").write_text(task.replace("FILE", str(home / "rows.jsonl")))
    return home


@pytest.fixture(scope="module")
def model(folder):
    return HarnessModel(str(folder / "m.nemolet"), batch_size=2)


@torch.no_grad()
def direct(model: HarnessModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One pair, by the definition."""
    tokens = torch.tensor([*context, *continuation])[-25:]
    log_probs = model.model(tokens[None, :-1])[0].log_softmax(-1)[-len(continuation) :]
    return sum(log_probs[i, t].item() for i, t in enumerate(continuation)), log_probs.argmax(
        -1
    ).tolist() == continuation


def request(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_likelihoods_are_those_of_a_direct_computation(model):
    pairs = [(row["question"], choice) for row in ROWS for choice in row["choices"]]
    pairs += [("", "start"), ("a context that is far too long for the model", " end"), ("ends in a space ", "word")]
    found = model.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), one in zip(pairs, found):
        whole, before = model.tok_encode(context + continuation), model.tok_encode(context.rstrip())
        expected = direct(model, before or [model.eot_token_id], whole[len(before) :])
        assert one == pytest.approx(expected, abs=1e-4)


def test_what_the_model_would_write_is_greedy(model):
    tokens = model.tok_encode("Snow is")
    for _ in range(3):
        tokens.append(int(model.model(torch.tensor([tokens]))[0, -1].argmax()))
    assert likelihoods(model.model, [(tokens[:-3], tokens[-3:])])[0].greedy
    assert not likelihoods(model.model, [(tokens[:-3], [*tokens[-3:-1], (tokens[-1] + 1) % 256])])[0].greedy


def test_whole_texts_are_cut_into_windows(model):
    text = "A text of more than twenty-four bytes, which is what this model can see at once."
    tokens = model.tok_encode(text, add_special_tokens=False)
    expected, start = 0.0, model.eot_token_id
    for at in range(0, len(tokens) - 24, 24):  # disjoint windows, the last with as much before it as fits
        expected += direct(model, [start], tokens[at : at + 24])[0]
        start = tokens[at + 23]
    rest = len(tokens) % 24
    expected += direct(model, tokens[-25:-rest], tokens[-rest:])[0]
    found = model.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    assert found == [pytest.approx(expected, abs=1e-3)]


def test_continuations_end_where_a_task_says(model):
    settings = {"until": ["e"], "max_gen_toks": 8, "do_sample": False}
    asked = [request("generate_until", prompt, settings) for prompt in ("Snow", "The sky", "Two")]
    asked.insert(1, request("generate_until", "Snow", {"max_gen_toks": 2}))
    found = model.generate_until(asked)
    for one, text in zip(asked, found):
        options = one.args[1]
        (expected,) = model.model.generate(
            model.text,
            [one.args[0]],
            max_new_tokens=options["max_gen_toks"],
            temperature=0.0,
            stop=options.get("until", []),
        )
        assert text == expected.text


def test_a_text_begins_as_a_prompt_does(folder, model):
    """The byte tokenizer has no beginning-of-text token; what ends a document opens the next one."""
    opener = model.text.opener
    assert model.tok_encode("Snow") == [opener, *b"Snow"] == _encode_prompt(model.text, "Snow")
    assert model.tok_encode("Snow", add_special_tokens=False) == [*b"Snow"]
    written = next(name for name, index in model.text.special_tokens.items() if index == opener)
    assert model.tok_encode(f"{written}Snow") == [opener, *b"Snow"]  # a template of a chat has put it there
    assert HarnessModel(str(folder / "m.nemolet"), add_bos=False).tok_encode("Snow") == [*b"Snow"]


def test_the_harness_runs_a_local_task(folder):
    found = simple_evaluate(
        model="nemolet",
        model_args=f"path={folder / 'm.nemolet'}",
        tasks=["local_choices", "local_words", "local_answers"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
        apply_chat_template=False,
    )
    right = 0
    model = HarnessModel(str(folder / "m.nemolet"))
    for row in ROWS:
        choices = [model.tok_encode(choice, add_special_tokens=False) for choice in row["choices"]]
        scores = [direct(model, model.tok_encode(row["question"]), choice)[0] for choice in choices]
        right += scores.index(max(scores)) == row["answer"]
    assert found["results"]["local_choices"]["acc,none"] == pytest.approx(right / len(ROWS))
    bits = found["results"]["local_words"]["bits_per_byte,none"]
    texts = [row["question"] for row in ROWS]
    nats = sum(model.loglikelihood_rolling([request("loglikelihood_rolling", text) for text in texts]))
    assert bits == pytest.approx(-nats / sum(len(t) for t in texts) / torch.tensor(2.0).log().item(), rel=1e-5)
    assert found["results"]["local_answers"]["exact_match,none"] == 0


@pytest.mark.slow  # it reads the list of all tasks that the harness knows
def test_the_command_line_of_the_harness_knows_the_model(folder):
    command = [sys.executable, "-m", "nemolet.lm_eval", "--model", "nemolet", "--tasks", "local_choices"]
    command += ["--model_args", f"path={folder / 'm.nemolet'}", "--include_path", str(folder / "tasks")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "local_choices" in done.stdout and "acc_norm" in done.stdout


def test_a_chat_is_written_by_the_template(model):
    history = [{"role": "user", "content": "Hi"}]
    assert model.apply_chat_template(history).endswith("User: Hi\nAssistant: ")
    assert model.chat_template(True) == "plain" and model.chat_template(False) is None


def test_what_cannot_be_evaluated_is_refused(folder, model):
    nl.save(folder / "linear.nemolet", model=nl.nn.Linear("D", "D", 2, 2))
    with pytest.raises(ConfigError, match="language model"):
        HarnessModel(str(folder / "linear.nemolet"))
    with pytest.raises(DataError, match="pair 1"):
        likelihoods(model.model, [([1], [2]), ([1], [2] * 25)])
    with pytest.raises(DataError, match="pair 0"):
        likelihoods(model.model, [([], [2])])
