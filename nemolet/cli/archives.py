"""Archives that a verb only reads, with the adapter and the manner of reading and writing that were asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nemolet.errors import ConfigError

if TYPE_CHECKING:
    from nemolet.archive import Archive


def opened(path: str, *, device: str, adapter: str | None = None) -> Archive:
    """An archive, or a Hugging Face folder, whose weights are laid out for a CPU.

    Args:
        path: of it.
        device: where the model goes.
        adapter: a folder with an adapter of PEFT's format, which becomes a part of the model; null for none.

    Raises:
        ConfigError: for an adapter of an unknown kind, or of another base model.
    """
    from nemolet.archive import load
    from nemolet.convert.adapters import with_adapter
    from nemolet.nn.prepacking import pack

    archive = load(path, device=device)
    if adapter is not None:
        archive = with_adapter(archive, adapter)
    pack(archive.model)
    return archive


def search_as_asked(model: Any, **asked: float | None) -> None:
    """Let a translator look for its texts otherwise; what is None stays as it is.

    Raises:
        ConfigError: for a model that does not search.
    """
    said = {name: value for name, value in asked.items() if value is not None}
    if said and not hasattr(model, "beam"):
        raise ConfigError(
            "this model does not search",
            where={"size": "beam"}.get(next(iter(said)), next(iter(said))),
            expected="a model that writes texts, such as nemolet.language.Translator",
            found=type(model).__name__,
        )
    if said:
        model.beam = replace(model.beam, **said)


def long_texts_as_asked(model: Any, too_long: str | None) -> None:
    """Let a model do otherwise with texts that are longer than its context.

    Raises:
        ConfigError: for a model that has no choice.
    """
    if too_long is None:
        return
    if not hasattr(model, "too_long"):
        raise ConfigError(
            "this model has no choice",
            where="too_long",
            expected="a model that classifies, tags, embeds or translates",
            found=type(model).__name__,
            fix="leave too_long out: a QuestionAnswerer always reads in windows",
        )
    model.too_long = too_long
