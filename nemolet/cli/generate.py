"""``nemolet generate``: continue a prompt."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

from nemolet.cli.archives import opened
from nemolet.errors import ConfigError

_TEMPERATURE, _LONGEST = 0.8, 200  # where neither the settings nor the model say


@dataclass(frozen=True)
class Settings:
    """What to continue, and how.

    Args:
        archive: a ``.nemolet`` file.
        prompt: a text, or a list of texts.
        max_new_tokens: length limit of each continuation. This and the next five are where null as the model came with
            them: a model with a ``generation_config.json`` is greedy unless that says ``do_sample``, as in
            transformers. What nobody says is 200 tokens and, as for models that were made here, a temperature of 0.8.
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with this probability.
        min_p: keep tokens at least this likely relative to the best one.
        repetition_penalty: above 1 makes repetition less likely.
        own_rules: whether the model writes by the rules that it came with (``generation_config.json``).
        stop: texts that end a continuation.
        seed: of the choice.
        truncate: read the end of a prompt that is longer than the model's context, instead of refusing it.
        with_adapter: a folder with an adapter of nemolet or PEFT for that model; null for none.
        device: where to compute.
        imports: modules of yours that register classes which the archive names.
    """

    archive: str
    prompt: str | list[str] = ""
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    own_rules: bool = True
    stop: list[str] | str | None = None
    seed: int = 0
    truncate: bool = False
    with_adapter: str | None = None
    device: str = "cpu"
    imports: list[str] | None = None

    CONFIG_RULES = (
        ("max_new_tokens >= 1", "max_new_tokens is at least 1"),
        ("seed >= 0 and seed < 4294967296", "seed is at least 0 and below 2 ** 32"),
        ("temperature >= 0", "temperature is at least 0"),
        ("top_k >= 0", "top_k is at least 0; 0 keeps all"),
        ("top_p > 0 and top_p <= 1", "top_p is above 0 and at most 1"),
        ("min_p >= 0 and min_p <= 1", "min_p is between 0 and 1"),
        ("repetition_penalty > 0", "repetition_penalty is above 0; 1 changes nothing"),
    )


def run(settings: Settings) -> None:
    """Print prompts and continuations; a single one is shown as it is written."""
    from nemolet.language.decoding import generate, stream

    archive = language_model(settings)
    model, tokenizer, how = archive.model, archive.tokenizer, manner(settings, archive.model)
    if isinstance(settings.prompt, str):
        sys.stdout.write(settings.prompt)
        for _, piece in stream(model, tokenizer, [settings.prompt], seed=settings.seed, **how):
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
        return
    completions = generate(model, tokenizer, settings.prompt, seed=settings.seed, **how)
    for prompt, completion in zip(settings.prompt, completions):
        print(f"--- {prompt!r}\n{prompt}{completion.text}")


def language_model(settings: Settings) -> Any:
    """An archive with a language model and its tokenizer."""
    path = settings.archive
    archive = opened(path, device=settings.device, adapter=settings.with_adapter)
    if not _continues_texts(archive.model):
        raise ConfigError(
            "the archive does not hold a language model",
            where=path,
            expected="a model that continues texts, such as nemolet.language.CausalLM",
            found=type(archive.model).__name__,
            fix="use nemolet transcribe for recognizers, nemolet predict for models of a task and encoder-decoders, and"
            " nemolet.language.masked.fill for masked language models",
        )
    if archive.tokenizer is None:
        raise ConfigError(
            "the archive has no tokenizer",
            where=path,
            fix="save it with nl.save(..., tokenizer=...); put tokenizer.json into a Hugging Face folder",
        )
    return archive


def _continues_texts(model: Any) -> bool:
    """Whether tokens are all that a model needs, and it scores the next one at each place."""
    from nemolet.language.encoders import MaskedLM
    from nemolet.types import Logits, NeuralType

    needed = [name for name, port in model.input_ports.items() if not port.optional]
    outputs = [port.type for port in model.output_ports.values() if isinstance(port.type, NeuralType)]
    scores = [[axis.letter for axis in kind.axes] for kind in outputs if isinstance(kind.element, Logits)]
    return needed == ["tokens"] and ["B", "T", "V"] in scores and not isinstance(model, MaskedLM)


def manner(settings: Settings, model: Any) -> dict[str, Any]:
    """How texts are written: what was asked for, then by the rules of the model."""
    from nemolet.generation_rules import GenerationRules, chosen
    from nemolet.sampling import Sampling

    rules = (getattr(model, "generation", None) if settings.own_rules else None) or GenerationRules()
    rules = replace(
        rules,
        sampling=rules.sampling or Sampling(temperature=_TEMPERATURE),
        max_new=settings.max_new_tokens or rules.max_new or (None if rules.max_length else _LONGEST),
        repetition_penalty=settings.repetition_penalty or rules.repetition_penalty,
    )
    asked = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    stop = (settings.stop,) if isinstance(settings.stop, str) else tuple(settings.stop or ())
    return {"rules": rules, "sampling": chosen(rules, **asked), "stop": stop, "truncate": settings.truncate}
