"""The harness finds the same with our model as with its own class for models of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from nemolet.errors import ConfigError
from nemolet.lm_eval import HarnessModel

from .tiny_tokenizers import save_tokenizer

TEXTS = ["to be", "the question. to be, or not", "x " * 60, "return", "naïve"]
CHATS = [
    [{"role": "user", "content": "to be?"}],
    [{"role": "user", "content": "to be?"}, {"role": "assistant", "content": "not"}],
    [{"role": "user", "content": "to be?"}, {"role": "assistant", "content": " not to "}],
    [{"role": "user", "content": "to be?"}, {"role": "assistant", "content": ""}],
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module", params=["llama", "llama-bare", "gpt2"])
def models(request, tmp_path_factory):
    """The same tiny folder, as their class and ours read it."""
    folder = tmp_path_factory.mktemp("harness") / "hf"
    tokenizer = save_tokenizer(request.param, folder, chat_template=TEMPLATE)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=32, initializer_range=0.4, **sizes, **marks
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=1, dtype="float32", max_length=32)
    return theirs, HarnessModel(str(folder), batch_size=1)


def asked(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"until": ["e"], "max_gen_toks": 12, "do_sample": False},
        {"until": ["t", "or", " "], "max_gen_toks": 20},
        {"until": [], "max_gen_toks": 9, "temperature": 0.0},
        {"until": "n", "max_new_tokens": 11},
        {"until": ["\n\n"], "max_tokens": 5, "max_gen_toks": 3},
    ],
    ids=str,
)
def test_continuations_equal_those_of_its_own_class(models, settings):
    found = []
    for model in models:
        requests = [asked("generate_until", text, dict(settings)) for text in TEXTS]
        found.append(model.generate_until(requests, disable_tqdm=True))
    assert found[1] == found[0]


def test_likelihoods_equal_those_of_its_own_class(models):
    pairs = [(text, ending) for text in ("", "to be", "x " * 10) for ending in (" or not", "x")]
    rolling = []
    for kind, arguments in (("loglikelihood", pairs), ("loglikelihood_rolling", [(text,) for text in TEXTS])):
        found = [getattr(m, kind)([asked(kind, *each) for each in arguments], disable_tqdm=True) for m in models]
        rolling.append(found)
    for theirs, ours in zip(*rolling[0], strict=True):
        assert ours == (pytest.approx(theirs[0], abs=1e-3), theirs[1])
    if not models[1].tok_encode("")[:1]:  # theirs counts a beginning once more, after another one, where a text has one
        assert rolling[1][1] == pytest.approx(rolling[1][0], abs=1e-2)


def test_chats_equal_those_of_its_own_class(models):
    theirs, ours = models
    for chat in CHATS:
        for prompt in (True, False):
            expected = theirs.apply_chat_template(chat, add_generation_prompt=prompt)
            assert ours.apply_chat_template(chat, add_generation_prompt=prompt) == expected


def test_a_context_needs_room(models):
    with pytest.raises(ConfigError, match="no room for a context"):
        models[1].generate_until([asked("generate_until", "to be", {"max_gen_toks": 32})])
