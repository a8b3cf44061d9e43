"""``nemolet evaluate``: how well an archive predicts a text."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemolet.config import ModuleConfig, build
from nemolet.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """What to evaluate on what.

    Args:
        archive: a ``.nemolet`` file.
        data: the text, all of which counts.
        max_batches: stop after so many; null for the whole text.
        device: where to compute.
        imports: modules of yours that register classes which the archive names.
    """

    archive: str
    data: ModuleConfig
    max_batches: int | None = None
    device: str = "cpu"
    imports: list[str] | None = None

    CONFIG_RULES = (("max_batches >= 1", "max_batches is at least 1; null for the whole text"),)


def run(settings: Settings) -> None:
    """Print loss, perplexity and bits per byte."""
    from nemolet.archive import load
    from nemolet.language.losses import CrossEntropy
    from nemolet.language.metrics import LanguageScore
    from nemolet.training.evaluation import score
    from nemolet.training.graphs import training_graph

    archive = load(settings.archive, device=settings.device)
    if archive.tokenizer is None:
        raise ConfigError(
            "the archive has no tokenizer", where=settings.archive, fix="save it with nl.save(..., tokenizer=...)"
        )
    data = build(settings.data, where="data")
    context = getattr(archive.model, "context", data.sequence_length)
    data = replace(data, sequence_length=min(context, data.sequence_length))
    prepared = data.prepare(archive.tokenizer, split=False)
    graph = training_graph(archive.model, CrossEntropy()).eval()
    loss, count = score(graph, prepared.valid_loader(max_batches=settings.max_batches), settings.device)
    print(LanguageScore(loss, count, count * prepared.valid_bytes_per_token))
