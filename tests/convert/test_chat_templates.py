"""Chat templates are found where transformers finds them, and write what it writes."""

from __future__ import annotations

import io
import json

import pytest
import torch
import transformers

from nemolet.cli import main
from nemolet.convert.folder import CARRIED, TEMPLATES
from nemolet.data.chat import token_names
from nemolet.data.chat_template import TEMPLATES as TEMPLATES_OF_OURS
from nemolet.data.chat_template import ChatTemplate
from nemolet.errors import DataError, GenerationError

from .tiny_tokenizers import ours, save_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello", "tool_calls": None},
    {"role": "user", "content": "naïve?"},
    {"role": "assistant", "content": "No"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}]
DOCUMENTS = [{"title": "One", "text": "<text> of one"}]
QWEN = (  # in the manner of published templates
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}\n"
    "{{- '<|im_end|>\\n' }}{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'assistant' %}\n"
    "        {{- '<|im_start|>assistant\\n' }}"
    "{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}\n"
    "        {{- '\\n' }}\n"
    "    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
)
DIALECT = {
    "qwen": QWEN,
    "loops": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ documents | tojson }}",
    "keys": "{% for m in messages %}{{ 'tool_calls' in m }}{{ m.get('name', '-') }}{% endfor %}",
    "names": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ nothing }}",
    "year": "{{ strftime_now('%Y') }}",
    "values": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 2 * 3 %}{% endfor %}{{ ns.n }}"
    "{{ dict(a=1) }}",
}


def files(folder):
    there = [*CARRIED, *(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja"))]
    return {name: (folder / name).read_bytes() for name in there if (folder / name).is_file()}


@pytest.mark.parametrize("name", DIALECT)
def test_a_template_writes_what_it_writes_in_transformers(name, tmp_path):
    theirs = save_tokenizer("llama", tmp_path, chat_template=DIALECT[name], pad_token="</s>")
    template = ChatTemplate.of(files(tmp_path))
    assert template is not None and template.source == theirs.chat_template
    for asked in ({}, {"add_generation_prompt": True}, {"tools": TOOLS, "documents": DOCUMENTS}):
        expected = theirs.apply_chat_template(CHAT, tokenize=False, **asked)
        assert template.render(CHAT, **asked, **token_names(ours(tmp_path))) == expected


TRIMS = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
SHOUTS = "{% for m in messages %}[{{ m.content | upper }}]{% endfor %}"
DROPS = "{% for m in messages[:-1] %}[{{ m.content }}]{% endfor %}"


@pytest.mark.parametrize("source", [QWEN, TRIMS], ids=["keeps", "trims"])
@pytest.mark.parametrize("text", ["No", " No ", "No\n\n", "", "Hi"])
def test_a_message_goes_on_where_it_does_in_transformers(source, text, tmp_path):
    theirs = save_tokenizer("llama", tmp_path, chat_template=source)
    chat = [*CHAT[:-1], {"role": "assistant", "content": text}]
    expected = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert ChatTemplate(source).render_open(chat) == expected


@pytest.mark.parametrize(
    ("source", "chat"),
    [(SHOUTS, CHAT), (DROPS, CHAT), (QWEN, []), (QWEN, [{"role": "tool"}])],
    ids=["shouts", "drops", "no message", "no text"],
)
def test_a_message_that_cannot_go_on_is_refused(source, chat):
    with pytest.raises(DataError, match="goes on|as it is"):
        ChatTemplate(source).render_open(chat)


WITHIN = QWEN.replace(
    "{{- message.content + ", "{% generation %}{{- message.content }}{% endgeneration %}{{- "
)  # a mark in a mark


@pytest.mark.parametrize("source", [QWEN, WITHIN], ids=["one mark", "marks within marks"])
def test_what_a_template_marks_is_learned(source, tmp_path):
    theirs = save_tokenizer("qwen2", tmp_path, chat_template=source)
    whole = theirs.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    mine, template = ours(tmp_path), ChatTemplate.of(files(tmp_path))
    assert template.render(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False)
    ids, learned = [], []
    for turn in template.turns(CHAT):
        some = mine.encode(turn.text, special=True)
        ids, learned = ids + some, learned + [int(turn.learned)] * len(some)
    count = len(ids)  # without the line end behind
    assert (ids, learned) == (whole["input_ids"][:count], whole["assistant_masks"][:count])
    assert len(whole["input_ids"]) - count <= 1


def test_marks_that_do_not_hold_are_refused():
    template = ChatTemplate("{% set x %}{% generation %}Yes{% endgeneration %}{% endset %}{{ x[:2] }}")
    assert template.render(CHAT) == "Y"
    with pytest.raises(DataError, match="1 beginnings and 0 ends"):
        template.turns(CHAT)


def test_characters_of_the_marks_are_refused_in_messages():
    template = ChatTemplate(QWEN)
    with pytest.raises(DataError, match="for private use"):
        template.render([{"role": "user", "content": "\uf8f0"}])


@pytest.mark.parametrize(
    "written",
    [
        {"tokenizer_config.json": "one"},
        {"tokenizer_config.json": [{"name": "default", "template": "one"}, {"name": "rag", "template": "two"}]},
        {"tokenizer_config.json": [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]},
        {"tokenizer_config.json": "one", "chat_template.jinja": "file"},
        {"tokenizer_config.json": "one", "chat_template.jinja": "file", f"{TEMPLATES}/tool_use.jinja": "other"},
        {"chat_template.jinja": "file"},
    ],
    ids=lambda written: " ".join(written),
)
def test_templates_are_found_in_transformers_order(written, tmp_path):
    save_tokenizer("llama", tmp_path)
    for name, content in written.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if name == "tokenizer_config.json":
            content = json.dumps({**json.loads(path.read_text()), "chat_template": content})
        path.write_text(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = ChatTemplate.of(files(tmp_path))
    for asked in ({}, {"tools": TOOLS}):
        assert found.render(CHAT, **asked) == theirs.apply_chat_template(CHAT, tokenize=False, **asked)
    if isinstance(theirs.chat_template, dict):
        for name in theirs.chat_template:
            assert ChatTemplate.of(files(tmp_path), name).source == theirs.chat_template[name]


def test_an_old_file_comes_last_and_a_name_is_known():
    old = {"chat_template.json": b'{"chat_template": "old"}'}
    assert ChatTemplate.of({}) is None
    assert ChatTemplate.of(old).source == "old"
    assert ChatTemplate.of({**old, "tokenizer_config.json": b'{"chat_template": "new"}'}).source == "new"
    with pytest.raises(DataError, match="no chat template of this name"):
        ChatTemplate.of(old, "rag")
    with pytest.raises(DataError, match="no JSON"):
        ChatTemplate.of({"tokenizer_config.json": b"{"})


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{% set ns = namespace(__class__=1) %}",
        "{{ strftime_now.__globals__['json'].__loader__ }}",
        "{{ dict.__init__.__globals__.json }}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ 9 ** 999999999 }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.missing.deeper }}",
        "{% generation %}{{ messages.clear() }}{% endgeneration %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_a_template_stays_in_its_sandbox(source):
    with pytest.raises(DataError, match="chat_template"):
        ChatTemplate(source).render(CHAT)


# ---------------------------------------------------------------------------------------- in use


@pytest.fixture
def chatter(tmp_path):
    """A tiny model of transformers with a tokenizer and a template of its own."""
    theirs = save_tokenizer("qwen2", tmp_path / "hf", chat_template=QWEN)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Qwen2Config(
        vocab_size=len(theirs), num_key_value_heads=1, max_position_embeddings=256, **sizes
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_a_model_is_fine_tuned_in_its_own_template_unless_told_otherwise(chatter, tmp_path, capsys):
    rows = [{"prompt": "Hi", "response": "Hello"}] * 24
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = ["trainer.max_steps=1", "schedule.warmup_steps=0", "trainer.progress=false", "trainer.loggers=[]"]
    data = ["data=instructions", f"data.path={tmp_path / 'chats.jsonl'}", "show=1"]
    shown = {}
    for name, more in {"own": [], "other": ["data.template=chatml"]}.items():
        run = tmp_path / name
        assert main(["finetune", str(chatter), *data, *short, *more, f"folder={run}"]) == 0
        shown[name] = capsys.readouterr().out
        assert main(["convert", str(run / "model.nemolet"), str(tmp_path / f"{name}-hf")]) == 0
        capsys.readouterr()
    assert "<|im_start|>assistant\n\033[0m\033[32mHello<|im_end|>\033[0m" in shown["own"]
    theirs = {n: transformers.AutoTokenizer.from_pretrained(tmp_path / f"{n}-hf") for n in shown}
    assert theirs["own"].chat_template == QWEN
    assert theirs["other"].chat_template == TEMPLATES_OF_OURS["chatml"]


def test_a_chat_is_a_conversation_in_the_template_of_the_model(chatter, capsys, monkeypatch):
    prompts = []

    def remembered(model, tokenizer, asked, **how):
        prompts.append((asked[0], how["rules"].stop))
        yield 0, "ok"

    monkeypatch.setattr("nemolet.language.decoding.stream", remembered)
    theirs = transformers.AutoTokenizer.from_pretrained(chatter)
    said = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "So"},
    ]
    for template in ([], ["template=none"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n<|im_end|>\nSo\n"))
        assert main(["chat", str(chatter), *template]) == 0
    out = capsys.readouterr()
    assert "spells a special token" in out.err
    asked = [theirs.apply_chat_template(part, add_generation_prompt=True)["input_ids"] for part in (said[:1], said)]
    assert [prompt for prompt, _ in prompts] == [*asked, "Hi", "<|im_end|>", "So"]
    assert prompts[0][1] == (theirs.eos_token_id, theirs.convert_tokens_to_ids("<|im_end|>"))


def test_a_conversation_forgets_its_oldest_turns_and_no_system_message(chatter, capsys, monkeypatch):
    prompts, context, longest = [], 256, 40

    def remembered(model, tokenizer, asked, **how):
        prompts.append(asked[0])
        if len(asked[0]) > context:
            raise GenerationError("the prompt is longer than the model can read")
        yield 0, f"answer {len(prompts)}"

    monkeypatch.setattr("nemolet.language.decoding.stream", remembered)
    theirs = transformers.AutoTokenizer.from_pretrained(chatter)
    lines = [f"question {number}" for number in range(14)]
    lines.insert(10, "long " * context)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", str(chatter), "system=Be kind", f"max_new_tokens={longest}"]) == 0
    said, forgotten = [], 0
    for number, (line, prompt) in enumerate(zip(lines, prompts, strict=True), 1):
        asked = [*said, {"role": "user", "content": line}]

        def written(first, asked=asked):
            messages = [{"role": "system", "content": "Be kind"}, *asked[2 * first :]]
            return theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

        first = next((n for n in range(len(asked) // 2) if len(written(n)) <= context - longest), len(asked) // 2)
        assert prompt == written(first)
        if len(prompt) <= context:  # a line that is too long by itself is forgotten, and nothing else
            said = [*asked[2 * first :], {"role": "assistant", "content": f"answer {number}"}]
            forgotten += first
    err = capsys.readouterr().err
    assert err.count("Try another line") == 1 and "no longer fit the context (256 tokens)" in err
    assert forgotten >= 2 and len(said) > 2
