"""``nemolet evaluate``: how well an archive predicts a text, or how well it hears."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemolet.config import ModuleConfig, build
from nemolet.errors import ConfigError

if TYPE_CHECKING:
    from nemolet.archive import Archive


@dataclass(frozen=True)
class Settings:
    """What to evaluate on what.

    Args:
        archive: a ``.nemolet`` file.
        data: the text, all of which counts; or recordings, of which those set aside for validation count.
        out: a file of JSON lines for what was said and what was heard, of a model of speech; null for none.
        max_batches: stop after so many; null for the whole text.
        device: where to compute.
        imports: modules of yours that register classes which the archive names.
    """

    archive: str
    data: ModuleConfig
    out: str | None = None
    max_batches: int | None = None
    device: str = "cpu"
    imports: list[str] | None = None

    CONFIG_RULES = (("max_batches >= 1", "max_batches is at least 1; null for the whole text"),)


def run(settings: Settings) -> None:
    """Print loss, perplexity and bits per byte; of a model of speech, the numbers of its task."""
    from nemolet.archive import load
    from nemolet.language.losses import CrossEntropy
    from nemolet.language.metrics import LanguageScore
    from nemolet.speech.evaluation import evaluates
    from nemolet.training.evaluation import score
    from nemolet.training.graphs import training_graph

    archive = load(settings.archive, device=settings.device)
    if evaluates(archive.model):
        _speech(settings, archive)
        return
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


def _speech(settings: Settings, archive: Archive) -> None:
    from nemolet.speech.evaluation import evaluate

    prepared = build(settings.data, where="data").prepare(archive.tokenizer)
    batches = prepared.valid_loader(max_batches=settings.max_batches)
    report = evaluate(archive.model, batches, tokenizer=archive.tokenizer)
    print(report.text)
    if settings.out is not None:
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in report.entries]
        Path(settings.out).write_text("".join(lines), encoding="utf-8")
