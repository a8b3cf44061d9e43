"""Random small models of every architecture: read as transformers computes them, and written back as they were."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import nemolet as nl
from nemolet.config import build
from nemolet.convert import known_architectures, write
from nemolet.convert.fields import put

from .tiny_models import first, shaken

VOCAB, LENGTH, TRIES = 40, 12, 4
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
Sample = Callable[[random.Random], dict[str, Any]]


def sizes(chance: random.Random) -> dict[str, Any]:
    heads = chance.choice((2, 4))
    return {
        "vocab_size": VOCAB,
        "hidden_size": chance.choice((16, 24)),
        "intermediate_size": chance.choice((20, 32)),
        "num_hidden_layers": chance.randint(1, 3),
        "num_attention_heads": heads,
        "max_position_embeddings": chance.choice((LENGTH, 64)),
        "hidden_act": chance.choice(ACTIVATIONS),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **chance.choice(({}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False})),
    }


def decoder(chance: random.Random) -> dict[str, Any]:
    made = sizes(chance)
    scaling: list[dict[str, Any]] = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ]
    rope = {"rope_theta": chance.choice((100.0, 10000.0)), **chance.choice(scaling)}
    return made | {
        "num_key_value_heads": chance.choice((1, 2, made["num_attention_heads"])),
        "rms_norm_eps": chance.choice((1e-6, 1e-5, 1e-2)),
        "head_dim": chance.choice((6, 8, 10)),
        "rope_parameters": chance.choice((None, rope, rope)),
    }


def local(chance: random.Random, made: dict[str, Any]) -> list[str] | None:
    kinds = [chance.choice(("full_attention", "sliding_attention")) for _ in range(made["num_hidden_layers"])]
    return chance.choice((None, kinds))


def llama(chance: random.Random) -> dict[str, Any]:
    return decoder(chance) | {"attention_bias": chance.random() < 0.5}


def mistral(chance: random.Random) -> dict[str, Any]:
    return decoder(chance) | {"sliding_window": chance.choice((None, 1, 3, 100))}


def qwen(chance: random.Random) -> dict[str, Any]:
    made = decoder(chance)
    switched = chance.random() < 0.6
    return made | {
        "use_sliding_window": switched,
        "sliding_window": chance.choice((3, 100)),
        "max_window_layers": chance.randint(0, 3),
        "layer_types": local(chance, made) if switched else None,
    }


def qwen3(chance: random.Random) -> dict[str, Any]:
    return qwen(chance) | {"attention_bias": chance.random() < 0.5}


def gemma2(chance: random.Random) -> dict[str, Any]:
    made = llama(chance)
    made["hidden_activation"] = made.pop("hidden_act")
    return made | {
        "sliding_window": chance.choice((3, 100)),
        "layer_types": local(chance, made),
        "query_pre_attn_scalar": chance.choice((4, 20)),
        "final_logit_softcapping": chance.choice((None, 3.0)),
        "attn_logit_softcapping": chance.choice((None, 2.0)),
    }


def gemma3(chance: random.Random) -> dict[str, Any]:
    made, kinds = gemma2(chance), ("full_attention", "sliding_attention")
    full = made["rope_parameters"] or {"rope_type": "default", "rope_theta": 50.0}
    near = {"rope_type": "default", "rope_theta": chance.choice((10.0, 1000.0))}
    return made | {"rope_parameters": chance.choice((None, dict(zip(kinds, (full, near)))))}


def phi3(chance: random.Random) -> dict[str, Any]:
    made = mistral(chance)
    part = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": chance.choice((0.5, 0.75, 1.0))}
    return made | {"head_dim": 8, "rope_parameters": chance.choice((None, part, part))}


def mixtral(chance: random.Random) -> dict[str, Any]:
    return mistral(chance) | {"num_local_experts": chance.randint(2, 5), "num_experts_per_tok": chance.randint(1, 2)}


def qwen3_moe(chance: random.Random) -> dict[str, Any]:
    made = qwen3(chance)
    made.pop("layer_types")
    return made | {
        "num_experts": chance.randint(2, 5),
        "num_experts_per_tok": chance.randint(1, 2),
        "moe_intermediate_size": chance.choice((8, 12)),
        "norm_topk_prob": chance.random() < 0.5,
    }


def gpt2(chance: random.Random) -> dict[str, Any]:
    made = sizes(chance)
    return {
        "vocab_size": VOCAB,
        "n_embd": made["hidden_size"],
        "n_layer": made["num_hidden_layers"],
        "n_head": made["num_attention_heads"],
        "n_positions": made["max_position_embeddings"],
        "n_inner": chance.choice((None, 20)),
        "activation_function": made["hidden_act"],
        "layer_norm_epsilon": chance.choice((1e-5, 1e-2)),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **{key: value for key, value in made.items() if key == "tie_word_embeddings"},
    }


def bert(chance: random.Random) -> dict[str, Any]:
    made = sizes(chance) | {"type_vocab_size": chance.randint(1, 3), "layer_norm_eps": chance.choice((1e-12, 1e-2))}
    made.pop("tie_word_embeddings", None)
    return made


def roberta(chance: random.Random) -> dict[str, Any]:
    return bert(chance) | {"pad_token_id": chance.choice((0, 1, 3)), "max_position_embeddings": 40}


def electra(chance: random.Random) -> dict[str, Any]:
    return bert(chance) | {"embedding_size": chance.choice((16, 24, 10))}


def distilbert(chance: random.Random) -> dict[str, Any]:
    made = sizes(chance)
    return {
        "vocab_size": VOCAB,
        "dim": made["hidden_size"],
        "hidden_dim": made["intermediate_size"],
        "n_layers": made["num_hidden_layers"],
        "n_heads": made["num_attention_heads"],
        "max_position_embeddings": made["max_position_embeddings"],
        "activation": chance.choice(("gelu", "relu")),
    }


def modernbert(chance: random.Random) -> dict[str, Any]:
    made = bert(chance)
    made["hidden_activation"] = made.pop("hidden_act")
    kinds = ("full_attention", "sliding_attention")
    rope = {kind: {"rope_type": "default", "rope_theta": chance.choice((10.0, 1000.0))} for kind in kinds}
    return made | {
        "hidden_size": 16,
        "norm_eps": chance.choice((1e-5, 1e-2)),
        "local_attention": chance.choice((2, 3, 6, 100)),
        "layer_types": local(chance, made),
        "rope_parameters": chance.choice((None, rope)),
        "decoder_bias": chance.random() < 0.5,
        "classifier_activation": chance.choice(ACTIVATIONS),
        "cls_token_id": 1,
        "sep_token_id": 2,
    }


def two_sides(chance: random.Random) -> dict[str, Any]:
    made: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 16, "init_std": 0.1, "forced_eos_token_id": None}
    for side in ("encoder", "decoder"):
        made[f"{side}_layers"] = chance.randint(1, 2)
        made[f"{side}_attention_heads"] = chance.choice((2, 4))
        made[f"{side}_ffn_dim"] = chance.choice((20, 32))
    return made | {
        "activation_function": chance.choice(ACTIVATIONS),
        "scale_embedding": chance.random() < 0.5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 2,
    }


def bart(chance: random.Random) -> dict[str, Any]:
    return two_sides(chance) | {"max_position_embeddings": chance.choice((LENGTH, 64))}


def whisper(chance: random.Random) -> dict[str, Any]:
    known = {"num_mel_bins": 5, "max_source_positions": LENGTH, "max_target_positions": 16}
    return two_sides(chance) | known | {"tie_word_embeddings": chance.random() < 0.5}


def t5(chance: random.Random) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "d_model": chance.choice((16, 24)),
        "d_kv": chance.choice((4, 6)),
        "d_ff": chance.choice((20, 32)),
        "num_layers": chance.randint(1, 3),
        "num_decoder_layers": chance.choice((None, 1, 2)),
        "num_heads": chance.choice((2, 3)),
        "relative_attention_num_buckets": chance.choice((4, 8, 32)),
        "relative_attention_max_distance": chance.choice((8, 128)),
        "layer_norm_epsilon": chance.choice((1e-6, 1e-2)),
        "feed_forward_proj": chance.choice(("relu", "gelu", "gated-gelu", "gated-silu", "gated-relu")),
        "tie_word_embeddings": chance.random() < 0.5,
        "initializer_factor": 0.3,
    }


def wave(chance: random.Random) -> dict[str, Any]:
    made = sizes(chance)
    return {
        **{key: made[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
        "hidden_act": made["hidden_act"],
        "vocab_size": 8,
        "conv_dim": (8, chance.choice((8, 12))),
        "conv_kernel": (chance.choice((5, 10)), 3),
        "conv_stride": (5, 2),
        "conv_bias": chance.random() < 0.5,
        "num_conv_pos_embeddings": chance.choice((3, 4)),
        "num_conv_pos_embedding_groups": chance.choice((2, 4)),
        "do_stable_layer_norm": chance.random() < 0.5,
        "feat_extract_norm": chance.choice(("group", "layer")),
        "feat_extract_activation": chance.choice(ACTIVATIONS),
        "mask_time_prob": chance.choice((0.0, 0.05)),
        "layer_norm_eps": chance.choice((1e-5, 1e-2)),
        "pad_token_id": chance.choice((0, 3)),
    }


# Class of the model, class of its config, and what chooses its options.
FAMILIES: list[tuple[str, str, Sample]] = [
    ("LlamaForCausalLM", "LlamaConfig", llama),
    ("MistralForCausalLM", "MistralConfig", mistral),
    ("Qwen2ForCausalLM", "Qwen2Config", qwen),
    ("Qwen3ForCausalLM", "Qwen3Config", qwen3),
    ("Gemma2ForCausalLM", "Gemma2Config", gemma2),
    ("Gemma3ForCausalLM", "Gemma3TextConfig", gemma3),
    ("Phi3ForCausalLM", "Phi3Config", phi3),
    ("MixtralForCausalLM", "MixtralConfig", mixtral),
    ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", qwen3_moe),
    ("GPT2LMHeadModel", "GPT2Config", gpt2),
    ("BertForMaskedLM", "BertConfig", bert),
    ("RobertaForMaskedLM", "RobertaConfig", roberta),
    ("ElectraForMaskedLM", "ElectraConfig", electra),
    ("DistilBertForMaskedLM", "DistilBertConfig", distilbert),
    ("ModernBertForMaskedLM", "ModernBertConfig", modernbert),
    ("BartForConditionalGeneration", "BartConfig", bart),
    ("MarianMTModel", "MarianConfig", bart),
    ("T5ForConditionalGeneration", "T5Config", t5),
    ("WhisperForConditionalGeneration", "WhisperConfig", whisper),
    ("Wav2Vec2ForCTC", "Wav2Vec2Config", wave),
    ("HubertModel", "HubertConfig", wave),
]


def inputs(model_class: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a model of ours reads, and the same for theirs."""
    numbers = torch.Generator().manual_seed(1)
    tokens, source = (torch.randint(4, VOCAB, (2, LENGTH), generator=numbers) for _ in range(2))
    if model_class.startswith("Whisper"):
        spectrogram = torch.randn(2, 2 * LENGTH, 5, generator=numbers)
        ours = {"spectrogram": spectrogram, "tokens": tokens}
        return ours, {"input_features": spectrogram.transpose(1, 2), "decoder_input_ids": tokens}
    if model_class.startswith(("Wav2Vec2", "Hubert")):
        audio = torch.randn(2, 200, generator=numbers)
        return {"spectrogram": audio[..., None]}, {"input_values": audio}
    if model_class.startswith(("Bart", "Marian", "T5")):
        return {"source": source, "tokens": tokens}, {"input_ids": source, "decoder_input_ids": tokens}
    return {"tokens": tokens}, {"input_ids": tokens}


def run(model: Any, ours: dict[str, Any], blank: int | None) -> torch.Tensor:
    """What a model of ours gives; a recognizer is run without its front end, and theirs has the blank elsewhere."""
    if not hasattr(model, "frame_logits"):
        return first(model(**ours))
    logits = model.frame_logits(model.encoder(**ours).hidden)
    return torch.cat((logits[..., :blank], logits[..., -1:], logits[..., blank:-1]), dim=-1)


def assert_close(one: torch.Tensor, other: torch.Tensor, options: dict[str, Any]) -> None:
    """Equal to 1e-5 of the largest number, or of one."""
    found, bound = (one - other).abs().max().item(), 1e-5 * max(1.0, other.abs().max().item())
    assert found <= bound, options


@pytest.mark.parametrize(("model_class", "config_class", "sample"), FAMILIES, ids=[family[0] for family in FAMILIES])
@torch.no_grad()
def test_random_models(model_class: str, config_class: str, sample: Sample, tmp_path: Path):
    chance, kind = random.Random(model_class), getattr(transformers, model_class)
    ours_in, theirs_in = inputs(model_class)
    for number in range(TRIES):
        options = sample(chance)
        torch.manual_seed(number)
        config = getattr(transformers, config_class)(**options)
        config._attn_implementation = "eager"
        theirs = shaken(kind(config)).eval()
        folder, back, derived = (tmp_path / f"{number}{name}" for name in ("", "-back", "-derived"))
        theirs.save_pretrained(folder)
        archive = nl.load(folder)
        blank, known = options.get("pad_token_id"), theirs(**theirs_in)[0]
        assert_close(run(archive.model, ours_in, blank), known, options)
        write(back, model=archive.model, extra=archive.extra)
        assert json.loads((back / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
        one, other = (safetensors.torch.load_file(at / "model.safetensors") for at in (folder, back))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), options
        if number % 3 == 0:  # the config from ours alone is theirs, too
            write(derived, model=archive.model, architecture=model_class)
            again = kind.from_pretrained(derived, attn_implementation="eager").eval()
            ours = run(archive.model, ours_in, again.config.pad_token_id)  # the blank is where theirs has it
            assert_close(again(**theirs_in)[0], ours, options)


OPTIONS: dict[str, Any] = {
    "attention.rotary": 0.5,
    "attention.softcap": 2.0,
    "attention.scale": 0.25,
    "attention.head_size": 12,
    "attention.bias": True,
    "residual.order": "post",
    "embedding_scale": 2.0,
    "qk_norm": True,
    "gated": False,
    "norm": "layer",
    "position": "none",
    "rope_base": 50.0,
    "rope_scaling": {"kind": "linear", "factor": 4.0},
    "softcap": 2.0,
    "window": 3,
    "tied": True,
}


@pytest.mark.parametrize(
    ("model_class", "config_class", "sample"), FAMILIES[:9], ids=[family[0] for family in FAMILIES[:9]]
)
@torch.no_grad()
def test_an_option_of_the_block_is_obeyed_by_transformers_or_refused_by_name(
    model_class, config_class, sample, tmp_path
):
    plain = {
        **sample(random.Random(0)),
        "rope_parameters": None,
        "layer_types": None,
        "sliding_window": 100,
        "head_dim": 8,
    }
    content = getattr(transformers, config_class)(**plain).to_dict()
    ours_in, theirs_in = inputs(model_class)
    architecture, written = known_architectures()[model_class], []
    for option, value in OPTIONS.items():
        config = architecture.read_config(content)
        put(config, option, value)
        lost = architecture.lost(config)
        if lost:
            assert option in " ".join(map(str, lost)) or (option, model_class) == ("rope_scaling", "Phi3ForCausalLM")
            continue
        torch.manual_seed(0)
        ours = shaken(build(config)).eval()
        folder = write(tmp_path / option, model=ours, architecture=model_class)
        theirs = getattr(transformers, model_class).from_pretrained(folder, attn_implementation="eager").eval()
        assert_close(first(ours(**ours_in)), theirs(**theirs_in)[0], {option: value})
        written.append(option)
    assert {"attention.head_size", "rope_base", "tied"} <= {*written}
    assert "position" not in written
