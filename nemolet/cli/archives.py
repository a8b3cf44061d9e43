"""Archives that a verb only reads, with the adapter that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
