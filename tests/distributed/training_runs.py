"""Small training runs through Lightning's Trainer, for the tests of the strategy and of its checkpoints."""

from __future__ import annotations

import functools

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import nemolet as nl
from nemolet.nn.router import Mixture
from nemolet.training import LightningModel, Optim, Schedule, training_graph
from nemolet.training.folders import weights_of
from nemolet.training.lightning_model import Window

LAYOUTS = {
    "ddp": {"dp_replicate": 4},
    "zero1": {"dp_replicate": 4, "shard_optimizer": True},
    "fsdp": {"dp_shard": 4},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "tp": {"tp": 4},
    "tp_fsdp": {"tp": 2, "dp_shard": 2},
    "tp_ddp": {"tp": 2, "dp_replicate": 2},
    "pp_fsdp": {"pp": 2, "dp_shard": 2},
    "pp_tp": {"pp": 2, "tp": 2},
    "cp_fsdp": {"cp": 2, "dp_shard": 2},
}
EXPERTS = {  # of a mixture of experts
    "fsdp": {"dp_shard": 4},
    "ep": {"dp_shard": 4, "ep": 2},
    "ep_tp": {"dp_shard": 2, "tp": 2, "ep": 4},
    "cp_tp_ep": {"cp": 2, "tp": 2, "ep": 2},
    "pp_ep": {"pp": 2, "dp_shard": 2, "ep": 2},
}


class Gate(nl.NeuralModule):
    """A layer of a user's own: a projection, a bias and a scale."""

    def __init__(self, *, width: int) -> None:
        super().__init__(D=width)
        self.proj = nl.nn.Linear("D", "D", width, width)
        self.scale = torch.nn.Parameter(torch.ones(width))
        self.declare_axes(scale="D")

    def forward(self, hidden: nl.HiddenBTD) -> nl.HiddenBTD:
        return hidden + self.scale * self.proj(hidden).sigmoid()


def make_graph(kind="llama"):
    torch.manual_seed(0)
    if kind in ("llama", "dropout"):
        dropout = 0.5 if kind == "dropout" else 0.0
        model = nl.language.CausalLM(vocab_size=13, layers=2, width=16, heads=4, context=32, dropout=dropout)
    elif kind == "gpt":
        model = nl.language.CausalLM(
            vocab_size=12,
            layers=2,
            width=16,
            heads=4,
            context=32,
            norm="layer",
            position="learned",
            bias=True,
            gated=False,
            activation="gelu",
        )
    elif kind == "moe":
        mixture = Mixture(4, 2, balance_loss=0.1, z_loss=0.01, balance_rate=0.01)
        model = nl.language.CausalLM(
            vocab_size=12, layers=2, width=16, heads=4, kv_heads=2, context=32, experts=mixture
        )
    else:
        embed, gate = nl.nn.Embedding("V", "D", 12, 16), Gate(width=16)
        model = nl.Graph(nl.nn.Head("D", "V", tied=embed)(gate(embed(nl.Input(nl.TokenIdsBT, "tokens")))))
    return training_graph(model, nl.language.CrossEntropy())


def windows(rank=0, ranks=1, steps=3, accumulate=2, vocab=12):
    """The same ragged sequences for any number of data-parallel ranks: each takes its part of a global batch of 8."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for step in range(steps):
        window = []
        for micro in range(accumulate):
            tokens = torch.randint(vocab, (8, 9), generator=generator)
            labels = tokens[:, 1:].clone()
            for row in range(8):
                labels[row, 1 + (row * 3 + step + micro) % 8 :] = -100
            share = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
            window.append({"tokens": tokens[share, :-1], "labels": labels[share]})
        made.append(window)
    return made


class Stream:
    """Windows one after the other, from where a checkpoint says. It has no state_dict: Lightning would keep it too."""

    def __init__(self, made):
        self.made, self.start = made, 0

    def __iter__(self):
        for index in range(self.start, len(self.made)):
            batches = self.made[index]
            yield batches if isinstance(batches, dict) else Window(batches, {"next": index + 1})

    def load_state_dict(self, position):
        self.start = position["next"]


class Losses(pl.Callback):
    """Losses, gradient norms and, once, what the strategy reports."""

    def __init__(self):
        self.losses, self.norms = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.losses.append(float(outputs["loss"]))
        self.norms.append(float(module.gradient_norm))


def quiet(**options):
    return {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        **options,
    }


def train(
    strategy,
    kind="llama",
    *,
    optim=None,
    clip=0.05,
    steps=3,
    only=None,
    dtype=torch.float64,
    callbacks=(),
    resume=None,
    **options,
):
    """Train a graph; returns its lightning module, what was seen, and the trainer.

    Args:
        only: the window that every step is about; None for one after the other.
    """
    graph = make_graph(kind).to(dtype)
    lightning = LightningModel(
        graph, optim=optim or Optim(lr=1e-2), schedule=Schedule("constant", warmup_steps=0), clip=clip
    )
    seen = Losses()
    world = dist.get_world_size() if dist.is_initialized() else 1
    trainer = pl.Trainer(
        **quiet(
            max_steps=steps,
            val_check_interval=steps,
            check_val_every_n_epoch=None,
            devices=world,
            strategy=strategy,
            callbacks=[seen, *callbacks],
            **options,
        )
    )
    share = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    data = windows(share["rank"], share["num_replicas"], steps=steps if only is None else only + 1)
    data = data if only is None else data[only:] * steps
    lightning.loader = stream = Stream(data)
    trainer.fit(lightning, stream, Stream([w[0] for w in data]), ckpt_path=resume)
    return lightning, seen, trainer


def whole(lightning):
    """All weights, whole."""
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in weights_of(lightning).items()}


@functools.cache
def reference(kind="llama", optim=None, steps=3):
    """The same run on one rank, without a strategy."""
    return result(*train("auto", kind, optim=optim, steps=steps))


def result(lightning, seen, trainer):
    """What two runs are compared by."""
    valid = float(trainer.callback_metrics["valid_loss"])
    return {"weights": whole(lightning), "losses": seen.losses, "norms": seen.norms, "valid": valid}
