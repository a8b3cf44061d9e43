"""``nemolet convert``: Hugging Face folders to .nemolet files, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """What to convert into what.

    Args:
        from: a Hugging Face folder, hf://owner/name, or a .nemolet file; or a folder with an adapter.
        to: of the other kind; what ends in .nemolet is a file.
        base: of an adapter, the model it belongs to: a .nemolet file or a Hugging Face folder; null for a whole model.
        architecture: class or model type of transformers for the folder; null for the one that fits.
        with_tokenizer: whether the tokenizer comes along.
        pickles: whether weights of torch.save may be read where there are no others (tensors only).
        shard_gb: largest file of weights.
        imports: modules of yours that register classes which the archive names.
    """

    from_: str
    to: str
    base: str | None = None
    architecture: str | None = None
    with_tokenizer: bool = True
    pickles: bool = False
    shard_gb: float = 5.0
    imports: list[str] | None = None

    CONFIG_RULES = (("shard_gb > 0", "shard_gb is above 0"),)


def run(settings: Settings) -> None:
    """Convert and say what was written."""
    target = _model(settings) if settings.base is None else _adapter(settings, settings.base)
    files = [target] if target.is_file() else sorted(path for path in target.iterdir() if path.is_file())
    for file in files:
        print(f"{file}  {file.stat().st_size:,} bytes")


def _model(settings: Settings) -> Path:
    from nemolet.convert.files import convert

    return convert(
        settings.from_,
        settings.to,
        architecture=settings.architecture,
        tokenizer=settings.with_tokenizer,
        pickles=settings.pickles,
        shard_bytes=int(settings.shard_gb * 1e9),
    )


def _adapter(settings: Settings, base: str) -> Path:
    from nemolet.archive import load
    from nemolet.convert.adapters import convert_adapter

    archive = load(base)
    return convert_adapter(
        settings.from_,
        settings.to,
        model=archive.model,
        architecture=settings.architecture,
        extra=archive.extra,
        base=base,
    )
