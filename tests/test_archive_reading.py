"""Archives while something else happens: files that change, threads that read at once, defaults that change."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml

import nemolet as nl
from nemolet.archive import contents
from nemolet.container import CONFIG
from nemolet.errors import ArchiveError, ConfigError, ConversionError, DeclarationError, ShapeError
from nemolet.parallel.deferred import Deferred
from nemolet.types import HiddenBTD
from nemolet.untrusted import Bounded
from tests.hostile_archives import changed, configured, members_of, modelled, small, tables


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two archives of equal length, of other weights."""
    folder = tmp_path_factory.mktemp("pair")
    models = small(), small()
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_(1)
    paths = [nl.save(folder / f"{i}.nemolet", model=model) for i, model in enumerate(models)]
    assert paths[0].stat().st_size == paths[1].stat().st_size
    return paths


def replace(path: Path, other: Path) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(other.read_bytes())
    new.replace(path)


def overwrite(path: Path, other: Path) -> None:
    with path.open("r+b") as file:
        file.write(other.read_bytes())


def load_while(path, change):
    """Load an archive whose file is changed between the check and the first weight."""
    changes = [change]

    def fill(place, read):
        if changes:
            changes.pop()()
        place.copy_(read())

    return nl.load(path, later=fill)


def test_what_was_checked_is_read_though_the_file_was_replaced(pair, tmp_path):
    path = tmp_path / "m.nemolet"
    path.write_bytes(pair[0].read_bytes())
    loaded = load_while(path, lambda: replace(path, pair[1])).model.state_dict()
    for name, tensor in nl.load(pair[0]).model.state_dict().items():
        assert torch.equal(loaded[name], tensor)
    assert path.read_bytes() == pair[1].read_bytes()


def test_a_file_that_is_removed_while_it_is_read_is_read(pair, tmp_path):
    path = tmp_path / "m.nemolet"
    path.write_bytes(pair[0].read_bytes())
    found = contents(path)
    path.unlink()
    assert all(found.weights.get(name).shape == spec.shape for name, spec in found.weights.specs.items())


def test_a_file_that_is_written_to_while_it_is_read_is_refused(pair, tmp_path):
    path = tmp_path / "m.nemolet"
    path.write_bytes(pair[0].read_bytes())
    with pytest.raises(ArchiveError, match="changed while it was read"):
        load_while(path, lambda: overwrite(path, pair[1]))


def test_no_file_stays_open(pair, tmp_path):
    bad = tmp_path / "bad.nemolet"
    bad.write_bytes(configured(pair[0], heads=3))
    nl.load(pair[0])
    with pytest.raises(ArchiveError):
        nl.load(bad)
    assert not {pair[0], bad} & {number.resolve() for number in Path("/proc/self/fd").iterdir()}


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.nemolet")
    with pytest.raises(ArchiveError, match="no such file"):
        nl.load(tmp_path / "m.nemolet")


def test_threads_that_load_at_once_do_not_see_each_other(tmp_path):
    """A bound for one archive must not stop another, larger one."""
    models = [small(), small(vocab_size=3000, layers=3, width=64)]
    paths = [nl.save(tmp_path / f"{i}.nemolet", model=model) for i, model in enumerate(models)]
    bad = tmp_path / "bad.nemolet"
    bad.write_bytes(modelled(paths[0], tables(60, 10**5)))
    start = threading.Barrier(6)

    def work(number):
        start.wait()
        for _ in range(3):
            loaded = nl.load(paths[number % 2]).model.state_dict()
            for name, tensor in models[number % 2].state_dict().items():
                assert torch.equal(loaded[name], tensor)
            if number >= 4:
                with pytest.raises(ArchiveError, match="more tensors"):
                    nl.load(bad)
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


def test_inside_a_record_of_how_weights_are_made_they_are_read_later(tmp_path):
    model = small().eval().bfloat16()
    path = nl.save(tmp_path / "m.nemolet", model=model)
    for dtype in (None, torch.float32):
        with Deferred() as deferred:
            loaded = nl.load(path, dtype=dtype, later=deferred.fill_later).model
        assert all(parameter.is_meta for parameter in loaded.parameters())
        deferred.fill(loaded)
        for name, tensor in nl.load(path, dtype=dtype).model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_folder_of_another_format_is_not_read_later(tmp_path):
    with pytest.raises(ConversionError, match="nemolet convert"), Deferred() as deferred:
        nl.load(tmp_path, later=deferred.fill_later)


# ---------------------------------------------------------------- bounds


def test_a_bound_counts_what_is_made_and_not_what_is_looked_at():
    with Bounded(most_bytes=4000, most_calls=20) as bound:
        tensor = torch.ones(500)  # 2000 bytes
        tensor.view(10, 50).add_(1).t()
        tensor[:10].mul_(2)
        assert (bound.bytes, tensor[0].item()) == (2000, 4.0)
        with pytest.raises(ShapeError, match=r"4,000 bytes(.|\n)*4,004 bytes"):
            torch.cat((tensor, tensor[:1]))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_bound_holds_before_memory_is_taken(device):
    for make in (
        lambda: torch.empty(10**13, device=device),
        lambda: torch.ones(10**3, 1, device=device).expand(10**3, 10**10).contiguous(),
        lambda: torch.arange(10**7, device="cpu")[:, None] * torch.arange(10**7, device="cpu"),
    ):
        with pytest.raises(ShapeError, match="more tensors"), Bounded(most_bytes=10**9, most_calls=100):
            make()


def test_a_bound_ends_loops():
    with pytest.raises(ShapeError, match="100 operations"), Bounded(most_bytes=10**9, most_calls=100):
        while True:
            torch.empty(0)


def test_a_config_that_does_not_fit_is_refused_before_it_is_converted(pair, tmp_path):
    for changes in ({"layers": 10**9}, {"layers": 2}, {"vocab_size": 10**12}):
        path = tmp_path / "m.nemolet"
        path.write_bytes(configured(pair[0], **changes))
        with pytest.raises(ArchiveError):
            contents(path)


def test_what_is_read_into_memory_is_bounded_as_a_whole(tmp_path, monkeypatch):
    files = {f"f{i}": bytes(1000) for i in range(4)}
    path = nl.save(tmp_path / "m.nemolet", model=small(), extra=files)
    monkeypatch.setattr("nemolet.container._SMALL", 4000)
    with pytest.raises(ArchiveError, match="too large"):
        nl.load(path)
    with pytest.raises(ArchiveError, match="too large"):
        nl.save(path, model=small(), extra=files)


def test_what_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(ArchiveError, match="too many members"):
        nl.save(tmp_path / "m.nemolet", model=small(), extra={f"f{i}": b"" for i in range(70)})
    with pytest.raises(ConfigError, match="cannot hold"):
        nl.save(tmp_path / "m.nemolet", model=Tuned(width=2, factor=float("nan")))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- defaults


@dataclass(frozen=True)
class Shape:
    """Options of a user's module."""

    power: int = 2
    names: tuple[str, ...] = ("a", "b")
    made: object = field(default=print)


@nl.register
class Tuned(nl.NeuralModule):
    """A module with a default that changes one day."""

    def __init__(self, *, width: int, factor: float = 2.0, shape: Shape | None = Shape(), call: object = print) -> None:
        super().__init__(D=width)
        self.factor, self.shape = factor, shape
        self.proj = nl.nn.Linear("D", "D", width, width)

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        return self.factor * self.proj(hidden)


@nl.register
class Open(nl.NeuralModule):
    """A module with arguments that it does not name."""

    def __init__(self, *sizes: int, width: int = 2, **bindings: int) -> None:
        super().__init__(D=width, **bindings)

    def forward(self, hidden: HiddenBTD) -> HiddenBTD:
        return hidden


def test_a_changed_default_changes_no_archive(tmp_path, monkeypatch):
    model = Tuned(width=2)
    path = nl.save(tmp_path / "m.nemolet", model=model)
    monkeypatch.setitem(Tuned.__init__.__kwdefaults__, "factor", 3.0)
    assert Tuned(width=2).factor == 3.0
    again = nl.load(path).model
    assert again.factor == 2.0
    assert torch.equal(again(torch.ones(1, 1, 2)), model(torch.ones(1, 1, 2)))


def test_defaults_are_written_and_read(tmp_path):
    config = Tuned(width=2).config()
    assert config == {
        "_target_": f"{__name__}.Tuned",
        "width": 2,
        "factor": 2.0,
        "shape": {"power": 2, "names": ["a", "b"]},  # what is no plain data is left to the class
    }
    assert Tuned(width=2, shape=None).config()["shape"] is None
    again = nl.load(nl.save(tmp_path / "m.nemolet", model=small())).model
    assert again.config() == small().config()
    assert again.config()["norm_eps"] == 1e-5


def test_an_archive_without_defaults_loads(pair, tmp_path):
    """As they were written before."""
    config = yaml.safe_load(members_of(pair[0])[CONFIG])
    given = ("_target_", "vocab_size", "layers", "width", "heads", "context")
    config["model"] = {name: config["model"][name] for name in given}
    path = tmp_path / "old.nemolet"
    path.write_bytes(changed(pair[0], CONFIG, yaml.safe_dump(config).encode()))
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(nl.load(path).model(tokens), nl.load(pair[0]).model(tokens))


def test_arguments_that_a_class_does_not_name_are_written_by_their_names():
    module = Open(K=3)
    assert module.config() == {"_target_": f"{__name__}.Open", "width": 2, "K": 3}
    assert nl.build(module.config()).bindings == module.bindings
    with pytest.raises(DeclarationError, match="without names"):
        Open(1, 2).config()
