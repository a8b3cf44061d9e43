"""The Lightning strategy that spreads a model over a mesh of devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.utilities.distributed import _init_dist_connection
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.plugins.precision import MixedPrecision, Precision
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import Optimizer

from nemolet.data.prepared import Batch
from nemolet.errors import TrainingError, did_you_mean
from nemolet.module import NeuralModule
from nemolet.parallel.apply import gradient_sync
from nemolet.parallel.context import own_context
from nemolet.parallel.copies import UpdatedParts, updated_parts
from nemolet.parallel.deferred import Deferred
from nemolet.parallel.gradients import Gradients, LossScale
from nemolet.parallel.mesh import Mesh, MeshSizes, make_mesh
from nemolet.parallel.settings import Parallel
from nemolet.training.folders import (
    FolderCheckpoints,
    kinds,
    names_of,
    optimizer_state,
    read_state,
    reader,
    same_place,
    single,
    weights_of,
)
from nemolet.training.launching import Launcher, RankLog, leave_with_launcher, store_of_attempt
from nemolet.training.lightning_model import LightningModel, random_states, set_random_state
from nemolet.training.liveness import Liveness
from nemolet.training.spreading import Runner, Spread, spread

T = TypeVar("T")


class MeshStrategy(ParallelStrategy):
    """Trains a :class:`LightningModel` on a mesh of devices; its graph stays as it was written (final).

    Losses and counts are summed over the ranks that read different tokens, and over no others. Gradients are exchanged
    in the last micro-batch of a window, and clipped by their norm over all meshes. Checkpoints are folders of
    which every rank writes its part. On one rank it does nothing.

    Args:
        parallel: the layout; None where sizes are given.
        timeout_minutes: how long a rank waits for the others in one exchange.
        patience_seconds: after so long without a sign of life a rank is given up, and the run ends.
        logs: folder of one log for each rank; None leaves what ranks print on the screen.
        deferred: what knows the values of a graph that was built on ``meta``; None for one that has its values.
        checkpoint_io: how checkpoints are written; None for folders.
        cluster_environment: who started the ranks; None for whoever did.
        sizes: fields of :class:`nemolet.parallel.Parallel`, such as ``tp=2``.

    Raises:
        ParallelError: when training starts, for sizes that do not multiply to the number of ranks.

    Example:
        >>> strategy = MeshStrategy(tp=2, dp_shard=4)
        >>> strategy.parallel.tp
        2
    """

    def __init__(
        self,
        parallel: Parallel | None = None,
        *,
        timeout_minutes: float = 30.0,
        patience_seconds: float = 30.0,
        logs: Path | None = None,
        deferred: Deferred | None = None,
        checkpoint_io: CheckpointIO | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        **sizes: Any,
    ) -> None:
        super().__init__(checkpoint_io=checkpoint_io, cluster_environment=cluster_environment)
        _refuse_unknown(parallel, sizes)
        self.parallel = parallel or Parallel(**sizes)
        self.timeout, self.patience = timedelta(minutes=timeout_minutes), patience_seconds
        self.num_nodes = 1
        self.mesh: Mesh | None = None  # None on one rank
        self._spread = Spread()
        self._deferred = deferred
        self._log = RankLog(logs) if logs is not None else None
        self._parts: UpdatedParts | None = None  # of parameters that this rank holds whole
        self._liveness: Liveness | None = None

    # ---------------------------------------------------------------- who and where

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Ranks on this machine."""
        return len(self.parallel_devices or ())

    @property
    def is_distributed(self) -> bool:
        """Whether Lightning gives loaders of the user's a distributed sampler."""
        return self.world_size > 1

    @property
    def sizes(self) -> MeshSizes:
        """The mesh as it is in this world."""
        return self.parallel.sizes().resolve(self.world_size)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which share of the samples this rank reads; ranks that hold parts of one copy read the same."""
        sizes = self.sizes
        shares = sizes.dp_replicate * sizes.dp_shard
        return {"num_replicas": shares, "rank": self.global_rank // (sizes.cp * sizes.tp) % shares}

    @property
    def random_rank(self) -> int:
        """The rank whose random numbers this one draws too: ranks with parts of one layer drop the same features."""
        return self.global_rank // self.sizes.tp * self.sizes.tp

    @property
    def runner(self) -> Runner | None:
        """What runs the graph, where it is not simply called."""
        return self._spread.runner

    @property
    def averaging_ranks(self) -> int:
        """Over how many ranks gradients are averaged: over none, they are summed."""
        return 1

    def set_world_ranks(self) -> None:
        """Tell whoever asks which rank this is."""
        assert self.cluster_environment is not None
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        setattr(rank_zero_only, "rank", self.global_rank)  # noqa: B010 - Lightning keeps it on a function

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self.num_processes > 1 and not self.cluster_environment.creates_processes_externally:
            self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)
        leave_with_launcher()

    # ---------------------------------------------------------------- setting up

    def setup_environment(self) -> None:
        """Start the exchange between ranks, and lay them out on the mesh."""
        super().setup_environment()
        if self._log is not None and self.world_size > 1:
            self._log.open(self.global_rank)
        sizes = self.sizes  # refused before anybody waits for anybody
        if self.world_size == 1:
            return
        assert self.cluster_environment is not None
        backend = "nccl" if self.root_device.type == "cuda" else "gloo"
        if not dist.is_initialized():
            device = self.root_device if backend == "nccl" else None
            options = {"timeout": self.timeout, "device_id": device, **store_of_attempt(self.timeout)}
            _init_dist_connection(self.cluster_environment, backend, **options)
            self._liveness = Liveness(patience=self.patience)
        self.mesh = make_mesh(sizes, self.root_device.type)

    def setup(self, trainer: Trainer) -> None:
        """Spread the graph over the mesh, then make optimizers of what lies on this rank."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        lightning = self._lightning()
        self.precision_plugin.convert_module(lightning)
        if self.mesh is not None:
            self._spread = spread(lightning, self.parallel, self.mesh, self.root_device, self._deferred)
        elif self._deferred is not None:
            self._deferred.fill(lightning.graph)
        self._deferred = None  # its record is as long as the model is deep
        if self.sizes.tp > 1:
            set_random_state(random_states(self.world_size)[self.random_rank])
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            if self.mesh is not None and self.parallel.shard_optimizer:
                self._parts = updated_parts(lightning.graph, self.mesh)
            self._reset_optimizers_and_schedulers()
            self.setup_optimizers(trainer)
            if self.mesh is not None:
                lightning.gradients = self._gradients(lightning)
        self.setup_precision_plugin()

    def _lightning(self) -> LightningModel:
        if not isinstance(self.lightning_module, LightningModel):
            raise TrainingError(
                "a mesh is made for a graph",
                where="MeshStrategy",
                expected="nemolet.training.LightningModel around your graph",
                found=type(self.lightning_module).__name__,
            )
        return self.lightning_module

    def model_to_device(self) -> None:
        """Move what is not yet there."""
        assert self.model is not None
        self.model.to(self.root_device)

    def _gradients(self, lightning: LightningModel) -> Gradients:
        ranks = self.world_size // self.sizes.pp
        holders = dict.fromkeys(self._spread.twice, 2 * ranks)
        updated = {name: self.part_of(p) for name, p in lightning.gradients.parameters.items()}
        return Gradients(updated, ranks=ranks, holders=holders)

    def _updated(self) -> dict[str, nn.Parameter]:
        return {name: self.part_of(parameter) for name, parameter in names_of(self._lightning()).items()}

    # ---------------------------------------------------------------- training

    def part_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What this rank updates of a parameter: all that it holds of it, or its part."""
        return parameter if self._parts is None else self._parts.of(parameter)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *unused: Any, **options: Any) -> Any:
        """Update what this rank updates, and take what the others have updated."""
        if self._parts is None:
            return super().optimizer_step(optimizer, closure, *unused, **options)
        self._parts.take_gradients()
        result = super().optimizer_step(optimizer, closure, *unused, **options)
        self._parts.gather()
        return result

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep gradients on their rank: more micro-batches follow."""
        graph = self._lightning().graph
        if self.mesh is None:
            yield
            return
        gradient_sync(graph, False)
        try:
            yield
        finally:
            gradient_sync(graph, True)

    def own_part(self, batch: Batch) -> Batch:
        """What this rank computes of a batch that it shares with others: its part of each sequence."""
        if self.mesh is None or self.mesh.sizes.cp == 1:
            return batch
        return own_context(batch, self._lightning().evaluation.input_ports, self.mesh.axis("cp").get_group())

    def evaluate(self, evaluation: NeuralModule, batch: Batch) -> Any:
        """Run the graph that also measures, between the hooks of the one that is trained, which share modules."""
        if self.mesh is None:
            return evaluation(**batch)
        # Memory for whole parameters that is first used in inference mode could not be used again in training.
        with torch.inference_mode(False), torch.no_grad():
            return self._evaluate(evaluation, self.own_part(batch))

    def _evaluate(self, evaluation: NeuralModule, batch: Batch) -> Any:
        graph = self._lightning().graph
        if self.runner is not None:
            result = self.runner.evaluate(batch)
        elif evaluation is graph:
            result = graph(**batch)
        else:
            graph.forward = evaluation.forward
            try:
                result = graph(**batch)
            finally:
                del graph.forward
        for unit in self._spread.units:  # no backward pass will free what was gathered
            unit.reshard()
        return result

    @property
    def precision_plugin(self) -> Precision:
        """Autocast, and for float16 a loss scale on which all ranks agree."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if (
            isinstance(plugin, MixedPrecision)
            and plugin.scaler is not None
            and not isinstance(plugin.scaler, LossScale)
        ):
            plugin.scaler = LossScale(plugin.device)
        self._precision_plugin = plugin

    # ---------------------------------------------------------------- checkpoints

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Folders, unless another way was asked for."""
        if self._checkpoint_io is None:
            self._checkpoint_io = FolderCheckpoints(background=self.root_device.type == "cuda")
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Parts are read into parts."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizers are read together with the weights."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The parts of the weights that lie on this rank."""
        return weights_of(self._lightning())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The parts of an optimizer's state that lie on this rank, by the names of parameters."""
        return optimizer_state(optimizer, self._updated())

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; every rank its part."""
        optimizers = kinds(inner for optimizer in self.optimizers for inner in single(optimizer))
        content = {**checkpoint, "layout": asdict(self.sizes), "optimizers": optimizers}
        self.checkpoint_io.save_checkpoint(content, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any layout into this one."""
        whole = self.sizes.pp == 1
        source = reader(Path(checkpoint_path))
        state = read_state(source, self._lightning(), self.optimizers, whole=whole, updated=self._updated())
        state["lr_schedulers"] = [
            same_place(config.scheduler, saved)
            for config, saved in zip(self.lr_scheduler_configs, state.get("lr_schedulers", ()))
        ]
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing is left to read."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing is left to read."""

    # ---------------------------------------------------------------- the end

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other ranks, who would wait for this one."""
        if self._liveness is not None:
            self._liveness.fail(exception)

    def teardown(self) -> None:
        """Finish writing; the process group stays, for whoever trains or tests next."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.checkpoint_io.teardown()
        if self._liveness is not None:
            self._liveness.close()
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    # ---------------------------------------------------------------- exchange

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Sum or average over the ranks that see other tokens; ranks that share a sample count once."""
        if self.mesh is None or not isinstance(tensor, Tensor):
            return tensor
        tokens = self.mesh.axis("dp_replicate", "dp_shard", "cp")
        if tokens.size() == 1 and group is None:
            return tensor
        result = tensor.clone()
        dist.all_reduce(result, group=group or tokens.get_group())
        mean = reduce_op in ("mean", "avg", dist.ReduceOp.AVG)
        return result / (tokens.size() if group is None else dist.get_world_size(group)) if mean else result

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks, or any, say yes."""
        if self.mesh is None:
            return decision
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return int(votes) == self.world_size if all else bool(votes)

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        if dist.is_initialized():
            ids = [self.root_device.index] if dist.get_backend() == "nccl" else None
            dist.barrier(device_ids=ids)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Give all ranks the object of one."""
        if not dist.is_initialized():
            return obj
        objects: list[Any] = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]  # type: ignore[no-any-return]


def _refuse_unknown(parallel: Parallel | None, sizes: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(Parallel)]
    for name in sizes:
        if name not in known or parallel is not None:
            raise TrainingError(
                "this is no setting of a mesh" if name not in known else "a layout and a size are given",
                where=f"MeshStrategy({name}=...)",
                expected=", ".join(known) if name not in known else "either parallel= or sizes",
                found=name,
                fix=did_you_mean(name, known),
            )
