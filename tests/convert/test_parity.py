"""Every architecture computes what transformers computes: padding, cache, generation."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from nemolet.convert import known_architectures
from nemolet.language.decoding import Decoding
from nemolet.sampling import Sampling

from .conftest import MODELS, VOCAB, Pair
from .tiny_models import HEADS, example

LENGTH, PADS = 20, 7


def kinds(wanted: str):
    """The models of a kind: causal, reward, encoder, seq2seq; of speech writer, recognizer, wave."""

    def kind(model: str) -> str:
        if model.startswith("Whisper"):
            return "writer"
        if model.endswith("ForCTC"):
            return "recognizer"
        if model.startswith(("Wav2Vec2", "Hubert")):
            return "wave"
        if model.endswith("ForSequenceClassification"):
            return "reward"
        if "CausalLM" in model or model == "GPT2LMHeadModel":
            return "causal"
        return "seq2seq" if "ConditionalGeneration" in model or "MTModel" in model else "encoder"

    return pytest.mark.parametrize("name", [name for name, (model, _, _) in MODELS.items() if kind(model) == wanted])


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def mask_of(lengths: list[int], *, left: bool) -> torch.Tensor:
    at = torch.arange(LENGTH)
    rows = [at >= LENGTH - n if left else at < n for n in lengths]
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------ decoders


@kinds("causal")
@torch.no_grad()
def test_a_decoder_gives_the_same_logits(name, pairs, table):
    pair = pairs(name)
    tokens = ids(2, LENGTH)
    table.close(name, "logits", pair.ours.model(tokens), pair.theirs(tokens).logits)


@kinds("causal")
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_a_decoder_with_padding(name, left, pairs, table):
    pair, tokens = pairs(name), ids(2, LENGTH)
    mask = mask_of([LENGTH, LENGTH - PADS], left=left)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    ours = pair.ours.model(tokens, mask=mask, positions=positions)
    theirs = pair.theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
    table.close(name, "padding", ours[mask], theirs[mask])


@kinds("causal")
@torch.no_grad()
def test_a_decoder_with_a_cache(name, pairs, table):
    pair, tokens = pairs(name), ids(2, LENGTH)
    cache = pair.ours.model.new_cache(2, LENGTH)
    parts = [pair.ours.model(part, cache=cache) for part in tokens.split([9, 1, 1, 6, 3], dim=1)]
    table.close(name, "cache", torch.cat(parts, dim=1), pair.theirs(tokens).logits)


@kinds("causal")
@torch.no_grad()
def test_a_decoder_writes_the_same_fifty_tokens(name, pairs, table):
    pair = pairs(name)
    prompts = [ids(1, 9)[0].tolist(), ids(1, 4, seed=3)[0].tolist()]
    decoding = Decoding(pair.ours.model, prompts, sampling=Sampling(temperature=0.0), seed=0, max_new_tokens=50)
    for _ in range(50):
        decoding.step()
    padded = torch.tensor([[0] * (9 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (9 - len(p)) + [1] * len(p) for p in prompts])
    theirs = pair.theirs.generate(padded, attention_mask=mask, **greedy(pair))
    written = [row[len(prompt) :] for row, prompt in zip(decoding.rows, prompts)]
    table.equal(name, "50 tokens", written == [row[9:] for row in theirs.tolist()])
    assert len(set(decoding.rows[0])) > 5  # not one token over and over


def greedy(pair: Pair) -> dict[str, object]:
    """Fifty tokens, the likeliest each time, and no early end."""
    pair.theirs.generation_config.eos_token_id = None
    pair.theirs.generation_config.forced_eos_token_id = None
    pair.theirs.generation_config.bad_words_ids = None
    return {"max_new_tokens": 50, "do_sample": False, "num_beams": 1, "pad_token_id": 0}


# ------------------------------------------------------------------------------------------ reward models


@kinds("reward")
@torch.no_grad()
def test_a_reward_model_judges_by_the_last_token(name, pairs, table):
    pair, tokens = pairs(name), ids(8, LENGTH)
    table.close(name, "logits", pair.ours.model(tokens), pair.theirs(tokens).logits[:, 0])
    for left in (False, True):
        mask = mask_of([LENGTH, *range(LENGTH - PADS, LENGTH)], left=left)
        padded = tokens.masked_fill(~mask, pair.theirs.config.pad_token_id)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        theirs = pair.theirs(padded, attention_mask=mask.long(), position_ids=positions).logits[:, 0]
        table.close(name, "padding", pair.ours.model(padded, positions=positions, mask=mask), theirs)


# ------------------------------------------------------------------------------------------ encoders


@kinds("encoder")
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_an_encoder_with_padding_and_types(name, left, pairs, table):
    pair, tokens = pairs(name), ids(2, LENGTH)
    mask = mask_of([LENGTH, LENGTH - PADS], left=left)
    tokens[~mask] = pair.theirs.config.pad_token_id
    ours, theirs = {"mask": mask}, {"attention_mask": mask.long()}
    if pair.theirs.config.to_dict().get("type_vocab_size"):
        types = (torch.arange(LENGTH) > LENGTH // 2).long().expand(2, -1)
        ours["types"], theirs["token_type_ids"] = types, types
    found = pair.theirs(tokens, **theirs)
    table.close(name, "padding", pair.ours.model(tokens, **ours)[mask], found[0][mask])


@kinds("encoder")
@torch.no_grad()
def test_an_encoder_without_a_mask(name, pairs, table):
    pair, tokens = pairs(name), ids(2, LENGTH)
    found = pair.theirs(tokens)
    hidden = pair.ours.model(tokens)
    table.close(name, "logits", hidden, found[0])
    if getattr(found, "pooler_output", None) is not None:
        table.close(name, "logits", pair.ours.model.pool(hidden), found.pooler_output)


# ------------------------------------------------------------------------------------------ encoder-decoders


@kinds("seq2seq")
@torch.no_grad()
def test_an_encoder_decoder_gives_the_same_logits(name, pairs, table):
    pair = pairs(name)
    ours, theirs = example(pair.kind)
    table.close(name, "logits", pair.ours.model(**ours), pair.theirs(**theirs).logits)


@kinds("seq2seq")
@torch.no_grad()
def test_an_encoder_decoder_with_padding(name, pairs, table):
    pair, source, target = pairs(name), ids(2, LENGTH), ids(2, LENGTH - 3, seed=1)
    for left in (False, True):
        mask = mask_of([LENGTH, LENGTH - PADS], left=left)
        ours = pair.ours.model(source, target, source_mask=mask)
        table.close(
            name, "padding", ours, pair.theirs(source, attention_mask=mask.long(), decoder_input_ids=target).logits
        )
    target_mask = torch.arange(LENGTH - 3) < torch.tensor([[LENGTH - 3], [9]])
    ours = pair.ours.model(source, target, source_mask=mask, mask=target_mask)
    theirs = pair.theirs(
        source, attention_mask=mask.long(), decoder_input_ids=target, decoder_attention_mask=target_mask.long()
    ).logits
    table.close(name, "padding", ours[target_mask], theirs[target_mask])


@kinds("seq2seq")
@torch.no_grad()
def test_an_encoder_decoder_with_a_cache_writes_the_same_fifty_tokens(name, pairs, table):
    pair, source = pairs(name), ids(2, LENGTH)
    mask = mask_of([LENGTH, LENGTH - PADS], left=False)
    start = getattr(pair.theirs.config, "decoder_start_token_id", None) or 0
    model, tokens = pair.ours.model, torch.full((2, 1), start)
    memory, cache = model.encode(source, mask), model.new_cache(2, 51)
    for _ in range(50):
        logits = model.decode(tokens[:, -1:], memory, mask, cache=cache, last_only=True)
        tokens = torch.cat((tokens, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    theirs = pair.theirs.generate(source, attention_mask=mask.long(), decoder_start_token_id=start, **greedy(pair))
    table.equal(name, "50 tokens", tokens.tolist() == theirs.tolist())
    target = ids(2, LENGTH, seed=5)
    whole = pair.theirs(source, attention_mask=mask.long(), decoder_input_ids=target).logits
    cache = model.new_cache(2, LENGTH)
    parts = [model.decode(part, memory, mask, cache=cache) for part in target.split([5, 1, 14], dim=1)]
    table.close(name, "cache", torch.cat(parts, dim=1), whole)


# ------------------------------------------------------------------------------------------ speech


@kinds("writer")
@torch.no_grad()
def test_a_recognizer_with_a_cache_writes_the_same_fifty_tokens(name, pairs, table):
    pair = pairs(name)
    ours, theirs = example(pair.kind)
    whole = pair.theirs(**theirs).logits
    table.close(name, "logits", pair.ours.model(**ours), whole)
    model, tokens = pair.ours.model, torch.full((2, 1), 1)
    memory, cache = model.encode(ours["spectrogram"]), model.new_cache(2, 51)
    for _ in range(50):
        logits = model.decode(tokens[:, -1:], memory, cache=cache, last_only=True)
        tokens = torch.cat((tokens, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    expected = torch.full((2, 1), 1)  # their own generation adds rules of Whisper, so it is written out
    for _ in range(50):
        step = pair.theirs(input_features=theirs["input_features"], decoder_input_ids=expected).logits
        expected = torch.cat((expected, step[:, -1].argmax(-1, keepdim=True)), dim=1)
    table.equal(name, "50 tokens", tokens.tolist() == expected.tolist())
    assert len(set(tokens[0].tolist())) > 2
    cache = model.new_cache(2, LENGTH)
    parts = [model.decode(part, memory, cache=cache) for part in ours["tokens"].split([5, 1, 14], dim=1)]
    table.close(name, "cache", torch.cat(parts, dim=1), whole)


@kinds("wave")
@torch.no_grad()
def test_an_encoder_of_a_waveform_with_padding(name, pairs, table):
    """Their norm over time counts padding, so where there is one a row is compared with theirs alone."""
    pair, samples = pairs(name), torch.tensor([900, 500])
    valid = torch.arange(900) < samples[:, None]
    audio = example(pair.kind)[1]["input_values"] * valid
    hidden, frames = pair.ours.model(audio[..., None], samples)
    assert frames.tolist() == pair.theirs._get_feat_extract_output_lengths(samples).tolist()
    if pair.theirs.config.feat_extract_norm == "layer":
        rows = pair.theirs(audio, attention_mask=valid.long())[0]
    else:
        rows = [pair.theirs(row[None, :length])[0][0] for row, length in zip(audio, samples)]
    for row, theirs, length in zip(hidden, rows, frames):
        table.close(name, "padding", row[:length], theirs[:length])
    table.close(name, "logits", pair.ours.model(audio[..., None]).hidden, pair.theirs(audio)[0])


@torch.no_grad()
def test_frames_are_masked_by_the_learned_vector(pairs, table):
    pair, audio = pairs("wav2vec2"), example("CTCRecognizer")[0]["audio"]
    masked = torch.arange(44).expand(2, -1) % 5 == 1
    table.close(
        "wav2vec2",
        "logits",
        pair.ours.model(audio[..., None], masked=masked).hidden,
        pair.theirs(audio, mask_time_indices=masked)[0],
    )


@kinds("recognizer")
@torch.no_grad()
def test_a_recognizer_of_a_waveform_with_padding(name, pairs, table):
    """Beside the padding of encoders: theirs normalises first, and its blank is the first label.

    Theirs are in float64, since its own rounding in float32 is nearly as far as the bound.
    """
    pair, samples = pairs(name), torch.tensor([900, 500])
    reference = copy.deepcopy(pair.theirs).double()
    audio = example(pair.kind)[0]["audio"] * 0.1 + 0.3
    rows = [row[:length].numpy() for row, length in zip(audio, samples)]
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    heard = extractor(rows, padding=True, sampling_rate=16000, return_tensors="pt")
    alone = [extractor(row, sampling_rate=16000, return_tensors="pt").input_values for row in rows]
    exact = heard.input_values.double()
    if reference.config.feat_extract_norm == "layer":
        expected = reference(exact, attention_mask=heard.attention_mask).logits
    else:
        expected = [reference(row.double()).logits[0] for row in alone]
    logits, frames = pair.ours.model(audio, samples)
    for ours, theirs, length in zip(logits, expected, frames):
        table.close(name, "padding", ours[:length].roll(1, -1), theirs[:length])
    encoded = pair.ours.model.encoder(heard.input_values[..., None])
    silence = reference(exact).logits  # padding unmasked, as models with a norm over time are used
    table.close(name, "logits", pair.ours.model.frame_logits(encoded.hidden).roll(1, -1), silence)


# ------------------------------------------------------------------------------------------ the table


def test_the_table_lists_all_models(pairs, table):
    """All cells are kept by the tests above; this one sees to the rows."""
    if not table.update:
        assert list(table.rows) == list(MODELS), "run NEMOLET_UPDATE_GOLDEN=1 pytest tests/convert"
        for name, row in table.rows.items():
            assert (row["in transformers"], row["here"]) == (MODELS[name][0], pairs(name).kind)


def test_every_architecture_is_tested():
    tested = {model for model, _, _ in MODELS.values()} | set(HEADS)
    assert set(known_architectures()) == tested
