"""``nemolet finetune``: go on from an archive: all of it, a part of it, or a small addition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nemolet.cli.train import as_plain, measures, progress_bar, stopped, with_sizes
from nemolet.config import ModuleConfig, build
from nemolet.data.corpus import TokenizerSpec
from nemolet.errors import ArchiveError, ConfigError
from nemolet.nn.adapters import Adapter
from nemolet.parallel.deferred import Deferred
from nemolet.parallel.settings import Parallel
from nemolet.training.optim import Optim
from nemolet.training.rates import LayeredOptim
from nemolet.training.schedule import Schedule
from nemolet.training.settings import Training
from nemolet.types import Hidden, NeuralType

if TYPE_CHECKING:
    from nemolet.archive import Archive


@dataclass(frozen=True)
class Settings:
    """What to go on from, with what, and how.

    Args:
        archive: a ``.nemolet`` file: the model that is changed, or whose encoder is used.
        model: a new model around ``{_ref_: encoder}`` or ``{_ref_: base}``, as ``task=...`` makes one; null for the
            archive's own.
        tokenizer: a new vocabulary, which needs a new head (``task=recognize``); null for that of the archive.
        data: what is learned from.
        loss: the loss; null for that of the model.
        metrics: what is measured beside it; those of the model where nothing is named.
        adapter: the addition that is trained instead of the model; null for none.
        freeze: patterns of parameters that are not trained.
        layer_decay: learning rate of a layer over that of the layer above it.
        teacher: an archive whose opinion is learned as well; null for none.
        show: how many conversations are shown with what is learned of them, before training.
        optim: the optimizer.
        schedule: the learning rate.
        trainer: everything else.
        parallel: how the model is spread over devices, with its additions or its teacher.
        name: of the experiment folder, ``runs/<name>``.
        folder: another experiment folder.
        seed: of the order of the data, and of new weights.
        imports: modules of yours that register classes which the archive names.
    """

    archive: str
    data: ModuleConfig
    optim: Optim
    schedule: Schedule
    trainer: Training
    parallel: Parallel
    model: ModuleConfig | None = None
    tokenizer: TokenizerSpec | None = None
    loss: ModuleConfig | None = None
    metrics: dict[str, ModuleConfig] | None = None
    adapter: Adapter | None = None
    freeze: tuple[str, ...] = ()
    teacher: str | None = None
    layer_decay: float = 1.0
    show: int = 0
    name: str = "finetune"
    folder: str | None = None
    seed: int = 0
    imports: list[str] | None = None

    CONFIG_RULES: ClassVar[tuple[tuple[str, str], ...]] = (
        (
            "schedule.warmup_steps < trainer.max_steps",
            "the warm-up has to end before the last step; set schedule.warmup_steps",
        ),
        ("seed >= 0 and seed < 4294967296", "seed is at least 0 and below 2 ** 32"),
        ("layer_decay > 0 and layer_decay <= 1", "layer_decay is above 0 and at most 1"),
        ("layer_decay == 1 or optim.name == 'adamw'", "layers have rates of their own with optim=adamw only"),
        ("show >= 0", "show is at least 0"),
        ("tokenizer is None or model is not None", "a new vocabulary needs a new head, such as task=recognize"),
    )


def run(settings: Settings) -> int:
    """Train, write ``model.nemolet`` (additions merged), and the addition itself to ``adapter/``."""
    import pytorch_lightning as pl
    from pytorch_lightning.utilities import rank_zero_only

    from nemolet.language.prompt_tuning import PromptTuned
    from nemolet.training.callbacks import spoken
    from nemolet.training.experiment import fit

    _check_mesh(settings, "weights in four bits" if settings.adapter and settings.adapter.quantize else "")
    archive, deferred = _opened(settings)
    vocabulary = settings.tokenizer or archive.tokenizer
    if vocabulary is None:
        raise ConfigError(
            "the archive has no tokenizer",
            where=settings.archive,
            fix="save it with nl.save(..., tokenizer=...), or choose one here, such as tokenizer=char",
        )
    source, extra = _with_template(_source(settings, archive.model), settings, archive.extra)
    if "template" in (settings.model or {}):  # it is judged as it was trained
        settings = replace(settings, model={**(settings.model or {}), "template": source.template})
    data = source.prepare(vocabulary, progress=progress_bar)
    if settings.show:
        _show(data, settings.show)
    pl.seed_everything(settings.seed, verbose=False)
    with deferred or nullcontext():
        model = _model(settings, archive.model, data.sizes)
        around = _around(settings, model, deferred)
    prompt = isinstance(model, PromptTuned)  # whose vectors are written as well
    twice = around is not model and settings.teacher is None
    _check_mesh(settings, "a prompt" if prompt else "preferences" if twice else "")
    alone = around is model and not prompt and settings.adapter is None
    trained = sum(p.numel() for p in around.parameters() if p.requires_grad)
    folder = Path(settings.folder or f"runs/{settings.name}")
    first = getattr(rank_zero_only, "rank", 0) == 0
    if first:
        print(f"{trained / 1e6:.3f}M parameters are trained; {data.summary}; folder {folder}", flush=True)
    result = fit(
        around,
        build(settings.loss, where="loss") if settings.loss else own_loss(around),
        data,
        folder=folder,
        metrics=build(settings.metrics, where="metrics") if settings.metrics else measures(around),
        optim=LayeredOptim(**asdict(settings.optim), layer_decay=settings.layer_decay),
        schedule=settings.schedule,
        training=settings.trainer,
        parallel=settings.parallel,
        deferred=deferred,
        seed=settings.seed,
        config=as_plain(settings),
        finish=None if alone else _finish(model, folder, settings),
        extra=extra if settings.model is None else None,  # of another model they would not be true
    )
    if not first:
        return 0
    if result.stopped:
        return stopped(result)
    print(f"{spoken(result.valid)}  archive {result.archive}")
    return 0


def _opened(settings: Settings) -> tuple[Archive, Deferred | None]:
    """The archive; for a mesh without values, and with what reads on each rank those that it keeps."""
    import torch

    from nemolet.archive import load
    from nemolet.untrusted import looks_at_values

    # Small steps are lost in half precision.
    if settings.parallel.sizes() != Parallel().sizes():
        try:
            with Deferred() as deferred:
                return load(settings.archive, dtype=torch.float32, later=deferred.fill_later), deferred
        except ArchiveError as error:
            if not looks_at_values(error):
                raise
    return load(settings.archive, dtype=torch.float32), None


def _check_mesh(settings: Settings, kind: str) -> None:
    if settings.parallel.sizes() != Parallel().sizes() and kind:
        raise ConfigError(
            "this is not spread over a mesh",
            where="parallel",
            expected="a model, with additions or a teacher where they are wanted",
            found=kind,
            fix="set parallel=one",
        )


def _source(settings: Settings, model: Any) -> Any:
    """The data, with the labels that the model knows and texts no longer than it reads."""
    source = build(settings.data, where="data")
    if settings.model is None and hasattr(source, "with_names"):
        source = source.with_names(model)
    length = "context" if hasattr(source, "context") else "sequence_length"
    longest = getattr(model, "context", None)
    if longest is not None and (settings.model or {}).get("_target_", "").endswith(".PromptTuned"):
        longest -= (settings.model or {}).get("length", 0)  # the prompt takes a part of the context
    own = getattr(source, length, 0)  # None is as long as can be
    if longest is not None and (own is None or own > longest):
        source = replace(source, **{length: longest})
    return replace(source, seed=settings.seed) if source.seed is None else source


def _with_template(source: Any, settings: Settings, extra: Mapping[str, bytes]) -> tuple[Any, Mapping[str, bytes]]:
    """The data in the chat template that the archive came with, unless told otherwise; and small files that say it."""
    from nemolet.data.chat_template import FILE, TEMPLATES, ChatTemplate

    if not hasattr(source, "template"):
        return source, extra
    own, asked = ChatTemplate.of(extra), source.template
    if asked is None and own is not None:
        names = None if settings.model else dict(own.tokens)
        return replace(source, template=own.source, template_tokens=names), extra
    asked = asked or "plain"
    return replace(source, template=asked), {**extra, FILE: TEMPLATES.get(asked, asked).encode()}


def _model(settings: Settings, base: Any, sizes: Any) -> Any:
    from nemolet.nn.adapters import adapt, freeze

    if settings.model is None and settings.loss is None and _gives_hidden(base):
        raise ConfigError(
            "an encoder alone predicts nothing",
            where="task",
            expected="a head: task=classify, tag, request, answer or embed",
            found=f"null, for an archive that is a {type(base).__name__}",
        )
    model = base.train() if settings.model is None else _with_head(settings.model, base, sizes)
    if settings.adapter is not None:
        adapt(_changed(model, settings), settings.adapter)
        _train_heads(model, settings)
    if settings.freeze:
        freeze(model, settings.freeze)
    return model


def _with_head(config: ModuleConfig, base: Any, sizes: Any) -> Any:
    named = {name.rpartition(".")[2]: module for name, module in reversed(list(base.named_modules())) if name}
    parts = {"base": base, **{name: named[name] for name in ("encoder", "front_end") if name in named}}
    if _gives_hidden(base):
        parts.setdefault("encoder", base)
    if "encoder" not in parts and config.get("encoder") == {"_ref_": "encoder"}:
        raise ConfigError(
            "the archive has no encoder to put this head on",
            where="task",
            expected="an archive with an encoder, such as BERT's or that of a recognizer",
            found=type(base).__name__,
        )
    return build(with_sizes(config, sizes), parts=parts, where="model").train()


def _gives_hidden(model: Any) -> bool:
    """Whether a model is an encoder itself."""
    types = [port.type for port in model.output_ports.values()]
    return len(types) == 1 and isinstance(types[0], NeuralType) and isinstance(types[0].element, Hidden)


def _changed(model: Any, settings: Settings) -> Any:
    """What an adapter is put into: the archive's model, not the new head around it."""
    return model if settings.model is None or not hasattr(model, "encoder") else model.encoder


def _train_heads(model: Any, settings: Settings) -> None:
    """What is new is trained whole."""
    changed = _changed(model, settings)
    inside = {id(p) for p in changed.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.requires_grad_(True)


def _around(settings: Settings, model: Any, deferred: Deferred | None) -> Any:
    """The model with what it is compared with: its former self, a teacher; or twice, for both answers of a pair."""
    from nemolet.data.instructions import Preferences
    from nemolet.language.distillation import Distilled
    from nemolet.language.preference import PreferenceModel
    from nemolet.language.reward import RewardModel, RewardPairs

    if settings.teacher is not None:
        import torch

        from nemolet.archive import load

        later = None if deferred is None else deferred.fill_later
        return Distilled(student=model, teacher=load(settings.teacher, dtype=torch.float32, later=later).model)
    if not settings.data.get("_target_", "").endswith(Preferences.__name__):
        return model
    return RewardPairs(model=model) if isinstance(model, RewardModel) else PreferenceModel(policy=model)


def own_loss(model: Any) -> Any:
    """The loss that a model of a task knows; cross-entropy of tokens for others."""
    from nemolet.language.losses import CrossEntropy

    return model.objective() if hasattr(model, "objective") else CrossEntropy()


def _finish(model: Any, folder: Path, settings: Settings) -> Callable[[Any], Any]:
    def finish(_: Any) -> Any:
        from nemolet.language.prompt_tuning import PromptTuned, save_prompt
        from nemolet.nn.adapter_files import save_adapter
        from nemolet.nn.adapters import merge

        if settings.adapter is not None:
            save_adapter(model, folder / "adapter", base=settings.archive)
            merge(model)
        if isinstance(model, PromptTuned):
            save_prompt(model, folder / "adapter", base=settings.archive)
        return model

    return finish


def _show(data: Any, count: int) -> None:
    from nemolet.data.chat import Learned, show
    from nemolet.types import IGNORED

    for sample in data.train[:count]:
        labels = [IGNORED, *sample["labels"][:-1]]
        chat = Learned(list(sample["tokens"]), [label != IGNORED for label in labels])
        print(show(data.tokenizer, chat), end="\n---\n")
