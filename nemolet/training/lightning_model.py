"""The one LightningModule: any graph with a loss."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from nemolet.data.prepared import Batch, Loader
from nemolet.errors import TrainingError
from nemolet.module import NeuralModule
from nemolet.nn.router import balance_experts, routers, seed_auxiliary_losses
from nemolet.parallel.gradients import Gradients
from nemolet.training.evaluation import sums_of
from nemolet.training.optim import Optim, itself
from nemolet.training.schedule import Schedule
from nemolet.training.watch import first_bad_module
from nemolet.types import Count, Loss, NeuralType

# A sum over a whole batch may be too large for half precision, and its count is known only when all ranks are done.
# Until then it is divided by a number of the usual size; a power of two, so that nothing is rounded.
NOMINAL = 4096.0


class Window(NamedTuple):
    """The micro-batches of one optimizer step, and where the data stands after them."""

    batches: Sequence[Batch]
    position: dict[str, Any]


class LightningModel(pl.LightningModule):
    """Train any graph that has an output of type Loss and one of type Count (final).

    One training batch is one optimizer step: a :class:`Window`, a list of micro-batches, or a single one. Their losses
    are summed and divided by the count of all of them, on all ranks, so the update does not depend on how what is
    counted is spread.

    Args:
        graph: from a batch to a loss (a sum) and a count.
        optim: the optimizer.
        schedule: the learning rate over the steps.
        max_steps: over how many steps the schedule stretches.
        clip: largest norm of all gradients together; 0 for none.
        watch: steps between two looks for numbers that are none; 0 for never. On a GPU each look waits for it.
        evaluation: a graph of the same modules that also measures; see :func:`nemolet.training.training_graph`.

    Raises:
        TrainingError: for a graph without a loss; while training, for a loss or gradient that is no number.

    Example:
        >>> import nemolet as nl
        >>> model = nl.language.CausalLM(vocab_size=9, layers=1, width=8, heads=2)
        >>> tokens, labels = nl.Input(nl.TokenIdsBT), nl.Input(nl.LabelsBT)
        >>> graph = nl.Graph(nl.language.CrossEntropy()(logits=model(tokens), labels=labels))
        >>> lightning = LightningModel(graph, max_steps=10)
        >>> lightning.loss_port, lightning.count_port
        ('loss', 'count')
    """

    def __init__(
        self,
        graph: NeuralModule,
        *,
        optim: Optim | None = None,
        schedule: Schedule | None = None,
        max_steps: int = 1000,
        clip: float = 1.0,
        watch: int = 1,
        evaluation: NeuralModule | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # a window of micro-batches is one step, divided by its tokens
        self.graph, self.optim, self.schedule = graph, optim or Optim(), schedule or Schedule()
        self.max_steps, self.clip, self.watch = max_steps, clip, watch
        self.loss_port, self.count_port = _port(graph, Loss), _port(graph, Count)
        self._evaluation = [evaluation or graph]  # in a list, since its modules are those of the graph
        self.loader: Loader | None = None  # is told where to go on
        self.aliases: dict[str, str] = {}  # second names of parameters, under which a rank may hold them alone
        self.position: dict[str, Any] = {}  # of the data, after the last step
        self.entries_seen = 0
        self.gradient_norm: Tensor | None = None
        self.learning_rate = 0.0
        self._norms: Tensor | None = None  # of the gradients since the last look, added up
        self._rescale: Tensor | float = 1.0
        self._window: Sequence[Batch] = ()
        self._routers = False  # whether the graph has any
        self.gradients = Gradients({})
        self._valid: list[dict[str, Tensor]] = []
        self._resumed: dict[str, Any] | None = None

    @property
    def evaluation(self) -> NeuralModule:
        """The graph that also measures, else the one that is trained."""
        return self._evaluation[0]

    def forward(self, **batch: Tensor) -> Any:
        """Run the graph."""
        return self.graph(**batch)

    def configure_optimizers(self) -> Any:
        """The optimizer, and the schedule as a factor of each learning rate."""
        part_of = getattr(self.trainer.strategy, "part_of", itself) if self._trainer is not None else itself
        optimizer = self.optim.make(self.graph, part_of)
        trained = {name: p for name, p in self.graph.named_parameters() if p.requires_grad}
        self._routers = any(True for _ in routers(self.graph))
        self.gradients = Gradients(trained)  # found once, not at every step; a strategy may know of more ranks
        return [optimizer], [LambdaLR(optimizer, lambda step: self.schedule.factor(step, self.max_steps))]

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the loss, and what it is counted by."""
        result = self.graph(**batch)
        if isinstance(result, dict):
            return result[self.loss_port], result[self.count_port]
        return getattr(result, self.loss_port), getattr(result, self.count_port)

    def training_step(self, batch: Window | list[Batch] | Batch, batch_idx: int) -> dict[str, Tensor]:
        """One optimizer step on one or several micro-batches."""
        window = batch.batches if isinstance(batch, Window) else [batch] if isinstance(batch, dict) else batch
        own_part = getattr(self.trainer.strategy, "own_part", None)
        own = window if own_part is None else [own_part(micro) for micro in window]
        if self._routers:
            self._seed_auxiliary_losses()
        loss_sum, count = self._backward(own)
        if self.trainer.world_size > 1:
            loss_sum, count = self.trainer.strategy.reduce(torch.stack((loss_sum, count)), reduce_op="sum")
        self._rescale = NOMINAL * self._averaging_ranks / count.clamp(min=1)
        self._window = own
        optimizer = self.optimizers()
        self.learning_rate = self.trainer.optimizers[0].param_groups[0]["lr"]  # of this step, not of the next
        with torch.autocast(self.device.type, enabled=False):
            optimizer.step()  # type: ignore[union-attr]
        if self._routers:
            balance_experts(self.graph, self._summed_over_ranks)
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr]
        shares = (self.trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        self.entries_seen += sum(next(iter(micro.values())).numel() for micro in window) * shares
        if isinstance(batch, Window):
            self.position = batch.position
        return {"loss": loss_sum / count.clamp(min=1)}

    def _backward(self, window: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Forward and backward of all micro-batches; a strategy may bring another way to do it, such as a pipeline."""
        strategy = self.trainer.strategy
        runner = getattr(strategy, "runner", None)
        if runner is not None:
            return runner.step(window, NOMINAL)  # type: ignore[no-any-return]
        loss_sum, count = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for index, micro in enumerate(window):
            last = index == len(window) - 1
            with nullcontext() if last else getattr(strategy, "block_backward_sync", nullcontext)():
                loss, terms = self.losses(micro)
                with torch.autocast(self.device.type, enabled=False):  # gradients have the types of what they belong to
                    self.manual_backward(loss / NOMINAL)
            loss_sum += loss.detach()
            count += terms
        return loss_sum, count

    def _seed_auxiliary_losses(self) -> None:
        """The losses of routers count like the loss that goes backward."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.device))
        seed_auxiliary_losses(self.graph, scale / NOMINAL)

    def _summed_over_ranks(self, load: Tensor) -> Tensor:
        """Over those with other tokens; only those of the same stage have the same routers."""
        if self.trainer.world_size == 1:
            return load
        total: Tensor = self.trainer.strategy.reduce(load, reduce_op="sum")
        return total

    @property
    def _averaging_ranks(self) -> int:
        """Over how many ranks gradients are averaged."""
        return getattr(self.trainer.strategy, "averaging_ranks", self.trainer.world_size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Finish the mean over tokens, and clip; one pass over the gradients does both."""
        factor = self._rescale
        if self.clip or self.watch:
            norm = self.gradient_norm = self.gradients.norm() * factor
            if self.watch:
                self._norms = norm if self._norms is None else self._norms + norm
                if self.trainer.global_step % self.watch == 0:
                    self.look()
        if self.clip:
            factor = factor * (self.clip / (norm + 1e-6)).clamp(max=1.0)
        self.gradients.scale(factor)

    def look(self) -> None:
        """Refuse a number that is none in any step since the last look.

        Raises:
            TrainingError: naming the first module that has it.
        """
        norms, self._norms = self._norms, None
        if norms is not None and not norms.isfinite():
            self._refuse(norms)

    def _refuse(self, norm: Tensor) -> None:
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return  # a loss scaler meets infinite gradients on purpose, and skips them
        piped = getattr(self.trainer.strategy, "runner", None) is not None  # then the graph cannot be called
        origin = first_bad_module(self.graph, lambda: [self.losses(micro) for micro in self._window if not piped])
        raise TrainingError(
            "training met a number that is none",
            where=f"step {self.trainer.global_step}",
            expected="finite gradients",
            found=f"gradient norm {float(norm):g}; first in {origin}",
            fix="begin under another name=... with a lower optim.lr, a longer schedule.warmup_steps, or trainer.clip=1",
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect sums; their quotient is the mean over all tokens, not over batches."""
        evaluate = getattr(self.trainer.strategy, "evaluate", None)
        result = self.evaluation(**batch) if evaluate is None else evaluate(self.evaluation, batch)
        self._valid.append(sums_of(result, batch))

    def on_validation_epoch_end(self) -> None:
        """Log ``valid_loss`` and the metrics: quotients of sums over all validation batches of all ranks."""
        names = [*self._valid[0]]
        sums = torch.stack([torch.stack([values[name] for name in names]) for values in self._valid]).sum(0)
        self._valid = []
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        total = dict(zip(names, sums))
        pairs = {"valid_loss": (self.loss_port, self.count_port)}
        pairs |= {name[:-5]: (name, f"{name[:-5]}_whole") for name in names if name.endswith("_part")}
        for name, (part, whole) in pairs.items():
            self.log(name, (total[part] / total[whole]).float(), logger=False)

    # ---------------------------------------------------------------- exact resume

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know: the position in the data, and the random states of all ranks."""
        states = random_states(self.trainer.world_size)
        checkpoint["nemolet"] = {"position": self.position, "entries": self.entries_seen, "random": states}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Set the position in the data now, since Lightning fetches ahead; random states when training starts."""
        self._resumed = checkpoint["nemolet"]
        self.position, self.entries_seen = self._resumed["position"], self._resumed["entries"]
        if self.loader is not None and self.position:
            self.loader.load_state_dict(self.position)

    def on_train_start(self) -> None:
        """Go on exactly where the checkpoint was written."""
        if self._resumed is None:
            return
        state, self._resumed = self._resumed, None
        rank = getattr(self.trainer.strategy, "random_rank", self.global_rank)
        if rank < len(state["random"]):
            set_random_state(state["random"][rank])


def _port(graph: NeuralModule, element: type) -> str:
    names = [
        n
        for n, p in graph.output_ports.items()
        if isinstance(p.type, NeuralType) and isinstance(p.type.element, element)
    ]
    if len(names) != 1:
        raise TrainingError(
            f"the graph needs one output of type {element.__name__}",
            where=graph.label,
            expected="for example the outputs of nemolet.language.CrossEntropy",
            found=", ".join(map(str, graph.output_ports.values())),
            fix="end the graph in a loss module",
        )
    return names[0]


def random_states(ranks: int) -> list[dict[str, Any]]:
    """The states of the random generators of all ranks."""
    states: list[Any] = [random_state()]
    if ranks > 1:
        states = [None] * ranks
        torch.distributed.all_gather_object(states, random_state())
    return states


def random_state() -> dict[str, Any]:
    """The states of all random generators, as data that loads without unpickling code; any rank may take them."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,  # of the device of this rank
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what :func:`random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if isinstance(state["cuda"], Tensor) and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
