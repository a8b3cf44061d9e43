"""Tiny models of transformers with random weights, one or two for each architecture that is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB = 96
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, **SPECIAL}
MANY = {**SIZES, "num_attention_heads": 4, "max_position_embeddings": 128}
GROUPED = {**MANY, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 20}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "initializer_factor": 0.3,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 128,
    "init_std": 0.1,
    **SPECIAL,
    "forced_eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WHISPER = {
    "vocab_size": VOCAB,
    "num_mel_bins": 10,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_source_positions": 20,
    "max_target_positions": 64,
    "init_std": 0.1,
    "decoder_start_token_id": 1,
    **SPECIAL,
}
WAVE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "conv_dim": (16, 16, 20),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True, "mask_time_prob": 0.0}
LETTERS = {"vocab_size": 12, "pad_token_id": 0, "initializer_range": 0.3}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
# name -> class of the model, class of its config, its arguments
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, **SPECIAL},
    ),
    "llama2": ("LlamaForCausalLM", "LlamaConfig", {**MANY, "rms_norm_eps": 1e-5}),
    "llama3": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-bias": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "attention_bias": True, "head_dim": 12}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 6}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 12, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GEMMA, "attn_logit_softcapping": 2.0}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi3": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            **GROUPED,
            "original_max_position_embeddings": 128,
            "sliding_window": 7,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**GROUPED, "head_dim": 12, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    ),
    "gpt2-reward": (
        "GPT2ForSequenceClassification",
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "num_labels": 1, **SPECIAL},
    ),
    "llama-reward": ("LlamaForSequenceClassification", "LlamaConfig", {**GROUPED, "num_labels": 1}),
    "mistral-reward": (
        "MistralForSequenceClassification",
        "MistralConfig",
        {**GROUPED, "sliding_window": 6, "num_labels": 1},
    ),
    "qwen2-reward": ("Qwen2ForSequenceClassification", "Qwen2Config", {**GROUPED, "num_labels": 1}),
    "qwen3-reward": (
        "Qwen3ForSequenceClassification",
        "Qwen3Config",
        {**GROUPED, "head_dim": 12, "tie_word_embeddings": True, "num_labels": 1},
    ),
    "gemma2-reward": ("Gemma2ForSequenceClassification", "Gemma2Config", {**GEMMA, "num_labels": 1}),
    "bert": ("BertForMaskedLM", "BertConfig", MANY),
    "bert-encoder": ("BertModel", "BertConfig", MANY),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**MANY, "pad_token_id": 1, "bos_token_id": 0}),
    "roberta-encoder": ("RobertaModel", "RobertaConfig", {**MANY, "pad_token_id": 1, "bos_token_id": 0}),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 128},
    ),
    "distilbert-encoder": (
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 128},
    ),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**MANY, "embedding_size": 20}),
    "electra-encoder": ("ElectraModel", "ElectraConfig", {**MANY, "embedding_size": 32}),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**MANY, "local_attention": 8, "layer_types": MIXED, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "modernbert-encoder": (
        "ModernBertModel",
        "ModernBertConfig",
        {**MANY, "local_attention": 8, "layer_types": MIXED, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5-gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**BART, "decoder_start_token_id": 2}),
    "marian": ("MarianMTModel", "MarianConfig", {**BART, "decoder_start_token_id": 0, "scale_embedding": True}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", WAVE),
    "wav2vec2-large": ("Wav2Vec2Model", "Wav2Vec2Config", {**WAVE, **LARGE}),
    "hubert": ("HubertModel", "HubertConfig", WAVE),
    "wav2vec2-ctc": ("Wav2Vec2ForCTC", "Wav2Vec2Config", {**WAVE, **LETTERS}),
    "wav2vec2-large-ctc": ("Wav2Vec2ForCTC", "Wav2Vec2Config", {**WAVE, **LARGE, **LETTERS}),
    "hubert-ctc": ("HubertForCTC", "HubertConfig", {**WAVE, **LETTERS}),
}

DISTIL = MODELS["distilbert"][2]
ENCODERS = {
    "Bert": MANY,
    "Roberta": MODELS["roberta"][2],
    "DistilBert": DISTIL,
    "Electra": {**MANY, "embedding_size": 20},
    "ModernBert": MODELS["modernbert"][2],
}
TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
# class of a model with the head of a task -> class of its config, its arguments
HEADS = {f"{family}For{task}": (f"{family}Config", sizes) for family, sizes in ENCODERS.items() for task in TASKS}


def example(kind: str, rows: int = 2, length: int = 20, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a model of ours reads, by the name of its class, and the same for theirs."""
    numbers = torch.Generator().manual_seed(seed)
    tokens, source = (torch.randint(4, VOCAB, (rows, length), generator=numbers) for _ in range(2))
    if kind == "SpectrogramToText":
        spectrogram = torch.randn(rows, 2 * WHISPER["max_source_positions"], WHISPER["num_mel_bins"], generator=numbers)
        ours = {"spectrogram": spectrogram, "tokens": tokens}
        return ours, {"input_features": spectrogram.transpose(1, 2), "decoder_input_ids": tokens}
    if kind in ("WaveEncoder", "CTCRecognizer"):
        audio = torch.randn(rows, 900, generator=numbers)
        whole = {"audio": audio, "audio_lengths": torch.full((rows,), 900)}
        return {"spectrogram": audio[..., None]} if kind == "WaveEncoder" else whole, {"input_values": audio}
    if kind == "RewardModel":  # theirs takes one row where padding has no token
        return {"tokens": tokens[:1]}, {"input_ids": tokens[:1]}
    if kind == "EncoderDecoder":
        return {"source": source, "tokens": tokens}, {"input_ids": source, "decoder_input_ids": tokens}
    return {"tokens": tokens}, {"input_ids": tokens}


def first(found: Any) -> torch.Tensor:
    """What a model finds, without what it tells beside it."""
    return found if isinstance(found, torch.Tensor) else found[0]


def save(name: str, folder: Path) -> Path:
    """Make a model and save it as transformers does."""
    import transformers

    model_class, config_class, arguments = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**arguments)
    shaken(getattr(transformers, model_class)(config)).save_pretrained(folder)
    return folder


def save_head(name: str, folder: Path, **arguments: Any) -> Path:
    """The same for one of the ``HEADS``, with three labels where it has any."""
    import transformers

    config_class, sizes = HEADS[name]
    labels = {} if name.endswith("Answering") else {"id2label": {0: "O", 1: "B-x", 2: "I-x"}}
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**sizes, **labels, **arguments)
    shaken(getattr(transformers, name)(config)).save_pretrained(folder)
    return folder


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Norms, biases and single numbers away from ones and zeros, so that nothing can be swapped unseen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.2 * noise)
            elif "embed" not in name and "shared" not in name and "wte" not in name:
                parameter.add_((1.0 if name == "score.weight" else 0.1) * noise)
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model
