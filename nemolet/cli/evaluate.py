"""``nemolet evaluate``: how well an archive predicts a text, does its task, or hears."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemolet.cli.archives import opened, search_as_asked
from nemolet.config import ModuleConfig, build
from nemolet.errors import ConfigError

if TYPE_CHECKING:
    from nemolet.archive import Archive


_USUAL = 256  # tokens of a window, of a model that does not say how much it can read


@dataclass(frozen=True)
class Settings:
    """What to evaluate on what.

    Args:
        archive: a ``.nemolet`` file.
        data: the text or the examples, all of which count; or recordings and features, of which those set aside for
            validation count.
        loss: what is averaged; null for that of the model, which a graph of your own does not know.
        metrics: what is measured beside it; those of the model where nothing is named.
        context: tokens or words that are read together, so that each is predicted from what is before it in its window;
            null for ``data.sequence_length`` where that is set, and otherwise all that the model can read.
        out: a file of JSON lines for what was said and what was heard, of a model of speech; null for none.
        report: an HTML page of a classifier's mistakes: each class, what is taken for what, how sure it may be, and
            what its surest mistakes depended on; null for none.
        beam: hypotheses that a recognizer or a translator searches, 1 being greedy; null for what its archive says (of
            a recognizer 1).
        by_ctc: whether a recognizer with a transducer and CTC is heard by its CTC; null for what its archive says.
        max_batches: stop after so many; null for the whole text.
        with_adapter: a folder with an adapter of nemolet or PEFT for that model; null for none.
        device: where to compute.
        imports: modules of yours that register classes which the archive names.
    """

    archive: str
    data: ModuleConfig
    loss: ModuleConfig | None = None
    metrics: dict[str, ModuleConfig] | None = None
    context: int | None = None
    out: str | None = None
    report: str | None = None
    beam: int | None = None
    by_ctc: bool | None = None
    max_batches: int | None = None
    with_adapter: str | None = None
    device: str = "cpu"
    imports: list[str] | None = None

    CONFIG_RULES = (
        ("max_batches >= 1", "max_batches is at least 1; null for the whole text"),
        ("context >= 1", "context is at least 1; null for the model's own"),
        ("beam >= 1", "beam is at least 1"),
        ("report is None or max_batches is None", "a report is of all texts; leave max_batches out"),
    )


def run(settings: Settings) -> None:
    """Print loss, perplexity and bits per byte; of a model of a task or of speech, the numbers of its task."""
    from nemolet.data.corpus import Corpus
    from nemolet.language.classification import TextClassifier
    from nemolet.language.translation import in_use
    from nemolet.speech.evaluation import evaluates

    archive = opened(settings.archive, device=settings.device, adapter=settings.with_adapter)
    if evaluates(archive.model):
        search = _search(settings, archive.model)
        _speech(settings, archive, search)
        return
    if archive.tokenizer is None:
        raise ConfigError(
            "the archive has no tokenizer", where=settings.archive, fix="save it with nl.save(..., tokenizer=...)"
        )
    model = in_use(archive.model)
    search_as_asked(model, size=settings.beam)
    _refuse(settings.by_ctc is not None, "by_ctc", "a recognizer with a transducer and CTC", model)
    classifies = isinstance(model, TextClassifier) and not model.multi_label
    _refuse(
        settings.report is not None and not classifies, "report", "a TextClassifier with one label for a text", model
    )
    source = build(settings.data, where="data")
    if isinstance(source, Corpus) and settings.loss is None and not hasattr(model, "objective"):
        _print_language(model, archive.tokenizer, source, settings)
    else:
        _print_measures(model, archive.tokenizer, source, settings)


def _print_language(model: Any, tokenizer: Any, source: Any, settings: Settings) -> None:
    from nemolet.language.losses import CrossEntropy
    from nemolet.training.evaluation import score
    from nemolet.training.graphs import training_graph

    prepared = _in_windows(source, model, settings).prepare(tokenizer, split=False)
    graph = training_graph(model, CrossEntropy()).eval()
    batches = prepared.valid_loader(max_batches=settings.max_batches)
    print(score(graph, batches, settings.device, count_bytes=tokenizer.count_bytes))


def _in_windows(data: Any, model: Any, settings: Settings) -> Any:
    """The text in windows as long as asked, or as the model can read; the longer they are, the fewer make a batch."""
    own = getattr(model, "context", None)
    asked = settings.context or data.sequence_length
    if asked is not None and own is not None and asked > own:
        raise ConfigError(
            "the model cannot read so much at once", where="context", expected=f"at most {own}", found=asked
        )
    if asked is not None or own is None:
        return replace(data, sequence_length=asked or _USUAL)
    return replace(data, sequence_length=own, batch_size=max(1, data.batch_size * _USUAL // max(own, _USUAL)))


def _print_measures(model: Any, tokenizer: Any, source: Any, settings: Settings) -> None:
    """Loss and measures on all examples; where texts can be scored, those scores too."""
    from nemolet.cli.finetune import own_loss
    from nemolet.cli.train import measures
    from nemolet.data.feature_corpus import FeatureCorpus
    from nemolet.training.evaluation import measure
    from nemolet.training.graphs import training_graph

    examples = hasattr(source, "with_names")
    if hasattr(model, "objective") and not examples:
        raise ConfigError(
            "this data has no examples",
            where="data",
            expected="data=labelled, requests, tagged, questions, similar or parallel, with data.path=...",
            found=type(source).__name__,
        )
    if examples:
        length = settings.context or getattr(model, "context", None) or source.context
        source = replace(source.with_names(model), context=length)
    loss = build(settings.loss, where="loss") if settings.loss else own_loss(model)
    metrics = build(settings.metrics, where="metrics") if settings.metrics else measures(model)
    prepared = source.prepare(tokenizer, **({} if isinstance(source, FeatureCorpus) else {"split": False}))
    graph = training_graph(model, loss, metrics, prepared.fields).eval()
    found = measure(graph, prepared.valid_loader(max_batches=settings.max_batches), settings.device)
    over = [f"over {len(prepared.valid):,} examples"] if hasattr(prepared, "valid") else []
    if examples:
        found |= _whole_texts(model, tokenizer, prepared, settings.report)
        over = [f"over {len(prepared.measured):,} examples{prepared.counts.changes}"]  # several may share a row
    print("  ".join([*(f"{name} {value:.4f}" for name, value in found.items()), *over]))


def _whole_texts(model: Any, tokenizer: Any, prepared: Any, page: str | None) -> dict[str, float]:
    """Scores of whole texts, and the page of mistakes: of what the loss was of, and cut where that was cut."""
    from nemolet.language.mistakes import report

    source, records = prepared.source, [record.values for record in prepared.measured]
    if hasattr(model, "too_long") and source.too_long != "error":
        model.too_long, model.context = "truncate", source.context
    if page is not None:
        texts, labels = ([values[key] for values in records] for key in (source.text_key, source.label_key))
        note = prepared.counts.changes.removeprefix("; ")
        Path(page).write_text(report(model, tokenizer, texts, labels, note=note), encoding="utf-8")
    return model.score_texts(tokenizer, records) if hasattr(model, "score_texts") else {}


def _search(settings: Settings, model: Any) -> Any:
    """How a recognizer is decoded where that is not its own way; None for its own, and for other models of speech."""
    from nemolet.speech.beam import Beam
    from nemolet.speech.models import HybridRecognizer, Recognizer

    beam, hybrid = settings.beam or 1, isinstance(model, HybridRecognizer)
    _refuse(beam > 1 and not isinstance(model, Recognizer), "beam", "a recognizer", model)
    _refuse(settings.by_ctc is not None and not hybrid, "by_ctc", "a recognizer with a transducer and CTC", model)
    if settings.by_ctc is not None:
        model.decode_by_ctc = settings.by_ctc
    return functools.partial(Beam(beam), model) if beam > 1 else None


def _refuse(wrong: bool, where: str, expected: str, model: Any) -> None:
    if wrong:
        raise ConfigError("this model has no such setting", where=where, expected=expected, found=type(model).__name__)


def _speech(settings: Settings, archive: Archive, search: Any) -> None:
    from nemolet.speech.evaluation import evaluate
    from nemolet.training.graphs import refuse_other_types

    source = build(settings.data, where="data")
    refuse_other_types(archive.model, source)
    prepared = source.prepare(archive.tokenizer)
    batches = prepared.valid_loader(max_batches=settings.max_batches)
    report = evaluate(archive.model, batches, tokenizer=archive.tokenizer, search=search)
    print(report.text)
    if settings.out is not None:
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in report.entries]
        Path(settings.out).write_text("".join(lines), encoding="utf-8")
