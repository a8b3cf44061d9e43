"""``nemolet train``: from a config to a trained archive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nemolet.archive import load
from nemolet.config import ModuleConfig, build
from nemolet.data.corpus import TokenizerSpec
from nemolet.errors import ConfigError
from nemolet.parallel.deferred import Deferred
from nemolet.parallel.settings import Parallel
from nemolet.tokenizers import ByteTokenizer
from nemolet.training.optim import Optim
from nemolet.training.schedule import Schedule
from nemolet.training.settings import Training

if TYPE_CHECKING:
    from nemolet.training.experiment import Result


@dataclass(frozen=True)
class Sample:
    """What the trained model writes at the end.

    Args:
        prompt: what it continues; of one that is longer than the model's context, the end.
        max_new_tokens: how much it writes; 0 for nothing.
        temperature: of the choice.
    """

    prompt: str = ""
    max_new_tokens: int = 200
    temperature: float = 0.8

    CONFIG_RULES = (
        ("max_new_tokens >= 0", "max_new_tokens is at least 0"),
        ("temperature >= 0", "temperature is at least 0"),
    )


@dataclass(frozen=True)
class Settings:
    """Everything a training run is made of.

    With ``dry_run`` nothing is made: the layout and its memory are printed, as ``nemolet plan`` does.
    """

    model: ModuleConfig
    loss: ModuleConfig
    metrics: dict[str, ModuleConfig]
    tokenizer: TokenizerSpec
    data: ModuleConfig
    optim: Optim
    schedule: Schedule
    trainer: Training
    parallel: Parallel
    sample: Sample
    name: str = "run"
    folder: str | None = None
    seed: int = 0
    imports: list[str] | None = None
    dry_run: bool = False

    CONFIG_RULES: ClassVar[tuple[tuple[str, str], ...]] = (
        ("data.sequence_length <= model.context", "sequences may not be longer than the model's context"),
        ("data.context <= model.context", "texts may not be longer than the model's context"),
        (
            "schedule.warmup_steps < trainer.max_steps",
            "the warm-up has to end before the last step; set schedule.warmup_steps",
        ),
        ("seed >= 0 and seed < 4294967296", "seed is at least 0 and below 2 ** 32"),
        ("len(name) > 0", "the name is empty; it names the folder of the experiment"),
        ("len(folder) > 0", "the folder is empty; null for runs/<name>"),
        (
            "tokenizer.kind != 'sentencepiece' or tokenizer.vocab_size <= model.vocab_size",
            "the tokenizer has more tokens than the model; model.vocab_size=null takes them from it",
        ),
        (
            "tokenizer.kind != 'byte' or model.vocab_size >= 257",
            "the tokenizer has 257 tokens, more than the model; model.vocab_size=null takes them from it",
        ),
    )


_LABELS = {name: ["O", "B-x", "I-x"] for name in ("labels", "intents", "slots")}


def assumed(settings: Settings) -> dict[str, Any]:
    """Usual values of what the model of a config leaves open, since only the data knows it."""

    def open_in(block: ModuleConfig) -> set[str]:
        nested = (open_in(value) for value in block.values() if isinstance(value, dict) and "_target_" in value)
        return {name for name, value in block.items() if value is None}.union(*nested)

    sizes = {
        "vocab_size": settings.tokenizer.expected_size or ByteTokenizer().vocab_size,
        "classes": len(settings.model.get("names") or "ab"),
        **_LABELS,
    }
    unknown = open_in(settings.model)
    return {name: size for name, size in sizes.items() if name in unknown}


def wired(settings: Settings, *, metrics: bool = False) -> Any:
    """The training graph on no device, without data; what only the data knows is assumed.

    Args:
        settings: of the run.
        metrics: whether what is measured is wired too.

    Raises:
        NemoletError: for parts that cannot be built, or do not fit.
    """
    import torch

    from nemolet.training.graphs import refuse_other_types, training_graph

    with torch.device("meta"):
        model = build(with_sizes(settings.model, assumed(settings)), where="model")
        loss = build(settings.loss, where="loss")
        data = build(settings.data, where="data")
        measured = (build(settings.metrics, where="metrics") or measures(model)) if metrics else None
        graph = training_graph(model, loss, measured, getattr(data, "PORTS", ()))
        refuse_other_types(graph, data)
        return graph


def check_wiring(settings: Settings) -> None:
    """Find mistakes before minutes go into the data.

    Raises:
        NemoletError: for parts that cannot be built, or do not fit.
    """
    if "'_ref_': 'tokenizer'" in repr((settings.model, settings.loss, settings.metrics)):
        return  # there is none yet
    try:
        wired(settings, metrics=True)
    except ConfigError as error:  # a class of the user's may look at values
        if not isinstance(error.__cause__, (NotImplementedError, RuntimeError)):
            raise


def run(settings: Settings) -> int:
    """Train, or go on where the folder left off; then write a sample."""
    if settings.dry_run:
        from nemolet.cli import plan

        plan.show(settings)
        return 0
    import pytorch_lightning as pl
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning.utilities import rank_zero_only

    from nemolet.training.callbacks import spoken
    from nemolet.training.experiment import fit
    from nemolet.training.launching import requeue

    check_wiring(settings)
    folder = Path(settings.folder or f"runs/{settings.name}")
    source = build(settings.data, where="data")
    data = (replace(source, seed=settings.seed) if source.seed is None else source).prepare(
        settings.tokenizer, progress=progress_bar
    )
    pl.seed_everything(settings.seed, verbose=False)
    model_config = with_sizes(settings.model, data.sizes)
    parts = {"tokenizer": data.tokenizer}
    model, deferred = built(model_config, parts, settings)
    size = sum(p.numel() for p in model.parameters())
    first = getattr(rank_zero_only, "rank", 0) == 0
    if first:
        print(f"{size / 1e6:.2f}M parameters; {data.summary}; folder {folder}", flush=True)
    try:
        result = fit(
            model,
            build(settings.loss, parts=parts, where="loss"),
            data,
            folder=folder,
            metrics=build(settings.metrics, parts=parts, where="metrics") or measures(model),
            optim=settings.optim,
            schedule=settings.schedule,
            training=settings.trainer,
            parallel=settings.parallel,
            deferred=deferred,
            seed=settings.seed,
            config={**as_plain(settings), "model": model_config},
        )
    except MisconfigurationException as error:  # such as a GPU that this machine lacks
        raise ConfigError("this machine cannot train so", where="trainer", found=str(error)) from error
    if not first:
        return 0
    if result.stopped:
        if result.stopped == "SIGUSR1" and requeue():  # of the time limit of a job; a preempted one is started by SLURM
            print("SLURM starts the job again")
        return stopped(result)
    print(f"{spoken(result.valid)}  archive {result.archive}")
    sample = settings.sample
    if sample.max_new_tokens and hasattr(model, "generate") and data.tokenizer is not None:
        trained: Any = load(result.archive).model  # this rank may hold a part of the model; the archive is whole
        completions = trained.generate(
            data.tokenizer,
            sample.prompt,
            max_new_tokens=sample.max_new_tokens,
            temperature=sample.temperature,
            seed=settings.seed,
            truncate=True,
        )
        print(f"--- sample ---\n{sample.prompt}{completions[0].text}")
    return 0


def built(config: ModuleConfig, parts: dict[str, Any], settings: Settings) -> tuple[Any, Deferred | None]:
    """The model; for a mesh without values, and with the record of how each rank makes those that it keeps."""
    if settings.parallel.sizes() == Parallel().sizes():
        return build(config, parts=parts, where="model"), None
    import torch

    state = torch.get_rng_state()
    try:
        with Deferred() as deferred:
            return build(config, parts=parts, where="model"), deferred
    except ConfigError as error:  # a class of the user's may look at values
        if not isinstance(error.__cause__, (NotImplementedError, RuntimeError)):
            raise
    torch.set_rng_state(state)
    return build(config, parts=parts, where="model"), None


def measures(model: Any) -> dict[str, Any]:
    """What a model of a task measures where the config names nothing."""
    return model.measures() if hasattr(model, "measures") else {}


def with_sizes(model: ModuleConfig, sizes: Mapping[str, Any], where: str = "model") -> ModuleConfig:
    """Fill in what the config leaves to the data: the size of the vocabulary, the names of labels, in parts as well."""
    filled = dict(model)
    for name, value in filled.items():
        if isinstance(value, dict) and "_target_" in value:
            filled[name] = with_sizes(value, sizes, f"{where}.{name}")
    for name, size in sizes.items():
        if filled.get(name, size) is None:
            filled[name] = size
        elif _falls_short(filled.get(name, size), size):
            raise ConfigError(
                "the data says otherwise" if isinstance(size, str) else "the data has more of these than the model",
                where=f"{where}.{name}",
                expected=_expected(size),
                found=filled[name],
                fix=f"set {where}.{name}=null to take it from the data",
            )
    return filled


def _falls_short(own: Any, size: Any) -> bool:
    return bool(own < size) if isinstance(size, int) else list(own) != list(size)


def _expected(size: Any) -> str:
    if isinstance(size, int):
        return f"at least {size}"
    return size if isinstance(size, str) else ", ".join(size)


def stopped(result: Result) -> int:
    """Say where a run that was stopped goes on; the exit status of what stopped it."""
    print(f"stopped by {result.stopped} at step {result.steps}; the same command goes on from there")
    return {"SIGTERM": 143, "SIGINT": 130}.get(str(result.stopped), 0)


def as_plain(settings: Any) -> dict[str, Any]:
    """Settings as data for a YAML file."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    result: dict[str, Any] = plain(asdict(settings))
    return result


def progress_bar(what: str, total: int) -> Any:
    """A bar over bytes of text."""
    from tqdm import tqdm

    return tqdm(desc=what, total=total, unit="B", unit_scale=True, leave=False, mininterval=0.5, disable=None).update
