"""Conversations: sandboxed templates, exact masks, packing that changes nothing, and a lint that refuses."""

from __future__ import annotations

import json

import pytest
import torch

import nemolet as nl
from nemolet.data import ChatTemplate, Instructions, Preferences, encode_chat
from nemolet.data.chat import Learned, lint, show
from nemolet.data.chat_template import TEMPLATES
from nemolet.data.instructions import packed
from nemolet.errors import DataError
from nemolet.tokenizers import ByteTokenizer, SentencePieceTokenizer
from nemolet.types import IGNORED

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]
BYTES = ByteTokenizer()
LLAMA = (  # in the manner of published templates
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    names = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]
    return SentencePieceTokenizer.train(["Hello, see you. Be brief."] * 9, vocab_size=290, special_tokens=names)


@pytest.mark.parametrize("source", [*TEMPLATES, LLAMA])
def test_what_the_assistant_says_is_learned_with_its_end_and_nothing_else(tokenizer, source):
    chat = encode_chat(tokenizer, CHAT, "here", template=ChatTemplate(source))
    said = []
    for index, learned in enumerate(chat.learned):
        if learned and (index == 0 or not chat.learned[index - 1]):
            said.append([])
        if learned:
            said[-1].append(chat.tokens[index])
    assert [tokenizer.decode(ids).strip() for ids in said] == ["Hello", "See you"]
    assert all(ids[-1] in tokenizer.special_tokens.values() for ids in said)
    lint(tokenizer, chat, "here")
    whole = ChatTemplate(source).render(CHAT, eos_token="</s>").rstrip("\n")
    assert tokenizer.decode(chat.tokens, special=True) == whole


def test_the_prompt_of_a_turn_is_what_generation_sees(tokenizer):
    template = ChatTemplate("chatml")
    chat = encode_chat(tokenizer, CHAT, "here", template=template)
    start = len(chat.tokens) - 1 - chat.learned[::-1].index(True)
    while chat.learned[start - 1]:
        start -= 1
    prompt = template.render(CHAT[:-1], add_generation_prompt=True)
    assert tokenizer.decode(chat.tokens[:start], special=True) == prompt


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{{ 'x' * 100000000 }}{{ 'y' * 5000000 }}",
        "{% if %}",
        "{{ raise_exception('no system message') }}",
    ],
)
def test_a_template_reaches_nothing(source):
    with pytest.raises(DataError, match="chat_template"):
        ChatTemplate(source).render(CHAT)


def test_what_a_template_may_not_see_is_not_there():
    assert ChatTemplate("{{ raise_exception.__globals__ }}{{ messages.__class__ }}").render(CHAT) == ""


def test_a_template_that_rewrites_the_past_is_refused():
    source = "{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}"
    with pytest.raises(DataError, match="earlier messages anew"):
        ChatTemplate(source).turns(CHAT)


def test_a_message_cannot_spell_a_special_token(tokenizer):
    chat = [{"role": "user", "content": "x<|im_end|>"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(DataError, match="spells a special token"):
        encode_chat(tokenizer, chat, "here")
    with pytest.raises(DataError, match="needs a role and a content"):
        encode_chat(tokenizer, [{"role": "user"}], "here")


def test_the_lint_refuses_what_would_teach_something_else(tokenizer):
    with pytest.raises(DataError, match="nothing here is said by the assistant"):
        lint(tokenizer, encode_chat(tokenizer, CHAT[:2], "a.jsonl:1"), "a.jsonl:1")
    endless = ChatTemplate("{% for m in messages %}{{ m.content }} {% endfor %}")
    with pytest.raises(DataError, match="stops an answer is not learned"):
        lint(tokenizer, encode_chat(tokenizer, CHAT, "x", template=endless), "x")

    class WithStart(ByteTokenizer):
        bos_id = 256

    with pytest.raises(DataError, match="begins twice"):
        lint(WithStart(), Learned([256, 256, 97, 256], [False, False, True, True]), "x")


def test_the_mask_is_shown(tokenizer):
    chat = encode_chat(tokenizer, CHAT[1:3], "x")
    assert show(tokenizer, chat, colour=False) == "User: Hi\nAssistant: [Hello</s>]"
    assert "\033[32mHello</s>\033[0m" in show(tokenizer, chat)


# ---------------------------------------------------------------------------------------- sources


def test_every_form_of_a_record_is_read(tmp_path):
    rows = [
        {"messages": CHAT[1:3]},
        {"prompt": "Hi", "response": "Hello"},
        {"instruction": "Hi", "instances": [{"input": "", "output": "Hello"}]},
    ] * 8
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Instructions(path=str(path), pack=False)
    data = source.prepare(BYTES)
    assert len({tuple(s["tokens"]) for s in data.train}) == 1
    path.write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match=r"t.jsonl:1: the record is no conversation"):
        source.prepare(BYTES)


def test_packing_changes_no_loss(tmp_path):
    rows = [{"prompt": "a" * (1 + i % 5), "response": "b" * (1 + i % 3)} for i in range(30)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    model = nl.language.CausalLM(vocab_size=257, layers=1, width=16, heads=2, context=128)
    graph = nl.training.training_graph(model, nl.language.CrossEntropy())
    totals = []
    for pack in (False, True):
        data = Instructions(path=str(path), pack=pack, context=128, valid_fraction=0.5).prepare(BYTES)
        results = [graph(**batch) for batch in data.valid_loader()]
        totals.append((sum(r.loss.item() for r in results), sum(int(r.count) for r in results), len(data.valid)))
    assert totals[0][0] == pytest.approx(totals[1][0], rel=1e-5)
    assert totals[0][1] == totals[1][1]
    assert totals[1][2] < totals[0][2] / 2


def test_packed_sequences_fit_and_lose_nothing():
    sizes = [5, 3, 9, 1, 7, 2, 2, 8]
    samples = [
        {"tokens": [n] * n, "labels": [IGNORED] * n, "segments": [1] * n, "positions": list(range(n))} for n in sizes
    ]
    rows = packed(samples, 10)
    assert all(len(row["tokens"]) <= 10 for row in rows)
    assert sorted(t for row in rows for t in row["tokens"]) == sorted(n for n in sizes for _ in range(n))
    assert len(rows) == 4


def test_preferences_share_their_prompt(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}\n' * 12)
    sample = Preferences(path=str(path)).prepare(BYTES).train[0]
    sides = [BYTES.decode(sample[name]) for name in ("tokens", "rejected_tokens")]
    assert sides == ["User: Hi\nAssistant: Hello", "User: Hi\nAssistant: No"]
    assert [t for t in sample["rejected_labels"] if t != IGNORED] == [*b"No", 256]


def test_real_instructions_are_clean(shared_data):
    source = Instructions(path=str(shared_data / "instruct" / "seed_tasks.jsonl"), context=4096, too_long="skip")
    data = source.prepare(BYTES)
    assert data.counts.train + data.counts.valid == 175
