"""Every architecture computes what transformers computes: padding, cache, generation."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from nemolet.convert import known_architectures
from nemolet.language.decoding import Decoding
from nemolet.language.sampling import Sampling

from .conftest import MODELS, VOCAB, Pair

DOCS = Path(__file__).parents[2] / "docs" / "huggingface.md"
FAR = 1e-5
LENGTH, PADS = 20, 7


def kinds(*names: str):
    wanted = {"GPT2LMHeadModel": "causal"}
    chosen = [
        name
        for name, (model, _, _) in MODELS.items()
        if ("CausalLM" in model or model in wanted) == ("causal" in names)
        and ("ConditionalGeneration" in model or "MTModel" in model) == ("seq2seq" in names)
    ]
    return pytest.mark.parametrize("name", chosen)


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-5, of numbers that are not all alike."""
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max().item() < FAR


def mask_of(lengths: list[int], *, left: bool) -> torch.Tensor:
    at = torch.arange(LENGTH)
    rows = [at >= LENGTH - n if left else at < n for n in lengths]
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------ decoders


@kinds("causal")
@torch.no_grad()
def test_a_decoder_gives_the_same_logits(name, pairs):
    pair = pairs(name)
    tokens = ids(2, LENGTH)
    close(pair.ours.model(tokens), pair.theirs(tokens).logits)


@kinds("causal")
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_a_decoder_with_padding(name, left, pairs):
    pair, tokens = pairs(name), ids(2, LENGTH)
    mask = mask_of([LENGTH, LENGTH - PADS], left=left)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    ours = pair.ours.model(tokens, mask=mask, positions=positions)
    theirs = pair.theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
    close(ours[mask], theirs[mask])


@kinds("causal")
@torch.no_grad()
def test_a_decoder_with_a_cache(name, pairs):
    pair, tokens = pairs(name), ids(2, LENGTH)
    cache = pair.ours.model.new_cache(2, LENGTH)
    parts = [pair.ours.model(part, cache=cache) for part in tokens.split([9, 1, 1, 6, 3], dim=1)]
    close(torch.cat(parts, dim=1), pair.theirs(tokens).logits)


@kinds("causal")
@torch.no_grad()
def test_a_decoder_writes_the_same_fifty_tokens(name, pairs):
    pair = pairs(name)
    prompts = [ids(1, 9)[0].tolist(), ids(1, 4, seed=3)[0].tolist()]
    decoding = Decoding(pair.ours.model, prompts, sampling=Sampling(temperature=0.0), seed=0, max_new_tokens=50)
    for _ in range(50):
        decoding.step()
    padded = torch.tensor([[0] * (9 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (9 - len(p)) + [1] * len(p) for p in prompts])
    theirs = pair.theirs.generate(padded, attention_mask=mask, **greedy(pair))
    for row, prompt, expected in zip(decoding.rows, prompts, theirs.tolist()):
        assert row[len(prompt) :] == expected[9:]
    assert len(set(decoding.rows[0])) > 5  # not one token over and over


def greedy(pair: Pair) -> dict[str, object]:
    """Fifty tokens, the likeliest each time, and no early end."""
    pair.theirs.generation_config.eos_token_id = None
    pair.theirs.generation_config.forced_eos_token_id = None
    pair.theirs.generation_config.bad_words_ids = None
    return {"max_new_tokens": 50, "do_sample": False, "num_beams": 1, "pad_token_id": 0}


# ------------------------------------------------------------------------------------------ encoders


@kinds("encoder")
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_an_encoder_with_padding_and_types(name, left, pairs):
    pair, tokens = pairs(name), ids(2, LENGTH)
    mask = mask_of([LENGTH, LENGTH - PADS], left=left)
    tokens[~mask] = pair.theirs.config.pad_token_id
    ours, theirs = {"mask": mask}, {"attention_mask": mask.long()}
    if pair.theirs.config.to_dict().get("type_vocab_size"):
        types = (torch.arange(LENGTH) > LENGTH // 2).long().expand(2, -1)
        ours["types"], theirs["token_type_ids"] = types, types
    found = pair.theirs(tokens, **theirs)
    close(pair.ours.model(tokens, **ours)[mask], found[0][mask])


@kinds("encoder")
@torch.no_grad()
def test_an_encoder_without_a_mask(name, pairs):
    pair, tokens = pairs(name), ids(2, LENGTH)
    found = pair.theirs(tokens)
    hidden = pair.ours.model(tokens)
    close(hidden, found[0])
    if getattr(found, "pooler_output", None) is not None:
        close(pair.ours.model.pool(hidden), found.pooler_output)


# ------------------------------------------------------------------------------------------ encoder-decoders


@kinds("seq2seq")
@torch.no_grad()
def test_an_encoder_decoder_with_padding(name, pairs):
    pair, source, target = pairs(name), ids(2, LENGTH), ids(2, LENGTH - 3, seed=1)
    for left in (False, True):
        mask = mask_of([LENGTH, LENGTH - PADS], left=left)
        ours = pair.ours.model(source, target, source_mask=mask)
        close(ours, pair.theirs(source, attention_mask=mask.long(), decoder_input_ids=target).logits)
    target_mask = torch.arange(LENGTH - 3) < torch.tensor([[LENGTH - 3], [9]])
    ours = pair.ours.model(source, target, source_mask=mask, mask=target_mask)
    theirs = pair.theirs(
        source, attention_mask=mask.long(), decoder_input_ids=target, decoder_attention_mask=target_mask.long()
    ).logits
    close(ours[target_mask], theirs[target_mask])


@kinds("seq2seq")
@torch.no_grad()
def test_an_encoder_decoder_with_a_cache_writes_the_same_fifty_tokens(name, pairs):
    pair, source = pairs(name), ids(2, LENGTH)
    mask = mask_of([LENGTH, LENGTH - PADS], left=False)
    start = getattr(pair.theirs.config, "decoder_start_token_id", None) or 0
    model, tokens = pair.ours.model, torch.full((2, 1), start)
    memory, cache = model.encode(source, mask), model.new_cache(2, 51)
    for _ in range(50):
        logits = model.decode(tokens[:, -1:], memory, mask, cache=cache, last_only=True)
        tokens = torch.cat((tokens, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    theirs = pair.theirs.generate(source, attention_mask=mask.long(), decoder_start_token_id=start, **greedy(pair))
    assert tokens.tolist() == theirs.tolist()
    target = ids(2, LENGTH, seed=5)
    whole = pair.theirs(source, attention_mask=mask.long(), decoder_input_ids=target).logits
    cache = model.new_cache(2, LENGTH)
    parts = [model.decode(part, memory, mask, cache=cache) for part in target.split([5, 1, 14], dim=1)]
    close(torch.cat(parts, dim=1), whole)


# ------------------------------------------------------------------------------------------ the table


@torch.no_grad()
def difference(pair: Pair) -> float:
    """The largest difference of any logit, relative to the largest logit where that is above one."""
    tokens, target = ids(2, LENGTH), ids(2, LENGTH - 3, seed=1)
    if pair.kind == "EncoderDecoder":
        ours, theirs = pair.ours.model(tokens, target), pair.theirs(tokens, decoder_input_ids=target)[0]
    else:
        ours, theirs = pair.ours.model(tokens), pair.theirs(tokens)[0]
    return (ours - theirs).abs().max().item()


def row(pair: Pair) -> str:
    """A line of the table: three times the difference, since machines differ, rounded up to a power of ten."""
    bound = min(FAR, 10 ** math.ceil(math.log10(max(3 * difference(pair), 1e-6))))
    model_class, _, _ = MODELS[pair.name]
    return f"| {pair.name} | `{model_class}` | `{pair.kind}` | {bound:.0e} |"


def test_the_table_of_architectures_holds(pairs):
    """docs/huggingface.md lists every architecture, with differences that are not below what is found here."""
    found = {}
    for line in DOCS.read_text().splitlines():
        match = re.fullmatch(r"\| ([\w-]+) \| `(\w+)` \| `(\w+)` \| (1e-\d+) \|", line)
        if match:
            found[match[1]] = (match[2], match[3], float(match[4]))
    expected = "\n".join(row(pairs(name)) for name in MODELS)
    assert list(found) == list(MODELS), f"the table should read:\n{expected}"
    for name, (model_class, kind, bound) in found.items():
        assert (model_class, kind) == (MODELS[name][0], pairs(name).kind)
        assert difference(pairs(name)) <= bound <= FAR, f"the table should read:\n{expected}"


def test_every_architecture_is_tested():
    tested = {model for model, _, _ in MODELS.values()}
    assert set(known_architectures()) == tested
