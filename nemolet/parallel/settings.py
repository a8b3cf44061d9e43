"""How a model is spread over devices, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nemolet.rules import Checked

if TYPE_CHECKING:
    from nemolet.parallel.mesh import MeshSizes
    from nemolet.parallel.rules import Rules

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Parallel(Checked):
    """How a model is spread over devices; ``conf/parallel`` has one file for each usual layout.

    Args:
        dp_replicate: copies of the parameters, each on other data; -1 for what is left of the world.
        dp_shard: parts of the parameters, each rank on other data; -1 for what is left of the world.
        cp: parts of each sequence.
        tp: parts of each layer.
        pp: stages of layers.
        ep: parts of the experts.
        rules: changes to the rules: ``{"parameters": {"V": []}, "activations": {"T": "cp"}}``.
        overrides: by module name, with ``*`` for any part of a name: ``"replicate"`` keeps its parameters whole on
            every rank of tp; ``"column"`` and ``"row"`` say how a weight is cut where its axes leave it open.
        kv_heads: what happens with fewer key/value heads than tp: an error, or projections that every rank holds.
        param_dtype: parameters while they are computed with; null for as they are stored.
        reduce_dtype: gradients while they are summed over ranks; null for as they are.
        shard_optimizer: whether each of the ranks that hold copies (dp_replicate) updates a part of them and keeps the
            optimizer state of this part only (ZeRO 1).
        reshard: whether parameters are freed between forward and backward; null for where it saves memory.
        cpu_offload: whether parameters, gradients and optimizer state live in the memory of the host.
        checkpointing: activation checkpointing of blocks: ``"none"``, ``"full"``, ``"every_n"``, or ``"selective"``,
            which keeps what is dear to compute (products and attention).
        compile: whether each block is compiled.
        cp_attention: how ranks that share a sequence attend: they ``"gather"`` all its keys and values, or pass them on
            in a ``"ring"``, which holds one part at a time and sends half as much again.
        schedule: of the pipeline.
        microbatches: of the pipeline; null for twice as many as stages.
        layers: how many layers each stage has; null for a balanced split.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    rules: dict[str, dict[str, str | list[str]]] | None = None
    overrides: dict[str, Literal["replicate", "column", "row"]] | None = None
    kv_heads: Literal["error", "replicate"] = "error"
    param_dtype: Dtype | None = None
    reduce_dtype: Dtype | None = None
    shard_optimizer: bool = False
    reshard: bool | None = None
    cpu_offload: bool = False
    checkpointing: str = "none"
    compile: bool = False
    cp_attention: Literal["gather", "ring"] = "gather"
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    microbatches: int | None = None
    layers: list[int] | None = None

    CONFIG_RULES = (
        ("tp >= 1 and pp >= 1 and cp >= 1 and ep >= 1", "tp, pp, cp and ep are at least 1"),
        (
            "checkpointing == 'none' and not compile and not cpu_offload"
            " or tp > 1 or pp > 1 or cp > 1 or ep > 1 or dp_shard != 1 or dp_replicate != 1",
            "checkpointing, compile and cpu_offload of a layout are for several ranks; one has model.checkpointing and"
            " trainer.compile",
        ),
        ("microbatches >= 1", "microbatches is at least 1; null for twice as many as stages"),
    )

    def sizes(self) -> MeshSizes:
        """The sizes of the mesh, as asked for; see :meth:`MeshSizes.resolve`."""
        from nemolet.parallel.mesh import MeshSizes

        return MeshSizes(self.dp_replicate, self.dp_shard, self.cp, self.tp, self.pp, self.ep)

    def make_rules(self) -> Rules:
        """The rules, with the changes."""
        from nemolet.parallel.rules import Rules

        return Rules.of(self.rules)
