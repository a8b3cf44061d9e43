"""MeshStrategy through Lightning's Trainer: every layout makes the same updates as one rank."""

from __future__ import annotations

from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import LightningEnvironment
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.plugins.precision import MixedPrecision
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import LAYOUTS, Stream, make_graph, quiet, reference, result, train, windows

import nemolet as nl
from nemolet.errors import ParallelError, TrainingError
from nemolet.parallel.gradients import LossScale, local
from nemolet.parallel.settings import Parallel
from nemolet.training import ExponentialAverage, LightningModel, MeshStrategy, Optim, Schedule, training_graph
from nemolet.training.folders import names_of


def one_layout(sizes, kind, optim=None, **options):
    return result(*train(MeshStrategy(**sizes), kind, optim=optim, **options))


def assert_same(found, expected, rtol=1e-6, atol=1e-8):
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-7)
    assert found["valid"] == pytest.approx(expected["valid"], rel=1e-6)
    for name, weight in found["weights"].items():
        torch.testing.assert_close(weight, expected["weights"][name], rtol=rtol, atol=atol, msg=name)


def assert_all_same(results, expected, **tolerance):
    """Every rank saw the same, and together they hold all weights (a stage of a pipeline holds some)."""
    for found in results:
        assert_same(found, expected, **tolerance)
    assert {name for found in results for name in found["weights"]} == set(expected["weights"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["gpt", "own"])
def test_every_layout_equals_one_rank(ranks, layout, kind):
    if kind == "own" and ("pp" in layout or "cp" in layout):
        pytest.skip("it has neither blocks to lay on stages nor positions to share out")
    assert_all_same(ranks(4, one_layout, LAYOUTS[layout], kind), reference(kind))


def measured_first(sizes):
    """Validate before training, in inference mode, which Lightning leaves out with gloo but not with NCCL."""
    validate = LightningModel.validation_step

    def in_inference_mode(*args):
        with torch.inference_mode():
            validate(*args)

    with mock.patch.object(LightningModel, "validation_step", in_inference_mode):
        return one_layout(sizes, "llama", num_sanity_val_steps=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_rank_also_where_it_measured_before(ranks, layout):
    assert_all_same(ranks(4, measured_first, LAYOUTS[layout]), reference("llama"))


@pytest.mark.parametrize("layout", ["fsdp", "tp", "tp_fsdp"])
def test_muon_sees_whole_matrices(ranks, layout):
    optim = Optim("muon", lr=1e-2)
    assert_all_same(
        ranks(4, one_layout, LAYOUTS[layout], "llama", optim), reference("llama", optim), rtol=1e-5, atol=1e-7
    )


# ---------------------------------------------------------------- precision


def half(sizes, spoiled):
    """Float16 on a CPU; one rank alone meets a gradient that is no number, in the second step."""
    scale = (SpoiledScale if spoiled else LossScale)("cpu", init_scale=256.0)
    _, seen, trainer = train(
        MeshStrategy(**sizes),
        optim=Optim(lr=1e-2, fused=False),
        dtype=torch.float32,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scale)],
        callbacks=[moves := Moves()],
    )
    return seen.losses, trainer.precision_plugin.scaler.get_scale(), moves.seen


class SpoiledScale(LossScale):
    """Meets an infinite gradient in one part of one gradient, on the last rank, in the second step."""

    calls = 0

    def unscale_(self, optimizer):
        self.calls += 1
        if self.calls == 2 and dist.get_rank() == dist.get_world_size() - 1:
            local(optimizer.param_groups[0]["params"][0].grad).fill_(float("inf"))
        super().unscale_(optimizer)


class Moves(pl.Callback):
    """Whether the weights of this rank have changed, step by step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, index):
        self.before = [local(p).detach().clone() for p in module.parameters()]

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        now = [local(p).detach() for p in module.parameters()]
        self.seen.append(any(not torch.equal(a, b) for a, b in zip(now, self.before)))


@pytest.mark.parametrize("layout", ["fsdp", "tp_fsdp"])
def test_float16_skips_a_step_on_all_ranks_or_none(ranks, layout):
    for losses, scale, moved in ranks(4, half, LAYOUTS[layout], True):
        assert moved == [True, False, True]
        assert scale == 128.0
        assert all(torch.isfinite(torch.tensor(losses)))


def test_float16_learns_as_one_rank_does(ranks):
    losses, scale, _ = half({}, False)
    for found, other, _ in ranks(4, half, LAYOUTS["tp_fsdp"], False):
        assert found == pytest.approx(losses, rel=2e-3)
        assert other == scale


def test_bf16_learns_as_one_rank_does(ranks):
    options = {"dtype": torch.float32, "precision": "bf16-mixed"}
    expected = result(*train("auto", **options))
    for layout in ("fsdp", "tp_fsdp", "pp_fsdp"):
        for found in ranks(4, one_layout, LAYOUTS[layout], "llama", None, **options):
            assert found["losses"] == pytest.approx(expected["losses"], rel=5e-3)
            assert {w.dtype for w in found["weights"].values()} == {torch.float32}


def test_sharded_parameters_compute_in_the_type_that_is_asked_for(ranks):
    expected = reference()["losses"]
    sizes = {"dp_shard": 4, "param_dtype": "bfloat16", "reduce_dtype": "float32"}
    for found in ranks(4, one_layout, sizes, "llama", None, dtype=torch.float32):
        assert found["losses"] == pytest.approx(expected, rel=2e-2)
        assert found["losses"] != pytest.approx(expected, rel=1e-6)  # it was bfloat16


# ---------------------------------------------------------------- measuring, averaging, one rank, bad input


def measured(sizes):
    torch.manual_seed(0)
    model = nl.language.CausalLM(vocab_size=12, layers=2, width=16, heads=4, context=32)
    graphs = [
        training_graph(model, nl.language.CrossEntropy(), metrics).double()
        for metrics in (None, {"accuracy": nl.metrics.TokenAccuracy()})
    ]
    lightning = LightningModel(graphs[0], evaluation=graphs[1], max_steps=2, schedule=Schedule(warmup_steps=1))
    world = dist.get_world_size() if dist.is_initialized() else 1
    strategy = MeshStrategy(**sizes) if world > 1 else "auto"
    options = {"max_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": None, "devices": world}
    trainer = pl.Trainer(**quiet(**options, strategy=strategy))
    share = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    data = windows(share["rank"], share["num_replicas"], steps=2)
    trainer.fit(lightning, Stream(data), Stream([w[0] for w in data]))
    return {name: float(trainer.callback_metrics[name]) for name in ("valid_loss", "accuracy")}


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tp", "tp_fsdp", "pp_fsdp", "pp_tp"])
def test_metrics_are_those_of_one_rank(ranks, layout):
    expected = measured({})
    for found in ranks(4, measured, LAYOUTS[layout]):
        assert found == pytest.approx(expected, rel=1e-6)


def averaged(sizes):
    average = ExponentialAverage(0.5)
    strategy = MeshStrategy(**sizes) if sizes else "auto"
    lightning, _, trainer = train(strategy, callbacks=[average])
    assert list(average.average) == list(names_of(lightning))
    parts = {n: a.full_tensor() if isinstance(a, DTensor) else a for n, a in average.average.items()}
    return parts, float(trainer.callback_metrics["valid_loss"])


@pytest.mark.parametrize("layout", ["fsdp", "tp_fsdp", "pp_fsdp"])
def test_averages_of_weights_are_those_of_one_rank(ranks, layout):
    expected, valid = averaged({})
    for found, other in ranks(4, averaged, LAYOUTS[layout]):
        assert other == pytest.approx(valid, rel=1e-6)
        for name, average in found.items():
            torch.testing.assert_close(average, expected[name], rtol=1e-6, atol=1e-8, msg=name)


def test_one_rank_needs_no_process_group():
    found = one_layout({}, "llama")
    assert not dist.is_initialized()
    for name, weight in reference()["weights"].items():
        assert torch.equal(found["weights"][name], weight)


def exchanges(accumulate):
    graph = make_graph()
    lightning = LightningModel(graph, schedule=Schedule("constant", warmup_steps=0))
    trainer = pl.Trainer(**quiet(max_steps=1, devices=4, strategy=MeshStrategy(dp_shard=4)))
    with Exchanges() as seen:
        trainer.fit(lightning, Stream([[windows(steps=1)[0][0]] * accumulate]))
    return seen.counts


class Exchanges(TorchDispatchMode):
    """Counts what ranks exchange, by the name of the operation."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("c10d") or "c10d" in func.namespace:
            self.counts[func._opname] = self.counts.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


def test_gradients_are_exchanged_once_for_a_window(ranks):
    one, four = (ranks(4, exchanges, accumulate)[0] for accumulate in (1, 4))
    scattered = [name for name in one if "reduce_scatter" in name]
    assert scattered
    for name in scattered:
        assert one[name] == four[name]


def misfit(sizes):
    train(MeshStrategy(**sizes))


def unseeded(sizes, random_only):
    """Every rank is a process with a seed of its own; the weights may come from a file."""
    dropout = {"vocab_size": 12, "layers": 1, "width": 16, "heads": 4, "context": 32, "dropout": 0.5}
    torch.manual_seed(0 if random_only else dist.get_rank())
    graph = training_graph(nl.language.CausalLM(**dropout), nl.language.CrossEntropy())
    torch.manual_seed(dist.get_rank())
    strategy = MeshStrategy(**sizes, rules={"activations": {"T": "cp"}})
    lightning = LightningModel(graph, schedule=Schedule("constant", warmup_steps=0))
    pl.Trainer(**quiet(max_steps=1, devices=2, strategy=strategy)).fit(lightning, Stream(windows(steps=1)))
    return {name: local(p).detach() for name, p in lightning.named_parameters() if "norm" in name}


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"dp_replicate": 2}, {"dp_shard": 2}], ids=["tp", "ddp", "fsdp"])
def test_weights_that_differ_among_ranks_are_refused(ranks, sizes):
    with pytest.raises(ParallelError, match=r"weight: ranks made different weights(.|\n)*seed_everything"):
        ranks(2, unseeded, sizes, False)


def test_ranks_of_tp_drop_the_same_features_whatever_their_seeds(ranks):
    first, second = ranks(2, unseeded, {"tp": 2}, True)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bad_input(ranks):
    with pytest.raises(ParallelError, match="does not fill the world"):
        ranks(2, misfit, {"tp": 4})
    with pytest.raises(ParallelError, match="override matches no module"):
        ranks(2, train, MeshStrategy(tp=2, overrides={"nothing": "replicate"}))
    with pytest.raises(TrainingError, match="did you mean 'dp_shard'"):
        MeshStrategy(dp_shards=4)
    with pytest.raises(TrainingError, match="a layout and a size"):
        MeshStrategy(Parallel(tp=2), tp=2)
    with pytest.raises(TrainingError, match="LightningModel around your graph"):
        pl.Trainer(**quiet(max_steps=1, devices=1, strategy=MeshStrategy())).fit(BoringModel())


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [
        ({"dp_replicate": 4}, [0, 1, 2, 3]),
        ({"tp": 4}, [0, 0, 0, 0]),
        ({"dp_shard": 2, "tp": 2}, [0, 0, 1, 1]),
        ({"pp": 2, "dp_shard": 2}, [0, 1, 0, 1]),
        ({"cp": 2, "dp_shard": 2}, [0, 0, 1, 1]),
    ],
)
def test_ranks_of_one_copy_read_the_same_samples(sizes, shares):
    for rank, share in enumerate(shares):
        strategy = MeshStrategy(**sizes, cluster_environment=World(rank, 4))
        assert strategy.distributed_sampler_kwargs == {"num_replicas": len(set(shares)), "rank": share}


class World(LightningEnvironment):
    """A rank of a world that does not run."""

    def __init__(self, rank, world):
        super().__init__()
        self.set_global_rank(rank)
        self.set_world_size(world)
