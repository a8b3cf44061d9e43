"""Reward models: the loss by hand, the place that is read, and answers that are told apart."""

from __future__ import annotations

import pytest
import torch

import nemolet as nl
from nemolet.errors import DataError
from nemolet.language import CausalLM, RewardModel, RewardPairs
from nemolet.tokenizers import ByteTokenizer
from nemolet.types import IGNORED

BATCH = {
    "tokens": torch.tensor([[1, 2, 3, 4], [1, 5, 6, 0]]),
    "labels": torch.tensor([[IGNORED, 3, 4, IGNORED], [IGNORED, 6, IGNORED, IGNORED]]),
    "rejected_tokens": torch.tensor([[1, 2, 9], [1, 7, 0]]),
    "rejected_labels": torch.tensor([[IGNORED, 9, IGNORED], [7, IGNORED, IGNORED]]),
}


def model(vocab=12, tied=True):
    torch.manual_seed(0)
    return RewardModel(backbone=CausalLM(vocab_size=vocab, layers=1, width=16, heads=2, context=64, tied=tied))


def test_the_last_token_of_each_answer_is_judged():
    pairs = RewardPairs(model=model()).eval()
    found = pairs(**BATCH)
    alone = [pairs.model(torch.tensor([row])) for row in ([1, 2, 3, 4], [1, 5, 6], [1, 2, 9], [1, 7])]
    assert torch.allclose(torch.cat([found.chosen, found.rejected]), torch.cat(alone), atol=1e-6)


def test_the_loss_is_that_of_bradley_and_terry():
    pairs = RewardPairs(model=model())
    chosen, rejected = pairs(**BATCH)
    loss, count = pairs.objective()(chosen, rejected)
    odds = chosen.exp() / (chosen.exp() + rejected.exp())
    assert torch.allclose(loss, -odds.log().sum(), atol=1e-6)
    assert count == 2


def test_rewards_are_compared_without_dropout():
    torch.manual_seed(0)
    backbone = CausalLM(vocab_size=12, layers=1, width=16, heads=2, context=64, dropout=0.5)
    pairs = RewardPairs(model=RewardModel(backbone=backbone))
    assert torch.equal(pairs.train()(**BATCH).chosen, pairs.eval()(**BATCH).chosen)


def test_better_answers_come_to_have_higher_rewards():
    pairs = RewardPairs(model=model())
    graph = nl.training.training_graph(pairs, pairs.objective(), pairs.measures())
    optimizer = torch.optim.Adam(pairs.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        out = graph(**BATCH)
        (out["loss"] / out["count"]).backward()
        optimizer.step()
    after = graph(**BATCH)
    assert after["preferred_part"] == after["preferred_whole"] == 2
    assert after["loss"] < 0.2


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_the_language_model_is_left_out(tied, tmp_path):
    judge = model(vocab=257, tied=tied)
    assert not any("head" in name for name, _ in judge.named_parameters())
    path = nl.save(tmp_path / "judge.nemolet", model=judge, tokenizer=ByteTokenizer())
    records = [{"prompt": "Hi", "response": "Hello"}, {"prompt": "Hi", "response": "Go away, please"}]
    again = nl.load(path).model
    assert again.score(ByteTokenizer(), records) == judge.eval().score(ByteTokenizer(), records)


def test_a_record_is_scored_as_it_was_learned():
    judge, tokenizer = model(vocab=257).eval(), ByteTokenizer()
    text = "User: Hi\nAssistant: Hello"
    ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_id]])
    reward = judge.score(tokenizer, [{"prompt": "Hi", "response": "Hello"}])
    assert reward == pytest.approx([judge(ids).item()], abs=1e-6)
    assert judge.predict(tokenizer, [{"prompt": "Hi", "response": "Hello"}]) == [{"reward": round(reward[0], 6)}]
    with pytest.raises(DataError):
        judge.score(tokenizer, [{"prompt": "Hi", "response": "x" * 100}])
