"""Prompt tuning: a few trained vectors before every text steer a language model that is not trained itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nemolet.errors import ConfigError, DataError
from nemolet.language.language_model import LanguageModel
from nemolet.language.models import CausalLM
from nemolet.nn.adapter_files import write_files
from nemolet.nn.adapter_settings import CONFIG, PROMPT, WEIGHTS, read_config
from nemolet.nn.cache import KVCache
from nemolet.nn.embedding import Embedding

_TENSOR = "prompt_embeddings"


class PromptTuned(LanguageModel):
    """A frozen language model that reads learned vectors before each text (Lester et al., 2021; final).

    The vectors begin as those of random tokens. What the model says of them is left out, so scores have the shape
    that those of the model have.

    Args:
        base: the language model; it is frozen.
        length: number of vectors; the context becomes shorter by it.

    Shape: tokens_BT -> logits_BTV; prompt ``length D``.

    Raises:
        ConfigError: for more vectors than the context has room for.
        DataError: for several texts in one row, which cannot each have a prompt.

    Example:
        >>> base = CausalLM(vocab_size=11, layers=1, width=8, heads=2, context=16)
        >>> model = PromptTuned(base=base, length=3)
        >>> model(torch.zeros(1, 4, dtype=torch.long)).shape, model.context
        (torch.Size([1, 4, 11]), 13)
    """

    CONFIG_RULES: ClassVar = (("length >= 1", "length is at least 1"),)

    def __init__(self, *, base: CausalLM, length: int = 16) -> None:
        super().__init__(V=base.vocab_size)
        if not 1 <= length < base.context:
            raise ConfigError(
                "the prompt leaves no room for a text",
                where="PromptTuned.length",
                expected=f"at least 1 and below the context of {base.context}",
                found=length,
            )
        self.vocab_size, self.context, self.length = base.vocab_size, base.context - length, length
        self.base, self.generation = base.requires_grad_(False), base.generation
        table = self._embed.weight.detach()
        self.prompt = nn.Parameter(table[torch.randint(base.vocab_size, (length,))] * self._embed.scale)
        self.declare_axes(prompt=f"{length} D={table.shape[1]}")

    @property
    def _embed(self) -> Embedding:
        embed = self.base.graph.get_submodule("embed")
        assert isinstance(embed, Embedding)
        return embed

    def scores(self, tokens_BT: Tensor, **inputs: Any) -> Tensor:
        """Scores of what follows each token, the prompt apart."""
        mask, segments, positions = (inputs.get(name) for name in ("mask", "segments", "positions"))
        cache: KVCache | None = inputs.get("cache")
        if segments is not None and bool((segments > 1).any()):
            raise DataError(
                "several texts share a row, but a prompt stands before one",
                where=f"{self.label}.segments",
                fix="set data.pack=false",
            )
        graph, rows = self.base.graph, len(tokens_BT)
        first = cache is None or cache.length == 0  # later the prompt is in the cache
        hidden_BTD = graph.get_submodule("embed")(tokens_BT)
        new = self.length if first else 0
        if positions is not None:
            before = torch.arange(new, device=tokens_BT.device).expand(rows, -1)
            positions = torch.cat((before, positions + self.length), 1)
        if first:
            hidden_BTD = torch.cat((self.prompt.to(hidden_BTD.dtype).expand(rows, -1, -1), hidden_BTD), 1)
        call = {"mask": _after_ones(mask, new), "segments": _after_ones(segments, new), "positions": positions}
        hidden_BTD = graph.get_submodule("decoder")(hidden_BTD, cache=cache, **call)
        logits_BTV: Tensor = graph.get_submodule("head")(hidden_BTD[:, new:], last_only=inputs.get("last_only", False))
        return logits_BTV

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` sequences of up to ``capacity`` tokens, and the prompt."""
        return self.base.new_cache(batch, capacity + self.length)


def _after_ones(values_BT: Tensor | None, count: int) -> Tensor | None:
    """Values behind so many that are true, or of the first segment."""
    return None if values_BT is None else torch.cat((values_BT.new_ones(len(values_BT), count), values_BT), 1)


def save_prompt(model: PromptTuned, folder: str | Path, *, base: str = "") -> Path:
    """Write the vectors of a prompt in the format of PEFT, which loads them for the same model.

    Args:
        model: whose prompt is written.
        folder: receives ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: name of the language model, for people and for PEFT.
    """
    decoder: Any = model.base.graph.get_submodule("decoder")
    config = {
        "peft_type": PROMPT.name,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "num_virtual_tokens": model.length,
        "token_dim": model.prompt.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": decoder.blocks[0].attention.heads,
        "num_layers": len(decoder.blocks),
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        "inference_mode": True,
    }
    tensors = {_TENSOR: model.prompt.detach().cpu().contiguous()}
    return write_files(Path(folder), config, tensors, {"format": "pt"})


def load_prompt(base: CausalLM, folder: str | Path) -> PromptTuned:
    """A language model with the prompt that :func:`save_prompt` or PEFT wrote.

    Args:
        base: the model that the prompt was trained for.
        folder: with the two files.

    Raises:
        ConfigError: for a folder without a prompt, or one for a model of another width.
    """
    folder = Path(folder)
    PROMPT.check(read_config(folder), str(folder / CONFIG))
    try:
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            names = list(file.keys())
            vectors = file.get_tensor(_TENSOR) if names == [_TENSOR] else None
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError("the prompt cannot be read", where=str(folder / WEIGHTS), found=str(error)[:200]) from error
    if vectors is None:
        raise ConfigError(
            "this is no prompt", where=str(folder / WEIGHTS), expected=_TENSOR, found=", ".join(names[:4])
        )
    width = base.graph.get_submodule("embed").width
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise ConfigError(
            "this prompt belongs to another model",
            where=str(folder),
            expected=f"vectors of {width} numbers",
            found=tuple(vectors.shape),
        )
    model = PromptTuned(base=base, length=len(vectors))
    with torch.no_grad():
        model.prompt.copy_(vectors)
    return model
