"""``nemolet overfit``: can one batch be learned by heart? If not, training on all of them is in vain."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from nemolet.cli.train import Settings as TrainSettings
from nemolet.cli.train import check_wiring, progress_bar, with_sizes
from nemolet.config import build
from nemolet.errors import TrainingError


@dataclass(frozen=True)
class Settings(TrainSettings):
    """The settings of a training run, and how long to try.

    Args:
        steps: optimizer steps on the one batch.
        rows: samples of the batch that are kept.
        share: the loss has to fall to this share of what it was.
    """

    steps: int = 200
    rows: int = 4
    share: float = 0.1

    CONFIG_RULES: ClassVar[tuple[tuple[str, str], ...]] = (
        ("steps >= 1 and rows >= 1", "steps and rows are at least 1"),
        ("share > 0 and share < 1", "share is between 0 and 1"),
        ("dry_run == False", "there is no dry run of overfit; see nemolet train --dry-run"),
    )


def run(settings: Settings) -> int:
    """Train on a few samples without dropout or augmentation; returns 1 where they cannot be learned."""
    import torch

    from nemolet.training.graphs import training_graph

    check_wiring(settings)
    torch.manual_seed(settings.seed)
    source = build(settings.data, where="data")
    data = replace(source, seed=settings.seed).prepare(settings.tokenizer, progress=progress_bar)
    parts = {"tokenizer": data.tokenizer}
    model = build(with_sizes(settings.model, data.sizes), parts=parts, where="model")
    check_data = getattr(model, "check_data", None)
    if check_data is not None:
        check_data(data)
    graph = training_graph(model, build(settings.loss, parts=parts, where="loss")).eval()
    batch = {name: tensor[: settings.rows] for name, tensor in next(iter(data.train_loader())).items()}
    optimizer = settings.optim.make(graph)
    first = last = float("nan")
    for step in range(settings.steps + 1):
        result = graph(**batch)
        loss = _of(result, "loss") / _of(result, "count").clamp(min=1)
        if not loss.isfinite():
            raise TrainingError("the loss is no number", where=f"step {step}", found=float(loss), fix="lower optim.lr")
        first, last = float(loss.detach()) if step == 0 else first, float(loss.detach())
        if step % max(1, settings.steps // 10) == 0:
            print(f"step {step:5}/{settings.steps}  loss {last:.4f}", flush=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(graph.parameters(), settings.trainer.clip or float("inf"))
        optimizer.step()
    _show(model, batch, data.tokenizer)
    learned = last <= settings.share * first
    verdict = "can be learned" if learned else "cannot be learned in so few steps"
    print(f"{len(next(iter(batch.values())))} samples {verdict}: loss {first:.4f} -> {last:.4f}")
    return 0 if learned else 1


def _of(result: Any, name: str) -> Any:
    return result[name] if isinstance(result, dict) else getattr(result, name)


def _show(model: Any, batch: dict[str, Any], tokenizer: Any) -> None:
    """What a recognizer now writes, and where it writes nothing, why."""
    from nemolet.speech.guards import probable_cause
    from nemolet.speech.models import Recognizer

    if not isinstance(model, Recognizer) or tokenizer is None:
        return
    encoded = model.encode(batch["audio"], batch["audio_lengths"])
    found = model.greedy(encoded)
    for hypothesis, labels in zip(found, batch["labels"].tolist()):
        said = tokenizer.decode([label for label in labels if label >= 0])
        print(f"said  {said}\nheard {tokenizer.decode(hypothesis.labels)}")
    if not any(hypothesis.labels for hypothesis in found):
        cause = probable_cause(batch, frames_B=encoded.lengths, step=10_000, gradient_norm=None)
        print(f"nothing but blanks: {cause}")
